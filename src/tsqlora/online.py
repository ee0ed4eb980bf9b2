"""Scores from the training itself: what follows from the last measurement of every sample.

In the first epoch all samples are drawn alike, near-duplicates as one and rare classes more often
(`rare_classes.py`). Windows of visits, of labels whole epochs, judge the targets (`judging.py`),
and every next epoch is drawn by that: where no gradient term is asked for, each sample is in a
round of the draw with probability q_i (`judging.inclusion`); else samples are drawn by p_i of
`quality.py` times their share among duplicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache

import numpy as np
from datasets import Dataset
from torch import nn

from tsqlora import processes
from tsqlora.credibility import ENOUGH, Credibility, null_percentiles, share_of_wrong
from tsqlora.duplicates import near_duplicates
from tsqlora.judging import (
    LEAST,
    Judge,
    LabelVerdicts,
    Verdicts,
    inclusion,
    window_size,
)
from tsqlora.losses import CLASSIFICATION
from tsqlora.measurements import Measurements
from tsqlora.measuring import Columns
from tsqlora.null import FREE, NULL_SAMPLES, null_of_pairs
from tsqlora.pairs import contrast
from tsqlora.quality import (
    Floats,
    QualityScores,
    credibility,
    quality_scores,
    tempered,
)
from tsqlora.rare_classes import raised
from tsqlora.scoring import Scorer
from tsqlora.selection import draw_size, drawn, unscored
from tsqlora.suspicion import Suspicion
from tsqlora.trusted import UNKNOWN, halves, random_share
from tsqlora.visits import Visits, Window

NULL_SHARE = 20
"""In each window, one mismatched pair for so many visits shows what wrong targets cost."""
SUSPECTED = (
    "targets are not judged: their losses do not tell, but about {share:.0%} of them go with other "
    "inputs as well; `tsqlora score` finds out which"
)
UNPAIRED = (
    "targets are not judged: no input can be paired with another one's target, as in plain text"
)
NULL_WINDOWS = 2
"""Pairs of so many last windows make generation's null."""


def null_pairs(window: int) -> int:
    """Mismatched pairs of generation's null, taken in each window of so many visits."""
    return min(NULL_SAMPLES, max(ENOUGH, window // NULL_SHARE))


class OnlineScorer:
    """Scores a pool by its visits, under the model that is being trained.

    Attributes:
        scorer: how.
        kind: the model's.
        judge: what is thought of the targets.
        suspicion: what a few pairs say of them where the judge cannot (generation).
        duplicates: the group of near-duplicates of each sample (N).
        raised: how many times as often a sample is drawn as its class is rare (N).
        spent: passes of its own that scoring has taken so far.
        pool: how many samples are judged; those after them are trusted (`trusted.py`).
        shown, control: the two halves of the trusted ones' positions.
    """

    def __init__(self, scorer: Scorer, rows: Dataset, kind: str, trusted: int = 0) -> None:
        self.scorer, self.rows, self.kind = scorer, rows, kind
        self.pool, self.trusted = len(rows) - trusted, trusted
        self.shown, self.control = halves(len(rows), trusted, scorer.seed)
        self.judge: Judge | LabelVerdicts = (
            LabelVerdicts(len(rows), trusted) if kind in FREE else Judge(len(rows), trusted)
        )
        once = scorer.quality.duplicates == "once" and "input_ids" in rows.column_names
        self.duplicates = near_duplicates(rows) if once else np.arange(len(rows))
        self.raised = self._raised()
        self.spent, self._ends = 0.0, self._window(0)
        self._pairs: list[np.ndarray] = []
        self.suspicion = Suspicion()

    def _raised(self) -> np.ndarray:
        alike, asked = np.ones(len(self.rows)), self.scorer.quality.rare_classes == "raised"
        if not asked or self.kind != CLASSIFICATION or "labels" not in self.rows.column_names:
            return alike
        return raised(inclusion(alike, self.duplicates), np.asarray(self.rows["labels"]))

    def _window(self, visits: int) -> int:
        """Visits in the window that begins after so many."""
        samples = len(self.rows)
        if self.kind in FREE:
            return draw_size(samples, self.scorer.quality.fraction)
        return window_size(samples, visits)

    def window_is_over(self, visits: int) -> bool:
        """Whether a window has ended after so many visits; the next one begins then."""
        if visits < self._ends:
            return False
        self._ends = visits + self._window(visits)
        return True

    def close_window(self, visits: Visits, model: nn.Module) -> None:
        """Judge what was visited since the last time, once it is enough; alike in all processes.

        Of a small pool's labels a half is, as near-duplicates leave each other out of a round.
        """
        least = min(LEAST, self._window(0) // 2) if self.kind in FREE else ENOUGH
        taken = visits.take_window(least)
        if taken is None:
            return
        positions, window = taken
        judge, ours = self.judge, positions < self.pool
        if isinstance(judge, LabelVerdicts):
            judge.random, judge.scale, found = processes.from_main(
                lambda: self._of_labels(judge, positions, window, model)
            )
            judge.close(positions[ours], found)
            return
        positions, losses = positions[ours], window.column("loss")[ours]
        drawn_by = self.scorer.seed + judge.windows, null_pairs(len(positions))
        wrong = self._of_pairs(*drawn_by, model)
        self._pairs = [*self._pairs, wrong][-NULL_WINDOWS:]
        own = cache(lambda: self._of_pairs(*drawn_by, model, own=True))
        said = judge.close(positions, losses, np.concatenate(self._pairs), lambda: (own(), wrong))
        if not (said or judge.acting or self.suspicion.settled):
            self.suspicion.add(contrast(own(), wrong))

    def _of_labels(
        self, judge: LabelVerdicts, positions: np.ndarray, window: Window, model: nn.Module
    ) -> tuple[float, float, Credibility]:
        """ρ, if not known before beside the control, what c is scaled by, and the verdicts."""
        ours = np.flatnonzero(positions < self.pool)
        rows = self.rows.select(positions[ours])
        found = self.scorer.measurements(window.at(ours), model, rows, True)
        random, scale, here = judge.random, judge.scale, judge.random_among(positions[ours])
        if self.trusted and np.isnan(random):
            random = here = self._random(positions, window, found)
            if random > 0:
                scale = (1 - share_of_wrong(random, found.classes)) / (1 - random)
        return random, scale, credibility(found, random=here)

    def _random(self, positions: np.ndarray, window: Window, pool: Measurements) -> float:
        """ρ of a window's samples of the pool beside those of the control."""
        null = pool.null_loss, pool.null_group
        seen = window.at(np.isin(positions, self.control))
        loss, label = seen.column("loss"), seen.column("label")
        group = label if self.kind == CLASSIFICATION else np.zeros(len(label), np.int32)
        u = null_percentiles(pool.loss, pool.group, *null)
        return random_share(u, null_percentiles(loss, group, *null))

    def _of_pairs(self, seed: int, most: int, model: nn.Module, own: bool = False) -> np.ndarray:
        """Losses of mismatched pairs (M), or of their targets after their `own` inputs."""
        how = self.scorer.collator, self.scorer.batch_size or 1, seed, most

        def losses() -> np.ndarray:
            with self.scorer.autocast(model):
                return null_of_pairs(model, self.kind, self.rows, *how, dropout=True, own=own)[0]

        found = processes.from_main(losses)
        self.spent += 0.5 * len(found)
        return found

    def inclusion(self) -> np.ndarray:
        """How often each sample is in a round of the next epoch (N): q_i, of trusted ones k q_i."""
        found = inclusion(self.judge.heeded, self.duplicates, self.judge.lowest) * self.raised
        if not isinstance(self.judge, LabelVerdicts) or self.trusted == 0:
            return found
        if np.isnan(self.judge.random):
            found[self.shown] *= UNKNOWN
        else:
            found[self.pool :] *= self.judge.worth
        return found

    def scores(self, visits: Visits, model: nn.Module) -> QualityScores:
        """The scores of all N samples; terms of those never visited are NaN."""
        quality, seed, ids = self.scorer.quality, self.scorer.seed, np.asarray(self.rows["id"])
        seen = visits.seen
        if len(seen) == 0:
            return unscored(ids, quality.fraction, seed, "no sample was scored")
        pool = self.scorer.measurements(visits, model, self.rows.select(seen), False)
        scores = _spread(quality_scores(pool, quality), seen, ids, self.judge)
        if self.suspicion.confirmed and not self.judge.judged.any():
            said = SUSPECTED.format(share=self.suspicion.share)
            scores = replace(scores, verdict=said)
        if self._pairs and not any(map(len, self._pairs)):
            scores = replace(scores, verdict=UNPAIRED)
        if (most := self.raised.max()) > 1:
            said = f"{scores.verdict}; rare classes come up to {most:.1f} times as often"
            scores = replace(scores, verdict=said)
        probability = self.inclusion()
        if self.scorer.wanted.terms:
            acted = self.judge.heeded
            shared = probability / np.maximum(acted, 1e-12)
            probability = shared * tempered(scores.quality, acted, quality.temperature)
        probability = probability / probability.sum()
        selected = drawn(probability, quality.fraction, seed)
        return replace(scores, probability=probability, selected=selected)

    def state(self) -> Columns:
        """What a resumed training needs beside the visits."""
        pairs = {f"pairs.{i}": losses for i, losses in enumerate(self._pairs)}
        numbers = np.asarray([self.spent, self._ends], dtype=np.float64)
        return {**self.judge.state(), **self.suspicion.state(), **pairs, "scoring": numbers}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Put `state` back."""
        self.judge.load(state)
        self.suspicion.load(state)
        self.spent, self._ends = float(state["scoring"][0]), int(state["scoring"][1])
        kept = sum(key.startswith("pairs.") for key in state)
        self._pairs = [state[f"pairs.{i}"] for i in range(kept)]


def first_of(scores: QualityScores, samples: int) -> QualityScores:
    """The scores of the first so many, without the trusted rows that come after them."""
    arrays = {f.name: getattr(scores, f.name) for f in fields(scores)}
    kept = {name: a[:samples] for name, a in arrays.items() if isinstance(a, np.ndarray)}
    probability = kept["probability"] / kept["probability"].sum()
    return replace(scores, **{**kept, "probability": probability})


def _spread(
    found: QualityScores, seen: np.ndarray, ids: np.ndarray, judge: Verdicts
) -> QualityScores:
    """The scores of those seen among all; the others have the highest quality."""

    def whole(values: Floats, fill: float) -> Floats:
        result = np.full(len(ids), fill)
        result[seen] = values
        return result

    def predicted() -> np.ndarray | None:
        if found.prediction is None:
            return None
        numbers = np.issubdtype(found.prediction.dtype, np.floating)
        result = np.full(len(ids), np.nan if numbers else -1, found.prediction.dtype)
        result[seen] = found.prediction
        return result

    missed = len(ids) - len(seen)
    verdict = judge.verdict + (
        f"; {missed:,} of {len(ids):,} samples were never drawn" * bool(missed)
    )
    return replace(
        found,
        ids=ids,
        loss=whole(found.loss, np.nan),
        gradient_norm=whole(found.gradient_norm, np.nan),
        loss_reduction=whole(found.loss_reduction, np.nan),
        convergence=whole(found.convergence, np.nan),
        credibility=judge.told,
        wrong_share=judge.wrong_share,
        quality=whole(found.quality, found.quality.max()),
        prediction=predicted(),
        verdict=verdict,
    )
