"""Class labels judged twice, by the permutation null and by the model's own predictions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from test_quality import predicted
from tsqlora.credibility import drawable, from_agreement
from tsqlora.measurements import Measurements
from tsqlora.null import others
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
