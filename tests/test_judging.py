"""Credibility while a model is being trained, and the draws and weights that follow from it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st

from reference import inclusion_one_by_one
from test_online import trainer_of
from tsqlora.credibility import (
    HARD,
    LIKE_NULL,
    SOUND,
    Credibility,
    belong,
    drawable,
    from_null,
    null_percentiles,
)
from tsqlora.judging import (
    BY_HEART,
    CLEARED,
    COMEBACK,
    LOWEST,
    LOWEST_OF_LABELS,
    NO_SIGN,
    SETTLED,
    Judge,
    LabelVerdicts,
    inclusion,
    window_ends,
)
from tsqlora.model_card import dropped_line
from tsqlora.online_training import OnlineTrainer
from tsqlora.selection import rounds, unscored

WRONG = 0.2
EVERY = np.arange(500)


def window(samples: int, wrong: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of sound samples near 0.2, of wrong ones as the null's near 3; which are wrong."""
    random = np.random.default_rng(seed)
    bad = np.arange(samples) < round(wrong * samples)
    loss = np.where(bad, random.normal(3, 0.5, samples), random.exponential(0.2, samples))
    return loss, bad, random.normal(3, 0.5, 400)


def test_a_window_tells_wrong_targets_and_weighs_what_comes_after_by_them() -> None:
    judge = Judge(1000)
    loss, bad, null = window(500, WRONG)
    assert (judge.weights(EVERY, loss) == 1).all(), "nothing is known before"
    judge.close(np.arange(500), loss, null)
    assert judge.wrong_share == pytest.approx(WRONG, abs=0.05)
    assert judge.verdict.startswith("about ")
    assert judge.credibility[:500][bad].mean() < 0.2 < 0.9 < judge.credibility[:500][~bad].mean()
    assert (judge.credibility[500:] == 1).all(), "those not visited yet"
    later, wrong, _ = window(300, WRONG, seed=1)
    weights = judge.weights(EVERY[:300] + 500, later)
    assert weights[wrong].mean() < 0.2 < 0.9 < weights[~wrong].mean()
    assert weights.min() >= LOWEST


def test_clean_windows_leave_every_weight_at_exactly_one() -> None:
    judge = Judge(500)
    loss, _, null = window(500, 0.0)
    judge.close(np.arange(500), loss, null)
    assert (judge.credibility == 1).all()
    assert (judge.weights(EVERY[:3], np.full(3, 9.0)) == 1).all()
    assert judge.verdict == "no sign of wrong targets"


def test_a_window_of_a_model_that_knows_nothing_changes_no_verdict() -> None:
    judge = Judge(500)
    loss, bad, null = window(500, WRONG)
    judge.close(EVERY, loss, null)
    before = judge.credibility.copy()
    judge.close(EVERY, np.random.default_rng(2).normal(3, 0.5, 500), null)
    np.testing.assert_array_equal(judge.credibility, before)
    weights = judge.weights(EVERY, np.where(bad, 3.0, 0.1))
    assert weights[bad].max() < 0.5, "the last curve goes on deciding, on those never doubted too"
    assert (weights[~bad] == 1).all()


def test_where_nothing_looks_wrong_any_more_only_the_doubted_are_judged_by_the_last_curve() -> None:
    judge = Judge(1000)
    loss, _, null = window(500, WRONG)
    judge.close(EVERY, loss, null)
    doubted = np.flatnonzero(judge.credibility < 0.5)[:6]
    mostly_sound = np.concatenate([doubted, 500 + np.arange(494)])
    later = np.where(np.arange(500) < 3, 3.0, 0.05)  # half of the doubted turn out sound
    judge.close(mostly_sound, later, null)
    assert (judge.credibility[doubted[:3]] < 0.5).all()
    assert (judge.credibility[doubted[3:]] > 0.9).all()
    assert (judge.credibility[500:994] == 1).all()


def test_labels_are_heeded_from_the_second_epoch_on_and_unknown_ones_stand() -> None:
    """Hard samples look wrong until they are learnt; after one epoch none is left out."""
    judge, (loss, bad, null) = LabelVerdicts(500), window(500, WRONG)
    found = from_null(null_percentiles(loss, EVERY * 0, null, np.zeros(400, int)), len(null))
    judge.close(EVERY, found)
    assert (judge.heeded == 1).all()
    judge.close(EVERY[250:], from_null(np.random.default_rng(0).random(250), np.inf))
    np.testing.assert_array_equal(judge.heeded, found.values)
    assert judge.heeded[bad].mean() < 0.2 < 0.9 < judge.heeded[~bad].mean()
    other = LabelVerdicts(500)
    other.load(judge.state())
    np.testing.assert_array_equal(other.heeded, judge.heeded)
    assert other.verdict == judge.verdict


@given(
    st.lists(st.tuples(st.dictionaries(st.integers(0, 5), st.floats(0, 1)), st.booleans()),
             max_size=6)
)  # fmt: skip
def test_draws_go_by_the_first_verdict_after_the_first_window_and_users_are_told_the_mean_of_all(
    windows: list[tuple[dict[int, float], bool]],
) -> None:
    judge = LabelVerdicts(6)
    for found, known in windows:
        values = np.array(list(found.values()))
        share = 0.1 if known else float("nan")
        judge.close(np.array(list(found), dtype=int), Credibility(values, share, ""))
    resumed = LabelVerdicts(6)
    resumed.load(judge.state())
    for of in (judge, resumed):
        for i in range(6):
            said = [
                (w, found[i]) for w, (found, known) in enumerate(windows) if known and i in found
            ]
            later = [c for w, c in said if w > 0]
            first = (later or [c for _, c in said] or [1.0])[0]
            assert of.heeded[i] == (first if len(windows) > 1 else 1.0)
            assert of.told[i] == pytest.approx(np.mean(later) if later else first)
            assert of.judged[i] == bool(said)


@given(st.integers(0, 99), st.floats(0.55, 0.75), st.sampled_from([np.nan, 0.0, 0.4]))
def test_what_a_model_knows_by_heart_alone_is_no_verdict_on_the_others(
    seed: int, learnt: float, random: float
) -> None:
    """At first sight all look like the null; later those learnt by heart do not. Beside trusted
    rows, which it does not know by heart, labels are judged all the same."""
    draws, judge = np.random.default_rng(seed), LabelVerdicts(2000)
    every = np.arange(2000)
    judge.close(every, from_null(draws.random(2000), 2000))
    later = from_null(np.where(every < 2000 * learnt, 0.001, draws.random(2000)), 2000)
    assert later.known
    assert later.wrong_share > 0.2
    judge.random = random
    judge.close(every, later)
    resumed = LabelVerdicts(2000)
    resumed.load(judge.state())
    for of in (judge, resumed):
        assert of.by_heart
        if random > 0:
            np.testing.assert_array_equal(of.told, later.values)
        else:
            assert (of.told == 1).all()
            assert (of.heeded == 1).all()
            assert np.isnan(of.wrong_share)
            assert "by heart" in of.verdict


@given(st.floats(0.0, 1.0), st.floats(0.0, 0.02))
def test_no_sign_of_wrong_labels_is_qualified_where_many_looked_wrong_at_first_sight(
    at_first: float, left: float
) -> None:
    judge, every = LabelVerdicts(1000), np.arange(1000)
    judge.close(every, Credibility(np.ones(1000), np.nan, "", at_first))
    judge.close(every, Credibility(np.full(1000, 1 - left), left, "", left))
    if at_first > LIKE_NULL:
        assert judge.verdict == BY_HEART
    elif judge.wrong_share >= NO_SIGN:
        assert f"about {judge.wrong_share:.0%}" in judge.verdict
    else:
        assert judge.verdict.startswith("no sign of wrong targets")
        assert ("by heart" in judge.verdict) == (at_first > CLEARED)


@given(st.integers(0, 99), st.floats(0.05, 0.4))
def test_the_part_of_a_pool_that_is_like_the_null_is_told_whether_or_not_it_is_judged(
    seed: int, part: float
) -> None:
    draws = np.random.default_rng(seed)
    u = np.where(draws.random(4000) < part, draws.random(4000), 0.01)
    assert from_null(u, 4000).like_null == pytest.approx(part, abs=0.05)
    assert from_null(draws.random(4000), 4000).like_null == pytest.approx(1, abs=0.08)
    hard = np.where(draws.random(4000) < part, 0.5 + draws.random(4000) / 4, 0.01)
    found = from_null(hard, 4000)
    assert not found.known
    assert found.like_null == pytest.approx(2 * part, abs=0.1)


def hard_pairs(null: np.ndarray, sound: float, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Targets that cost as much as the null's after their own inputs; of so many a little more
    after others', of the rest as much on average."""
    random, own = np.random.default_rng(seed), null[:40]
    return own, own + np.where(random.random(40) < sound, 0.3, random.normal(0, 0.3, 40))


def test_a_window_whose_doubted_targets_go_with_their_own_inputs_changes_nothing() -> None:
    judge, (loss, bad, null) = Judge(500), window(500, WRONG)
    judge.close(EVERY, loss, null, lambda: hard_pairs(null, sound=0.9))
    assert (judge.credibility == 1).all()
    assert (judge.weights(EVERY, loss) == 1).all()
    assert judge.verdict.endswith(HARD)
    judge.close(EVERY, loss, null, lambda: hard_pairs(null, sound=0.0))
    assert judge.credibility[bad].mean() < 0.2, "what was not believed once may be later"


def test_pairs_are_asked_for_until_enough_were_doubted() -> None:
    judge, (loss, _, null), asked = Judge(500), window(500, WRONG), []

    def pairs() -> tuple[np.ndarray, np.ndarray]:
        asked.append(judge.doubted)
        return hard_pairs(null, sound=0.0, seed=len(asked))

    for _ in range(9):
        judge.close(EVERY, loss, null, pairs)
        other = Judge(500)
        other.load(judge.state())
        assert (other.doubted, other.cheaper) == (judge.doubted, judge.cheaper)
        judge = other
    assert len(asked) < 9
    assert asked[-1] < SETTLED <= judge.doubted
    before = len(asked)
    Judge(500).close(EVERY, window(500, 0.0)[0], null, pairs)
    assert len(asked) == before, "where nothing is doubted nothing is asked"


@given(st.integers(0, 60), st.data())
def test_doubts_are_believed_by_a_sign_test(doubted: int, data: st.DataObject) -> None:
    cheaper = data.draw(st.integers(0, doubted))
    half = (1 + SOUND) / 2
    chance = sum(
        math.comb(doubted, k) * half**k * (1 - half) ** (doubted - k)
        for k in range(cheaper, doubted + 1)
    )
    assume(abs(chance - 0.01) > 1e-9)
    assert belong(cheaper, doubted) == (chance < 0.01)


def test_the_state_of_a_judge_comes_back_the_same() -> None:
    judge, other = Judge(500), Judge(500)
    loss, _, null = window(500, WRONG)
    judge.close(np.arange(500), loss, null)
    other.load(judge.state())
    np.testing.assert_array_equal(other.weights(EVERY, loss), judge.weights(EVERY, loss))
    np.testing.assert_array_equal(other.credibility, judge.credibility)
    assert other.verdict == judge.verdict


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=30))
def test_inclusion_counts_a_group_of_duplicates_as_one_sample(
    rows: list[tuple[float, int]],
) -> None:
    credibility = np.array([c for c, _ in rows])
    groups = np.array([g for _, g in rows])
    found = inclusion(credibility, groups)
    wanted = np.where(drawable(credibility), 1.0, np.maximum(COMEBACK * credibility, LOWEST))
    np.testing.assert_allclose(found, inclusion_one_by_one(wanted, groups), atol=1e-12)
    for group in set(groups.tolist()):
        assert found[groups == group].sum() <= 1 + 1e-9


@given(st.integers(1, 40), st.floats(0.1, 1), st.integers(0, 9), st.integers(0, 3))
def test_rounds_of_alike_samples_are_permutations(
    samples: int, fraction: float, seed: int, epoch: int
) -> None:
    found = rounds(np.full(samples, 0.3), fraction, seed, epoch)
    assert len(found) == max(1, int(np.ceil(fraction * samples - 1e-9)))
    assert len(set(found.tolist())) == len(found)
    np.testing.assert_array_equal(found, rounds(np.ones(samples), fraction, seed, epoch))


def test_a_round_holds_whom_it_is_to_hold_several_times_so_often_or_once_more() -> None:
    wanted = np.asarray([1.0] * 6 + [2.5] * 2)
    counts = [np.bincount(rounds(np.tile(wanted, 50), 1.0, 0, e), minlength=400) for e in range(50)]
    several = np.tile(wanted, 50) > 1
    assert np.max(counts) == 3
    assert np.max(np.asarray(counts)[:, ~several]) == 1
    ratio = np.mean(counts, axis=0)[several].mean() / np.mean(counts, axis=0)[~several].mean()
    assert ratio == pytest.approx(2.5, rel=0.03)


def test_rounds_hold_samples_as_often_as_their_inclusion_says() -> None:
    wanted = np.array([1.0, 0.5, 0.1, 0.0])
    drawn = np.concatenate([rounds(wanted, 1.0, 0, epoch) for epoch in range(4000)])
    counts = np.bincount(drawn, minlength=4)
    np.testing.assert_allclose(counts / counts[0], wanted, atol=0.05)


def test_windows_grow_with_the_training_to_a_sixth_of_the_pool() -> None:
    ends = window_ends(6000, 12_000, 64)
    sizes = np.diff([0, *ends])
    assert ends[0] == 320
    assert all(end % 64 == 0 for end in ends)
    assert (np.diff(sizes[:-1]) >= -64).all()
    assert sizes.max() <= 1000 + 64
    assert window_ends(100, 250, 10) == [100, 200], "a small pool is one window"


class Doubts(Judge):
    """Says a weight of every sample by its label."""

    def __init__(self, credit: dict[int, float], labels: list[int]) -> None:
        super().__init__(10)
        self.curve, self.credit, self.labels = np.ones(1), credit, labels

    def weights(self, positions: np.ndarray, loss: np.ndarray) -> np.ndarray:
        return np.array([self.credit.get(self.labels[i], 1.0) for i in positions])


def stepped(
    folder: Path, terms: bool, judge: Judge | LabelVerdicts
) -> tuple[OnlineTrainer, dict[str, torch.Tensor]]:
    """A trainer after a step on its first four rows, and the gradients."""
    trainer = trainer_of("bert", folder, True, terms=terms, learning_rate=0.0)
    assert isinstance(trainer, OnlineTrainer)
    trainer.scoring.judge = judge
    trainer.model.train()
    rows: Any = Dataset.from_list([trainer.train_dataset[i] for i in range(4)])
    batch = trainer.data_collator(list(rows))
    trainer._targets = torch.tensor(4.0)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch, torch.tensor(4))
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return trainer, grads


def test_a_doubted_label_is_drawn_less_and_its_loss_is_not_weighed(tmp_path: Path) -> None:
    doubtful = LabelVerdicts(10)
    for _ in range(2):
        doubtful.close(np.arange(4), Credibility(np.zeros(4), 0.4, "about 40%"))
    trainer, gradients = stepped(tmp_path, False, doubtful)
    q = trainer.scoring.inclusion()
    assert q[:4] == pytest.approx(LOWEST_OF_LABELS)
    assert (q[4:] == 1).all()
    _, plain = stepped(tmp_path, False, LabelVerdicts(10))
    assert max(float(gradient.norm()) for gradient in plain.values()) > 0
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("terms", [False, True])
def test_gradients_are_those_of_the_loss_with_every_sample_weighed(
    terms: bool, tmp_path: Path
) -> None:
    """And the recorded norms are the samples' own ones all the same."""
    labels = [int(row) for row in trainer_of("bert", tmp_path, False).train_dataset["labels"][:4]]

    def step(credit: dict[int, float]) -> tuple[OnlineTrainer, dict[str, torch.Tensor]]:
        return stepped(tmp_path, terms, Doubts(credit, labels))

    one = labels[0]
    every, plain = step({})
    some, weighed = step({one: 0.25})
    _, without = step({label: LOWEST for label in labels if label != one})
    part = {n: (without[n] - LOWEST * plain[n]) / (1 - LOWEST) for n in plain}
    for name, gradient in weighed.items():
        expected = plain[name] - 0.75 * part[name]
        assert (gradient - expected).norm() <= 1e-4 * plain[name].norm() + 1e-8, name
    if terms:
        for trainer in (every, some):
            trainer.visits.settle()
        norms = [trainer.visits.column("gradient_norm") for trainer in (every, some)]
        np.testing.assert_allclose(*norms, rtol=1e-4)


@pytest.mark.parametrize("wrong", [0, 3])
def test_the_model_card_says_what_was_left_out_and_why(wrong: int, tmp_path: Path) -> None:
    scores = unscored(np.arange(40), 1.0, 0, "about 8% of the targets look wrong")
    credibility = np.where(np.arange(40) < wrong, 0.01, 1.0)
    replace(scores, credibility=credibility).to_parquet(tmp_path / "scores.parquet")
    said = dropped_line(tmp_path / "scores.parquet")
    counted = "3 of its 40 samples were left out or seldom drawn"
    assert said.strip().startswith(counted if wrong else "None of its samples was left out")
    assert "about 8% of the targets look wrong." in said
    assert dropped_line(tmp_path / "none.parquet") == ""
