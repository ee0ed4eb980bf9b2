"""Class labels judged twice, by the permutation null and by the model's own predictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from test_quality import predicted
from tsqlora.credibility import ENOUGH, drawable, from_agreement
from tsqlora.losses import CLASSIFICATION
from tsqlora.measurements import Measurements
from tsqlora.null import NULL_SAMPLES, null_of_outputs, others
from tsqlora.quality import credibility

CLASSES = 6


def judged(
    samples: int, share: float, systematic: bool, seed: int, near: float = 0.0
) -> tuple[Measurements, np.ndarray]:
    """A pool whose model knows the task fairly well, and which of its labels are wrong.

    Wrong labels are any other class, or always the next one, whose logit is raised by `near`.
    """
    random = np.random.default_rng(seed)
    true = random.integers(0, CLASSES, samples)
    logits = random.normal(size=(samples, CLASSES))
    logits[np.arange(samples), true] += random.gamma(4.0, 1.0, samples)
    logits[np.arange(samples), (true + 1) % CLASSES] += near
    wrong = random.random(samples) < share
    away = np.ones(samples, int) if systematic else random.integers(1, CLASSES, samples)
    label = np.where(wrong, (true + away) % CLASSES, true)
    known = log_softmax(logits, axis=1)
    mismatched = label[others(label, random)]
    best = np.sort(known, axis=1)
    rows, nothing = np.arange(samples), np.full(samples, np.nan)
    pool = Measurements(
        ids=rows,
        loss=-known[rows, label],
        gradient_norm=nothing,
        loss_reduction=nothing,
        sketch=np.zeros((samples, 0)),
        length=np.ones(samples, dtype=np.int64),
        group=label,
        null_loss=-known[rows, mismatched],
        null_group=mismatched,
        confidence=best[:, -1] - best[:, -2],
        agrees=known.argmax(1) == label,
        predicted=known.argmax(1),
        classes=CLASSES,
    )
    return pool, wrong


@pytest.mark.parametrize(
    ("share", "systematic"), [(0.1, False), (0.2, False), (0.4, False), (0.1, True), (0.2, True)]
)
def test_of_the_sound_labels_about_a_twentieth_is_lost_however_the_others_are_wrong(
    share: float, systematic: bool
) -> None:
    lost, found = [], []
    for seed in range(5):
        pool, wrong = judged(3000, share, systematic, seed)
        left_out = ~drawable(credibility(pool).values)
        lost.append(left_out[~wrong].mean())
        found.append(left_out[wrong].mean())
    assert np.mean(lost) < 0.06
    assert np.mean(found) > 0.8


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_labels_taken_for_a_class_that_the_model_leans_to_are_found_by_what_it_contradicts(
    share: float,
) -> None:
    lost, found, by_null = [], [], []
    for seed in range(5):
        pool, wrong = judged(3000, share, True, seed, near=2.0)
        alone = replace(pool, agrees=np.zeros(0, dtype=bool), confidence=np.zeros(0))
        left_out = ~drawable(credibility(pool).values)
        lost.append(left_out[~wrong].mean())
        found.append(left_out[wrong].mean())
        by_null.append((~drawable(credibility(alone).values))[wrong].mean())
    assert np.mean(lost) < 0.06
    assert np.mean(found) > 1.3 * np.mean(by_null)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_both_judges_together_tell_what_part_of_the_labels_is_like_the_null(share: float) -> None:
    pool, _ = judged(3000, share, False, 0)
    alike = share / (1 - share / (CLASSES - 1))
    assert credibility(pool).like_null == pytest.approx(alike, rel=0.2)


@given(st.integers(0, 2**31), st.floats(0.03, 0.3), st.floats(0, 0.5))
@settings(max_examples=30)
def test_what_the_null_explains_is_not_doubted_again(
    seed: int, share: float, explained: float
) -> None:
    confidence, agrees, _ = predicted(1000, share, 2.5, seed)
    alone = from_agreement(confidence, agrees, classes=2)
    beside = from_agreement(confidence, agrees, 2, explained)
    assert (beside >= alone).all()
    assert (beside[agrees] == 1).all()
    assert (from_agreement(confidence, agrees, 2, explained=1.0) == 1).all()


@dataclass(frozen=True)
class Outputs:
    """Log-probabilities of a pool (N, C) and its labels (N), as they are measured."""

    known: np.ndarray
    label: np.ndarray

    @property
    def names(self) -> list[str]:
        return ["label", "output"]

    def column(self, name: str) -> np.ndarray:
        return self.label

    def blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for some in np.array_split(np.arange(len(self.label)), 3):
            yield some, self.known[some]


def uneven(counts: list[int], skill: float, wrong: float, seed: int) -> tuple[Outputs, np.ndarray]:
    """A model of some `skill` that knows how common classes of these `counts` are; which labels are
    wrong."""
    random = np.random.default_rng(seed)
    true = np.repeat(np.arange(len(counts)), counts)
    logits = np.log(np.array(counts) / len(true)) + random.normal(0, 0.3, (len(true), len(counts)))
    logits[np.arange(len(true)), true] += skill
    flipped = random.random(len(true)) < wrong
    label = np.where(flipped, (true + 1) % len(counts), true)
    return Outputs(log_softmax(logits, axis=1), label), flipped


def doubted(pool: Outputs) -> np.ndarray:
    """Which labels are not drawn, by both judges."""
    rows, nothing = np.arange(len(pool.label)), np.full(len(pool.label), np.nan)
    null_loss, null_group = null_of_outputs(pool, CLASSIFICATION, 0)
    best = np.sort(pool.known, axis=1)
    measured = Measurements(
        ids=rows,
        loss=-pool.known[rows, pool.label],
        gradient_norm=nothing,
        loss_reduction=nothing,
        sketch=np.zeros((len(rows), 0)),
        length=np.ones(len(rows), dtype=np.int64),
        group=pool.label,
        null_loss=null_loss,
        null_group=null_group,
        confidence=best[:, -1] - best[:, -2],
        agrees=pool.known.argmax(1) == pool.label,
        predicted=pool.known.argmax(1),
        classes=pool.known.shape[1],
    )
    return ~drawable(credibility(measured).values)


@pytest.mark.parametrize(
    "counts", [[270, 30], [965, 35], [2000, 39], [300, 20, 20], [100, 25, 25], [67, 33], [30] * 5]
)
def test_a_model_that_knows_how_common_classes_are_and_no_more_doubts_no_label(
    counts: list[int],
) -> None:
    for seed in range(5):
        pool, _ = uneven(counts, skill=0.0, wrong=0.0, seed=seed)
        assert not doubted(pool).any()


@pytest.mark.parametrize("counts", [[300, 20, 20], [100, 25, 25], [30] * 5, [1000, 300, 30]])
def test_wrong_labels_are_found_beside_rare_classes_too(counts: list[int]) -> None:
    found, lost = [], []
    for seed in range(5):
        pool, wrong = uneven(counts, skill=6.0, wrong=0.1, seed=seed)
        left_out = doubted(pool)
        found.append(left_out[wrong].mean())
        lost.append(left_out[~wrong].mean())
    assert np.mean(found) > 0.5
    assert np.mean(lost) < 0.06


@given(st.lists(st.integers(1, 90), min_size=2, max_size=4), st.integers(0, 99))
@settings(max_examples=30)
def test_the_null_of_a_rare_class_is_what_every_other_sample_would_cost_in_it(
    counts: list[int], seed: int
) -> None:
    pool, _ = uneven(counts, skill=1.0, wrong=0.2, seed=seed)
    assert len(pool.label) <= NULL_SAMPLES
    losses, named = null_of_outputs(pool, CLASSIFICATION, seed)
    for k in np.unique(pool.label):
        mine = np.sort(losses[named == k])
        whole = np.sort(
            [-row[k] for row, own in zip(pool.known, pool.label, strict=True) if own != k]
        )
        assert len(mine) == len(whole) if len(mine) < ENOUGH else len(mine) <= len(whole)
        if len(mine) == len(whole):
            np.testing.assert_allclose(mine, whole, rtol=1e-5, atol=1e-6)
