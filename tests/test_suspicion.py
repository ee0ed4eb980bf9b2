"""Where the losses of a text do not tell, a few pairs say whether some of it is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runs import causal_run
from test_pairs import texts
from tsqlora import QualityScores
from tsqlora.online import OnlineScorer
from tsqlora.pairs import contrast
from tsqlora.pipeline import train
from tsqlora.suspicion import SETTLED, SUSPECT, Suspicion


@given(st.integers(0, 200), st.data())
def test_a_suspicion_is_confirmed_by_a_sign_test(asked: int, data: st.DataObject) -> None:
    suspicion, half = Suspicion(), SUSPECT / 2
    suspicion.asked, suspicion.above = asked, data.draw(st.integers(0, asked))
    chance = sum(
        math.comb(asked, k) * half**k * (1 - half) ** (asked - k)
        for k in range(suspicion.above, asked + 1)
    )
    assume(abs(chance - 0.01) > 1e-9)
    assert suspicion.confirmed == (chance < 0.01)


@pytest.mark.parametrize(
    ("wrong", "clear", "found"), [(0.3, 0.4, True), (0, 0.4, False), (0, 0, False)]
)
def test_what_a_few_pairs_say_is_heard_once_the_model_knows_the_task(
    wrong: float, clear: float, found: bool
) -> None:
    suspicion, knows = Suspicion(), clear > 0
    own, mismatched, _ = texts(600, wrong, 1, clear)
    for t in np.split(contrast(own, mismatched), 10):
        suspicion.add(t)
        other = Suspicion()
        other.load(suspicion.state())
        assert (other.asked, other.above) == (suspicion.asked, suspicion.above)
        suspicion = other
    assert suspicion.confirmed == found
    assert suspicion.share == pytest.approx(wrong, abs=0.08)
    assert suspicion.asked == 600 * knows
    assert suspicion.settled == (suspicion.asked >= SETTLED)


def test_a_run_tells_users_of_wrong_targets_that_it_cannot_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    found = OnlineScorer._of_pairs

    def wrong_ones(self: OnlineScorer, *how: int, own: bool = False) -> np.ndarray:
        losses = found(self, *how, own=own)
        asked.append(own)
        cost, others, _ = texts(len(losses), 0.4, seed=0)
        return cost if own else others

    monkeypatch.setattr(OnlineScorer, "_of_pairs", wrong_ones)
    monkeypatch.setattr("tsqlora.suspicion.SETTLED", 60)
    config = causal_run(tmp_path, 100, **{"quality.mode": "online", "training.num_train_epochs": 9})
    folder = train(config)
    scores = QualityScores.from_parquet(folder / "scores.parquet")
    assert "of them go with other inputs as well; `tsqlora score` finds out" in scores.verdict
    assert (scores.credibility == 1).all()
    assert 0 < sum(asked) < len(asked) / 2, "once it is settled nothing is asked for"
