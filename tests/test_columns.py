"""Columns on disk: the same numbers as in memory, whatever the size of a block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import all_terms
from tsqlora import columns
from tsqlora.batches import _plan
from tsqlora.columns import column, copied, distinct, in_python, kept, release
from tsqlora.global_batches import RandomOrder
from tsqlora.measurements import Measurements
from tsqlora.null import others
from tsqlora.quality import QualityScores, quality_scores
from tsqlora.selection import draw, drawn

seeds = st.integers(0, 10**6)


@contextmanager
def on_disk(rows: int) -> Iterator[None]:
    """Every column in a file of its own, worked on so many rows at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "SMALL", 0)
        patch.setattr(columns, "ROWS", rows)
        yield


def test_a_large_column_keeps_its_numbers_when_its_pages_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = column(100_000, np.float64, fill=2)
    made[::7] = np.arange(len(made[::7]))
    before = np.array(made)
    release()
    assert made.tobytes() == before.tobytes()
    assert list(tmp_path.iterdir()) == [], "nothing to clean up, whatever happens"


@settings(max_examples=30)
@given(seed=seeds, samples=st.integers(0, 60), rows=st.integers(1, 9))
def test_what_is_done_in_blocks_is_what_numpy_does_at_once(
    seed: int, samples: int, rows: int
) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(0, 9, samples).astype(np.float32)
    which = random.random(samples) < 0.4
    with on_disk(rows):
        assert kept(values, which, np.float64).tolist() == values[which].tolist()
        assert copied(values).tolist() == values.tolist() == list(in_python(values))
        assert distinct(values).tolist() == np.unique(values).tolist()


def pool(seed: int, samples: int, wrong: float) -> Measurements:
    """A pool of two classes, some of whose losses look like those of wrong targets."""
    random = np.random.default_rng(seed)
    low, high = random.exponential(0.2, samples), random.exponential(0.7, samples) + 0.5
    group = random.integers(0, 2, samples).astype(np.int32)
    return Measurements(
        ids=np.arange(samples),
        loss=np.where(random.random(samples) < wrong, high, low).astype(np.float32),
        gradient_norm=random.lognormal(size=samples).astype(np.float32),
        loss_reduction=random.normal(size=samples).astype(np.float32),
        sketch=random.normal(size=(samples, 5)).astype(np.float32),
        length=random.integers(1, 9, samples).astype(np.int32),
        group=group,
        null_loss=high.astype(np.float32),
        null_group=1 - group,
        confidence=random.normal(1, 1, samples).astype(np.float32),
        agrees=random.random(samples) > wrong,
        predicted=random.integers(0, 2, samples),
        classes=2,
        kin=group,
    )


@settings(max_examples=20, deadline=None)
@given(
    seed=seeds,
    samples=st.integers(1, 200),
    wrong=st.sampled_from([0.0, 0.2, 0.5]),
    rows=st.integers(1, 50),
)
def test_scores_do_not_depend_on_the_blocks(
    seed: int, samples: int, wrong: float, rows: int
) -> None:
    measured = pool(seed, samples, wrong)
    expected = quality_scores(measured, all_terms())
    with on_disk(rows):
        found = quality_scores(measured, all_terms())
        partners = others(measured.group, np.random.default_rng(seed))
    for each in (f.name for f in fields(QualityScores) if f.compare):
        np.testing.assert_array_equal(getattr(found, each), getattr(expected, each), each)
    if len(set(measured.group)) == 2:
        assert (measured.group[partners] != measured.group).all()


@settings(max_examples=50)
@given(
    seed=seeds,
    samples=st.integers(1, 80),
    fraction=st.floats(0.01, 1),
    possible=st.floats(0, 1),
    rows=st.integers(1, 9),
)
def test_what_is_drawn_is_what_the_draw_holds(
    seed: int, samples: int, fraction: float, possible: float, rows: int
) -> None:
    random = np.random.default_rng(seed)
    probability = np.where(random.random(samples) < possible, random.random(samples), 0.0)
    expected = draw(probability, fraction, seed)
    with on_disk(rows):
        assert np.flatnonzero(drawn(probability, fraction, seed)).tolist() == sorted(set(expected))
        np.testing.assert_array_equal(draw(probability, fraction, seed), expected)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 40), max_size=60), rows=st.integers(1, 9))
def test_the_plan_is_in_the_order_of_a_stable_sort(lengths: list[int], rows: int) -> None:
    tokens = np.array(lengths, dtype=np.int32)
    with on_disk(rows):
        plan = _plan(tokens, 100)
    taken = np.concatenate([np.zeros(0, dtype=np.int64), *plan])
    np.testing.assert_array_equal(taken, np.argsort(-tokens, kind="stable"))


@pytest.mark.parametrize("samples", [1, 10, 70_000])
def test_the_random_order_is_the_one_that_accelerate_gives(samples: int) -> None:
    theirs = SeedableRandomSampler(range(samples), data_seed=3)
    ours = RandomOrder(samples, 3)
    for epoch in range(2):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)
    assert isinstance(next(iter(ours)), int)
    assert torch.tensor(list(ours)).sort().values.tolist() == list(range(samples))
