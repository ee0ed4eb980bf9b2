"""Rare classes are drawn more often: by how much, and that nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from reference import raised_one_by_one
from runs import class_rows, classification_run, write_rows
from tiny import collate
from tsqlora import QualityScores
from tsqlora.config import QualityConfig, RunConfig
from tsqlora.credibility import Credibility
from tsqlora.losses import CLASSIFICATION, REGRESSION
from tsqlora.online import OnlineScorer
from tsqlora.pipeline import Run
from tsqlora.rare_classes import FLOOR, MOST, raised
from tsqlora.scoring import Scorer
from tsqlora.selection import rounds

CLASSES = st.lists(st.tuples(st.integers(-1, 4), st.floats(0.05, 1)), min_size=1, max_size=60)


@given(samples=CLASSES)
def test_classes_are_raised_as_one_by_one(samples: list[tuple[int, float]]) -> None:
    classes, shares = zip(*samples, strict=True)
    expected = raised_one_by_one(shares, classes, FLOOR, MOST)
    np.testing.assert_allclose(raised(np.array(shares), np.array(classes)), expected)


@given(samples=CLASSES)
def test_no_class_stays_below_half_of_an_even_share_but_where_four_times_are_too_few(
    samples: list[tuple[int, float]],
) -> None:
    classes, shares = np.array([c for c, _ in samples]), np.array([s for _, s in samples])
    found = raised(shares, classes)
    assert ((found >= 1) & (found <= MOST)).all()
    least = FLOOR * shares.sum() / len(np.unique(classes))
    for name in np.unique(classes):
        own = classes == name
        now = float((found * shares)[own].sum())
        assert now >= least * (1 - 1e-9) or (found[own] == MOST).all()
        if shares[own].sum() >= least * (1 + 1e-9):
            assert (found[own] == 1).all()  # common ones are left as they are


def scorer_of(labels: np.ndarray, kind: str = CLASSIFICATION, **quality: str) -> OnlineScorer:
    texts = {"input_ids": [[1, i, i * i % 97, i % 7] for i in range(len(labels))]}
    rows = Dataset.from_dict({"id": range(len(labels)), **texts, "labels": labels})
    settings = QualityConfig(mode="online", **{"duplicates": "all", **quality})  # type: ignore
    return OnlineScorer(Scorer(collate, settings), rows, kind)


LABELS = np.array([0] * 100 + [1] * 90 + [2] * 10)


def test_a_rare_class_is_drawn_as_often_as_its_part_says() -> None:
    scorer = scorer_of(LABELS)
    times = np.zeros(len(LABELS))
    for epoch in range(300):
        np.add.at(times, rounds(scorer.inclusion(), 1.0, 0, epoch), 1)
    part = FLOOR * 200 / 3 / 10
    assert times[LABELS == 2].mean() / times[LABELS < 2].mean() == pytest.approx(part, rel=0.03)
    assert times.sum() == 300 * len(LABELS)


def test_a_doubted_label_of_a_rare_class_is_drawn_less_all_the_same() -> None:
    scorer = scorer_of(LABELS)
    credible = np.where(np.arange(len(LABELS)) == 196, 0.0, 1.0)
    for _ in range(2):
        scorer.judge.close(np.arange(len(LABELS)), Credibility(credible, 0.1, ""))  # type: ignore
    q = scorer.inclusion()
    assert q[196] < 0.2
    assert (q[[195, 197, 198, 199]] > 3).all()


def test_copies_do_not_make_a_class_common() -> None:
    labels = np.array([0] * 60 + [1] * 60)
    texts = [[1, *range(10 * i, 10 * i + 9)] for i in [*range(60), *([99] * 60)]]
    rows = Dataset.from_dict({"id": range(120), "input_ids": texts, "labels": labels})
    scorer = OnlineScorer(Scorer(collate, QualityConfig(mode="online")), rows, CLASSIFICATION)
    q = scorer.inclusion()
    np.testing.assert_allclose(q[:60], 1.0)
    assert q[60:].sum() == pytest.approx(MOST)  # one text, drawn four times for once


@pytest.mark.parametrize(
    "scorer",
    [
        scorer_of(LABELS, rare_classes="as_found"),
        scorer_of(LABELS % 2),
        scorer_of(LABELS.astype(float), REGRESSION),
    ],
    ids=["as_found", "even classes", "numbers"],
)
def test_nothing_is_raised_where_it_is_not_asked_for_and_where_no_class_is_rare(
    scorer: OnlineScorer,
) -> None:
    assert (scorer.inclusion() == 1).all()


def test_a_run_says_that_rare_classes_come_more_often_and_shows_it_in_its_scores(
    tmp_path: Path,
) -> None:
    config = classification_run(tmp_path, quality={"mode": "online", "duplicates": "all"})
    rows = class_rows(200)
    rare = [row for row in rows if row["label"] == "class 2"]
    rows = [row for row in rows if row["label"] != "class 2"] + rare[:10]
    write_rows(tmp_path / "train.jsonl", rows)
    run = Run.start(RunConfig.from_yaml(config))
    run.train()
    scores = QualityScores.from_parquet(run.folder.scores)
    often = FLOOR * len(rows) / 3 / 10
    assert f"rare classes come up to {often:.1f} times as often" in scores.verdict
    probability = scores.probability / scores.credibility
    assert probability[-10:].mean() / probability[:-10].mean() == pytest.approx(often, rel=0.2)
