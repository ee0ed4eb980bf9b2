"""Trusted rows in a training that judges its targets: what they are worth, none of them lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from runs import class_rows, classification_run, seq2seq_run, write_rows
from tiny import collate
from tsqlora import QualityScores
from tsqlora.cli import main
from tsqlora.config import QualityConfig, RunConfig
from tsqlora.credibility import (
    ENOUGH,
    Credibility,
    beside,
    drawable,
    from_null,
    null_percentiles,
    share_of_wrong,
)
from tsqlora.errors import DataError
from tsqlora.inputs import Inputs
from tsqlora.judging import PART, Judge, LabelVerdicts, window_ends
from tsqlora.losses import CLASSIFICATION, SEQ2SEQ
from tsqlora.online import OnlineScorer
from tsqlora.online_training import STATE_FILE
from tsqlora.pipeline import Run
from tsqlora.scoring import Scorer
from tsqlora.selection import rounds
from tsqlora.trusted import (
    MOST,
    MOST_OFTEN,
    UNKNOWN,
    first_rows,
    halves,
    joined,
    random_share,
    worth,
)

QUIET = {
    "adapt_steps": 0,
    "mode": "auto",
    "weights": {"gradient_norm": 0.0, "loss_reduction": 0.0, "convergence": 0.0},
}


def rows_of(samples: int) -> Dataset:
    rows = [{"id": i, "input_ids": [1, i], "labels": i % 2} for i in range(samples)]
    return Dataset.from_list(rows)


def mixed(random: np.random.Generator, samples: int, share: float) -> np.ndarray:
    """Shares u of which so many are of targets drawn at random, the others hard but right."""
    drawn = random.random(samples) < share
    return np.where(drawn, random.random(samples), random.beta(1, 2, samples))


@given(share=st.floats(0.3, MOST), seed=st.integers(0, 99))
def test_the_share_drawn_at_random_is_found_beside_rows_that_are_as_hard(
    share: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    u, control = mixed(random, 20_000, share), mixed(random, 20_000, 0.0)
    assert random_share(u, control) == pytest.approx(share, abs=0.07)


def test_hard_rows_without_random_ones_are_seldom_taken_for_any() -> None:
    found = []
    for seed in range(200):
        random = np.random.default_rng(seed)
        found.append(random_share(mixed(random, 2_000, 0.0), mixed(random, 150, 0.0)))
    assert np.mean(np.asarray(found) > 0) < 0.06


def test_nothing_is_known_by_few_rows_or_by_a_model_that_knows_nothing() -> None:
    random = np.random.default_rng(0)
    u, control = mixed(random, 2_000, 0.8), mixed(random, 150, 0.0)
    assert random_share(u, control) > 0.5
    assert np.isnan(random_share(u, control[: ENOUGH - 1]))
    assert np.isnan(random_share(random.random(2_000), random.random(150)))


@given(random=st.floats(0, 1), left_out=st.floats(0, 1))
def test_a_trusted_row_is_worth_one_to_thirty_others(random: float, left_out: float) -> None:
    k = worth(random, left_out)
    assert 1.0 <= k <= MOST_OFTEN
    assert k <= worth(random, 0.0) + 1e-9  # what is left out need not be outweighed
    alone = worth(random, 0.0)
    assert alone == MOST_OFTEN or alone * (1 - random) ** 3 == pytest.approx(1.0)


def flipped(seed: int, wrong: float, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares u of a hard task's labels beside its null, and which of them are wrong."""
    random, samples = np.random.default_rng(seed), 20_000
    margin = random.normal(1.0, 1.0, samples)  # of the true class: one in six is misjudged
    is_wrong = random.random(samples) < wrong
    by_chance = is_wrong & (random.random(samples) < 1 / (classes - 1))
    loss = np.where(is_wrong, margin, -margin)
    null = np.where(by_chance, -margin, margin)  # the null's label is another than the given one
    group = np.zeros(samples, np.int32)
    return null_percentiles(loss, group, null, group), is_wrong


def like_the_null(wrong: float, classes: int) -> float:
    """ρ of so many wrong labels: π / (1 - π/(C - 1))."""
    return wrong / (1 - wrong / (classes - 1))


@settings(max_examples=20, deadline=None)
@given(wrong=st.floats(0.05, 0.42), classes=st.sampled_from([2, 3, 6]), seed=st.integers(0, 99))
def test_where_rho_is_known_what_is_told_is_the_probability_that_a_label_is_right(
    wrong: float, classes: int, seed: int
) -> None:
    u, is_wrong = flipped(seed, wrong, classes)
    judge = LabelVerdicts(len(u), trusted=0)
    judge.random = like_the_null(wrong, classes)
    judge.scale = (1 - share_of_wrong(judge.random, classes)) / (1 - judge.random)
    found = beside(u, judge.random, classes)
    assert found.wrong_share == pytest.approx(wrong)
    judge.close(np.arange(len(u)), found)
    told = judge.told
    assert judge.wrong_share == pytest.approx(wrong, abs=0.03)
    for low, high in ((0.0, 0.4), (0.4, 0.7), (0.7, 0.9), (0.9, 1.01)):
        among = (told >= low) & (told < high)
        if among.sum() > 1000:
            assert is_wrong[among].mean() == pytest.approx(1 - told[among].mean(), abs=0.1)


def test_two_labels_of_five_are_judged_where_the_null_alone_has_to_be_silent() -> None:
    u, is_wrong = flipped(0, 0.4, 2)
    assert not from_null(u, np.inf, 2).known
    values = beside(u, like_the_null(0.4, 2), 2).values
    assert is_wrong[~drawable(values)].mean() > 0.6
    assert is_wrong[drawable(values)].mean() < 0.3


@settings(max_examples=25)
@given(
    pool=st.integers(1, 40),
    trusted=st.integers(1, 20),
    draws=st.integers(1, 200),
    seed=st.integers(0, 5),
)
def test_first_steps_see_one_half_of_the_trusted_rows_and_never_the_control(
    pool: int, trusted: int, draws: int, seed: int
) -> None:
    shown, control = halves(pool + trusted, trusted, seed)
    assert sorted([*shown, *control]) == list(range(pool, pool + trusted))
    ids = np.asarray(first_rows(rows_of(pool + trusted), trusted, draws, seed)["id"])
    assert len(ids) == draws
    assert not np.isin(ids, control).any()
    times = np.bincount(ids, minlength=pool + trusted)
    assert times[shown].sum() == min(draws, len(shown))
    assert times[shown].max(initial=0) <= 1
    assert np.ptp(times[:pool]) <= 1  # what is lacking comes from all of the pool alike


def test_without_trusted_rows_the_first_steps_are_on_the_pool_itself() -> None:
    rows = rows_of(5)
    assert first_rows(rows, 0, 99, seed=0) is rows


def test_trusted_rows_are_numbered_on_and_an_empty_reference_is_refused() -> None:
    both = joined(rows_of(4), rows_of(3))
    assert both["id"][:] == [*range(7)]
    assert both["input_ids"][4:] == rows_of(3)["input_ids"][:]
    with pytest.raises(DataError, match=r"quality\.reference holds no row"):
        joined(rows_of(4), rows_of(4).select([]))


def scorer_of(kind: str, pool: int, trusted: int) -> OnlineScorer:
    quality = QualityConfig(mode="online", duplicates="all")
    return OnlineScorer(Scorer(collate, quality), rows_of(pool + trusted), kind, trusted)


def test_a_trusted_row_is_drawn_k_times_as_often_and_never_doubted() -> None:
    scorer = scorer_of(CLASSIFICATION, 100, 20)
    shown, _ = halves(120, 20, scorer.scorer.seed)
    assert scorer.inclusion()[shown].tolist() == [UNKNOWN] * 10
    assert scorer.inclusion().sum() == 110 + 10 * UNKNOWN
    scorer.judge.random = 0.75  # type: ignore[union-attr]
    np.testing.assert_allclose(scorer.inclusion(), [1.0] * 100 + [MOST_OFTEN] * 20)
    times = np.zeros(120)
    for epoch in range(200):
        np.add.at(times, rounds(scorer.inclusion(), 1.0, 0, epoch), 1)
    assert times[100:].mean() / times[:100].mean() == pytest.approx(MOST_OFTEN, rel=0.02)
    doubted = np.where(np.arange(100) < 50, 0.0, 1.0)
    for _ in range(2):
        scorer.judge.close(np.arange(100), Credibility(doubted, 0.5, ""))  # type: ignore
    q = scorer.inclusion()
    np.testing.assert_allclose(q[100:], 8.0)  # half is left out, so of the others half is random
    np.testing.assert_allclose(q[50:100], 1.0)
    assert (q[:50] < 0.1).all()
    again = scorer_of(CLASSIFICATION, 100, 20)
    again.load(scorer.state())
    np.testing.assert_array_equal(again.inclusion(), q)


def test_labels_are_acted_on_after_one_window_only_where_rho_is_known() -> None:
    judge, doubted = LabelVerdicts(12, trusted=2), Credibility(np.full(4, 0.1), 0.4, "")
    judge.close(np.arange(4), doubted)
    assert (judge.heeded == 1).all()
    assert np.isnan(judge.random_among(np.arange(10)))
    judge.random = 0.4
    assert judge.heeded.tolist() == [0.1] * 4 + [1.0] * 8
    assert judge.random_among(np.arange(10)) == pytest.approx((4 * 0.9 + 6 * 0.4) / 10)
    judge.random = 0.0
    assert (judge.heeded == 1).all()
    assert judge.random_among(np.arange(10)) == 0


def test_the_loss_of_a_trusted_row_of_generation_is_never_weighed_down() -> None:
    judge = Judge(300, trusted=50)
    random = np.random.default_rng(0)
    loss = np.where(np.arange(250) < 125, random.normal(1, 0.1, 250), random.normal(9, 1, 250))
    judge.close(np.arange(250), loss, random.normal(9, 1, 200))
    assert judge.acting
    weights = judge.weights(np.arange(200, 300), np.full(100, 9.0))
    assert (weights[:50] < 0.5).all()
    assert (weights[50:] == 1).all()


def wrong_rows(samples: int, share: float) -> list[dict[str, Any]]:
    """Class rows, a share of whose labels are those of other rows."""
    rows = class_rows(samples, seed=5)
    random = np.random.default_rng(0)
    chosen = np.flatnonzero(random.random(samples) < share)
    for i, j in zip(chosen, np.roll(chosen, 1), strict=True):
        rows[i] = {**rows[i], "label": rows[j]["label"]}
    return rows


def test_a_run_trains_on_its_reference_and_writes_scores_of_the_pool_alone(tmp_path: Path) -> None:
    reference = write_rows(tmp_path / "trusted.jsonl", class_rows(120, seed=9))
    changes = {"quality": {**QUIET, "reference": str(reference)}, "training.num_train_epochs": 6}
    config = classification_run(tmp_path, **changes)
    write_rows(tmp_path / "train.jsonl", wrong_rows(400, 0.6))
    found = RunConfig.from_yaml(config)
    assert found.quality.mode == "online"
    run = Run.start(found)
    assert run.inputs.splits.trusted == 120
    run.train()
    assert main(["report", str(run.folder.path)]) == 0
    scores = QualityScores.from_parquet(run.folder.scores)
    assert scores.ids.tolist() == list(range(400))
    assert scores.probability.sum() == pytest.approx(1.0)


def test_a_long_enough_training_finds_its_labels_random_beside_the_reference(
    tmp_path: Path,
) -> None:
    reference = write_rows(tmp_path / "trusted.jsonl", class_rows(200, seed=9))
    changes = {
        "quality": {**QUIET, "adapt_steps": 60, "reference": str(reference)},
        "training.num_train_epochs": 4,
        "training.save_strategy": "epoch",
        "training.warmup_steps": 0,  # so that the tiny model knows its task early
    }
    config = classification_run(tmp_path, **changes)
    write_rows(tmp_path / "train.jsonl", wrong_rows(400, 0.5))
    run = Run.start(RunConfig.from_yaml(config))
    run.train()
    verdict = QualityScores.from_parquet(run.folder.scores).verdict
    assert "beside the trusted ones" in verdict
    saved = sorted(run.folder.training.glob(f"checkpoint-*/{STATE_FILE}"))
    assert 0.2 < load_file(saved[-1])["judge.random"][0] <= MOST


def test_generation_takes_a_reference_into_its_training_too(tmp_path: Path) -> None:
    config = seq2seq_run(tmp_path, quality={**QUIET})
    source = RunConfig.from_yaml(config).data.train
    trusted = tmp_path / "trusted.jsonl"
    trusted.write_text(Path(str(source)).read_text())
    config = seq2seq_run(tmp_path, quality={**QUIET, "reference": str(trusted)})
    run = Run.start(RunConfig.from_yaml(config))
    pool = len(run.inputs.raw["train"])
    assert len(run.inputs.splits.train) == pool + run.inputs.splits.trusted
    run.train()
    assert len(QualityScores.from_parquet(run.folder.scores).ids) == pool


def test_a_trusted_label_that_training_lacks_is_named_before_anything_starts(
    tmp_path: Path,
) -> None:
    rows = [*class_rows(5), {"text": "w7 w8", "label": "unheard"}]
    reference = write_rows(tmp_path / "trusted.jsonl", rows)
    config = classification_run(tmp_path, quality={**QUIET, "reference": str(reference)})
    with pytest.raises(DataError, match=r"quality\.reference[\s\S]*row 5: the label 'unheard'"):
        Inputs(RunConfig.from_yaml(config)).load()


def test_generation_is_judged_several_times_an_epoch_and_labels_at_its_end() -> None:
    def ends(kind: str) -> list[int]:
        scorer = scorer_of(kind, 2980, 20)
        return [visits for visits in range(0, 3001, 10) if scorer.window_is_over(visits)]

    assert ends(CLASSIFICATION) == [3000]
    assert ends(SEQ2SEQ) == window_ends(3000, 3000, 10)
    assert len(ends(SEQ2SEQ)) > PART
