"""Scores, credibility and draws: formulas against their definitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from tiny import all_terms
from tsqlora.config import QualityConfig, QualityWeights
from tsqlora.credibility import (
    drawable,
    from_agreement,
    from_null,
    from_reference,
    null_percentiles,
)
from tsqlora.errors import DataError, RunError
from tsqlora.measurements import Measurements
from tsqlora.quality import (
    QualityScores,
    convergence_terms,
    quality_scores,
    robust_z,
    softmax,
    tempered,
    without_trend,
)
from tsqlora.selection import (
    LengthGrouped,
    QualitySampler,
    draw,
    length_grouped,
    select_samples,
)


def measured(samples: int = 200, seed: int = 0, classes: int | None = 3) -> Measurements:
    random = np.random.default_rng(seed)
    group = random.integers(0, classes or 1, samples)
    return Measurements(
        ids=np.arange(samples),
        loss=random.gamma(1.0, 0.1, samples),
        gradient_norm=random.gamma(2.0, 1.0, samples),
        loss_reduction=random.normal(size=samples),
        sketch=random.normal(size=(samples, 16)) + group[:, None],
        length=np.ones(samples, dtype=np.int64),
        group=group,
        null_loss=random.gamma(9.0, 0.5, samples),
        null_group=random.integers(0, classes or 1, samples),
        classes=classes,
        kin=group,
    )


def test_preset_paper_is_the_literal_sum_and_softmax() -> None:
    pool = measured()
    weights = QualityWeights(0.5, 2.0, 3.0)
    got = quality_scores(pool, QualityConfig(preset="paper", weights=weights, temperature=0.7))
    mean = pool.sketch.mean(0)
    norms = np.linalg.norm(pool.sketch, axis=1) * np.linalg.norm(mean)
    cosine = pool.sketch @ mean / norms
    expected = 0.5 * pool.gradient_norm + 2.0 * pool.loss_reduction + 3.0 * cosine
    np.testing.assert_allclose(got.quality, expected)
    powers = np.exp(expected / 0.7)
    np.testing.assert_allclose(got.probability, powers / powers.sum())
    assert (got.credibility == 1).all()


def test_convergence_leaves_the_sample_itself_out() -> None:
    pool = measured(12)
    got = convergence_terms(pool)
    units = pool.sketch / np.linalg.norm(pool.sketch, axis=1, keepdims=True)
    for i in range(12):
        others = (pool.group == pool.group[i]) & (np.arange(12) != i)
        mean = units[others].mean(0)
        assert got[i] == pytest.approx(units[i] @ mean / np.linalg.norm(mean))


def test_where_no_kin_are_told_apart_convergence_is_towards_the_whole_pool() -> None:
    pool = replace(measured(12, classes=None), kin=None)
    got = convergence_terms(pool)
    units = pool.sketch / np.linalg.norm(pool.sketch, axis=1, keepdims=True)
    for i in range(12):
        mean = np.delete(units, i, 0).mean(0)
        assert got[i] == pytest.approx(units[i] @ mean / np.linalg.norm(mean))


def test_convergence_is_towards_the_reference_where_it_was_known() -> None:
    pool = replace(measured(), alignment=np.linspace(-1, 1, 200))
    np.testing.assert_array_equal(convergence_terms(pool), pool.alignment)
    got = quality_scores(pool, all_terms(), measured(seed=1))
    np.testing.assert_array_equal(got.convergence, pool.alignment)


@given(st.integers(0, 10**6), st.floats(0.05, 5))
def test_probabilities_add_up_and_follow_quality_among_equals(seed: int, tau: float) -> None:
    got = quality_scores(measured(seed=seed), all_terms(temperature=tau))
    assert got.probability.sum() == pytest.approx(1)
    assert (got.probability >= 0).all()
    equals = got.credibility == got.credibility.max()
    order = np.argsort(got.quality[equals])
    assert (np.diff(got.probability[equals][order]) >= -1e-15).all()


def test_a_zero_weight_leaves_its_term_out() -> None:
    pool = measured()
    blind = replace(pool, loss_reduction=np.full(200, np.nan))
    config = all_terms(weights=QualityWeights(loss_reduction=0.0))
    np.testing.assert_array_equal(
        quality_scores(pool, config).quality, quality_scores(blind, config).quality
    )


def test_where_no_term_is_measured_credibility_alone_decides() -> None:
    nothing = np.full(200, np.nan)
    pool = replace(
        measured(), gradient_norm=nothing, loss_reduction=nothing, sketch=np.zeros((200, 0))
    )
    got = quality_scores(pool, all_terms(weights=QualityWeights(0.0, 0.0, 0.0)))
    assert (got.quality == 0).all()
    credible = np.where(got.credibility >= 0.7, got.credibility, 0)
    np.testing.assert_allclose(got.probability, credible / credible.sum())


def test_wrong_targets_are_found_and_counted_by_the_null() -> None:
    random = np.random.default_rng(0)
    null = random.gamma(9.0, 0.5, 3000)
    for share in (0.0, 0.2, 0.4):
        wrong = random.random(3000) < share
        loss = np.where(wrong, random.gamma(9.0, 0.5, 3000), random.gamma(1.0, 0.2, 3000))
        groups = np.zeros(3000, dtype=np.int64)
        found = from_null(null_percentiles(loss, groups, null, groups), len(null))
        assert found.wrong_share == pytest.approx(share, abs=0.04)
        if share == 0:
            assert (found.values == 1).all()
        else:
            assert (found.values[wrong] < 0.5).mean() > 0.9
            assert (found.values[~wrong] < 0.5).mean() < 0.05


def test_shares_of_few_classes_are_not_overstated() -> None:
    """Of two classes a flipped label may be the right one, so the null is part right itself."""
    random = np.random.default_rng(1)
    for share in (0.1, 0.3):
        wrong = random.random(6000) < share
        high, low = random.gamma(9.0, 0.5, 6000), random.gamma(1.0, 0.2, 6000)
        groups = np.zeros(6000, dtype=np.int64)
        u = null_percentiles(np.where(wrong, high, low), groups, np.where(wrong, low, high), groups)
        assert from_null(u, np.inf, classes=2).wrong_share == pytest.approx(share, abs=0.03)


def test_a_model_that_knows_nothing_judges_nothing() -> None:
    random = np.random.default_rng(0)
    ignorant = from_null(random.random(2000), np.inf)
    assert not ignorant.known
    assert (ignorant.values == 1).all()
    reaching = random.beta(1.0, 1.6, 2000)  # hard but sound, into the null's range
    unsure = from_null(reaching, np.inf)
    assert not unsure.known
    assert "not judged" in unsure.verdict


def test_a_small_null_does_not_hide_what_is_plain_to_see() -> None:
    """The quantiles of 80 null losses make a flat f look steep; of many they would not."""
    random, unjudged = np.random.default_rng(0), 0
    for _ in range(200):
        wrong, null = random.random(1000) < 0.4, random.normal(5, 1, 80)
        loss = np.where(wrong, random.normal(5, 1, 1000), random.exponential(0.3, 1000))
        none = np.zeros(1000, dtype=np.int64)
        u = null_percentiles(loss, none, null, np.zeros(80, dtype=np.int64))
        unjudged += not from_null(u, 80).known
    assert unjudged <= 2


def test_where_sound_samples_cannot_be_recognised_nothing_is_judged() -> None:
    random = np.random.default_rng(0)
    wrong = random.random(2000) < 0.2
    u = np.where(wrong, random.random(2000), random.beta(0.9, 1.05, 2000))
    found = from_null(u, np.inf)
    assert not found.known
    assert (found.values == 1).all()


def predicted(
    samples: int, share: float, skill: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(confidence, agrees, wrong): the model is right more often the surer it is."""
    random = np.random.default_rng(seed)
    confidence = random.gamma(2.0, skill, samples)
    right = random.random(samples) < 1 / (1 + np.exp(-confidence))
    wrong = random.random(samples) < share
    return confidence, right & ~wrong, wrong


def test_labels_that_a_sure_model_contradicts_are_doubted_and_few_others() -> None:
    for share in (0.1, 0.2, 0.3):
        confidence, agrees, wrong = predicted(5000, share, 2.5)
        kept = drawable(from_agreement(confidence, agrees, classes=2))
        assert kept[~wrong].mean() > 0.93
        assert kept[wrong].mean() < 0.3


def test_on_clean_labels_or_with_a_model_that_knows_little_predictions_doubt_nothing() -> None:
    for share, skill in ((0.0, 2.5), (0.2, 0.2), (0.45, 2.5)):
        confidence, agrees, _ = predicted(5000, share, skill)
        assert (from_agreement(confidence, agrees, classes=2) == 1).all()
    assert (from_agreement(np.ones(10), np.zeros(10, dtype=bool), 2) == 1).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_leaving_out_loses_at_most_a_twentieth_of_the_sound(values: list[float]) -> None:
    credible = np.array(values)
    kept = drawable(credible)
    assert credible[~kept].sum() <= 0.05 * credible.sum() + 1e-12
    assert kept[credible >= 0.7].all()


def test_a_clean_reference_shows_what_hard_but_sound_samples_cost() -> None:
    random = np.random.default_rng(0)
    sound = random.beta(0.6, 1.6, 4000)
    reference = random.beta(0.6, 1.6, 400)
    clean = from_reference(sound, reference, np.inf)
    assert clean.wrong_share == 0
    assert (clean.values == 1).all()
    wrong = random.random(4000) < 0.3
    dirty = from_reference(np.where(wrong, random.random(4000), sound), reference, np.inf)
    assert dirty.wrong_share == pytest.approx(0.3, abs=0.08)


def test_a_reference_as_dirty_as_the_pool_fools_nobody() -> None:
    random = np.random.default_rng(0)

    def dirty(samples: int) -> np.ndarray:
        wrong = random.random(samples) < 0.3
        return np.where(wrong, random.random(samples), random.beta(0.2, 9.0, samples))

    found = from_reference(dirty(3000), dirty(500), np.inf)
    assert found.wrong_share == pytest.approx(0.3, abs=0.05)


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 10**6))
def test_a_draw_takes_its_size_and_repeats_the_possible_rather_than_the_impossible(
    samples: int, fraction: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    probability = random.random(samples) * (random.random(samples) < 0.7)
    probability = probability / max(probability.sum(), 1e-9)
    got = draw(probability, fraction, seed)
    assert len(got) == max(1, int(np.ceil(fraction * samples - 1e-9)))
    times = np.bincount(got, minlength=samples)
    possible = probability > 0 if probability.any() else np.ones(samples, dtype=bool)
    assert not times[~possible].any()
    assert np.ptp(times[possible]) <= 1
    np.testing.assert_array_equal(got, draw(probability, fraction, seed))


def test_first_draws_follow_the_probabilities() -> None:
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    first = [draw(probability, 0.25, seed)[0] for seed in range(4000)]
    shares = np.bincount(first, minlength=4) / 4000
    np.testing.assert_allclose(shares, probability, atol=0.03)


def test_the_sampler_draws_afresh_each_epoch_and_the_same_again() -> None:
    sampler = QualitySampler(quality_scores(measured(), all_terms()), 0.3, seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    assert list(sampler) == second  # goes on by itself
    assert len(first) == len(sampler) == 60


def test_grouping_by_length_keeps_the_draw_and_saves_padding() -> None:
    draws = QualitySampler(quality_scores(measured(), all_terms()), 0.5, seed=5)
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    grouped = LengthGrouped(draws, lengths, 8)
    orders = []
    for each in (grouped, draws, grouped):
        each.set_epoch(0)
        orders.append(list(each))
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] == orders[2] != sorted(orders[0])

    def padded(order: list[int]) -> int:
        cuts = [[lengths[i] for i in order[k : k + 8]] for k in range(0, len(order), 8)]
        return sum(len(cut) * max(cut) for cut in cuts)

    assert padded(orders[0]) < 0.8 * padded(orders[1])
    grouped.set_epoch(1)
    assert sorted(grouped) != sorted(orders[0])


def test_grouped_batches_come_in_an_order_that_says_nothing_of_their_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 2010)
    order = length_grouped(lengths.tolist(), 32, seed=0)
    assert sorted(order) == list(range(2010))
    assert lengths[order[:32]].max() == lengths.max(), "the largest batch comes first"

    def likeness(order: list[int]) -> float:
        means = lengths[order[:1984]].reshape(-1, 32).mean(1)
        return float(np.corrcoef(means[1:], means[:-1])[0, 1])

    generator = torch.Generator().manual_seed(0)
    trainers = get_length_grouped_indices(lengths.tolist(), 32, generator=generator)
    assert abs(likeness(order)) < 0.3 < 0.5 < likeness(trainers), "theirs: 0.63"


def test_selected_rows_keep_their_order() -> None:
    scores = quality_scores(measured(), all_terms())
    dataset = Dataset.from_dict({"row": list(range(200))})
    rows = select_samples(dataset, scores, 0.25, seed=3)["row"]
    assert list(rows) == sorted(rows)
    assert len(rows) == 50
    with pytest.raises(DataError, match="199 rows but the scores are of 200"):
        select_samples(dataset.select(range(199)), scores)
    with pytest.raises(DataError, match=r"outside \(0, 1\]"):
        select_samples(dataset, scores, 1.5)


def test_scores_survive_parquet(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    scores = quality_scores(measured(), all_terms())
    scores.to_parquet(tmp_path / "scores.parquet")
    again = QualityScores.from_parquet(tmp_path / "scores.parquet")
    for name in ("ids", "loss", "convergence", "credibility", "probability", "selected"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scores, name))
    assert again.verdict == scores.verdict
    assert pq.read_schema(tmp_path / "scores.parquet").names == [
        "id",
        "loss",
        "gradient_norm",
        "loss_reduction",
        "convergence",
        "credibility",
        "quality",
        "probability",
        "selected",
    ]
    assert again.prediction is None
    with pytest.raises(RunError, match=r"none\.parquet"):
        QualityScores.from_parquet(tmp_path / "none.parquet")


def test_predictions_survive_parquet_where_there_are_some(tmp_path: Path) -> None:
    classes = np.arange(len(measured().ids), dtype=np.int32) % 3
    scores = quality_scores(replace(measured(), predicted=classes), all_terms())
    scores.to_parquet(tmp_path / "scores.parquet")
    again = QualityScores.from_parquet(tmp_path / "scores.parquet")
    np.testing.assert_array_equal(again.prediction, classes)


def test_small_helpers_do_what_they_say() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 1000.0, np.nan])
    assert robust_z(values)[2] == 0
    assert robust_z(values)[4] == 3
    assert robust_z(values)[5] == 0
    np.testing.assert_allclose(robust_z(np.ones(4)), 0)
    lengths = np.log(np.arange(1, 50.0))
    flat = without_trend(3.0 - 0.5 * lengths, lengths)
    np.testing.assert_allclose(flat, flat[0])
    np.testing.assert_allclose(softmax(np.array([1000.0, 1000.0])), 0.5)
    assert softmax(np.array([1000.0, 0.0]))[1] > 0
    np.testing.assert_allclose(tempered(np.zeros(4), np.zeros(4), 1.0), 0.25)
    assert tempered(np.zeros(4), np.array([1.0, 1.0, 1.0, 0.1]), 1.0)[3] == 0
