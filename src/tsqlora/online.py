"""Scores from the training itself: the last measurement of every sample, and what follows from it.

In the first epoch all samples are drawn alike. After each, those that were ever drawn are scored by
`quality.py` from their last visit's loss, gradient norm and sketch; those that never were have the
highest score and full credibility. The next epoch is drawn by that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from datasets import Dataset
from torch import nn

from tsqlora import processes
from tsqlora.collected import FINITE
from tsqlora.credibility import ENOUGH
from tsqlora.losses import infer_kind
from tsqlora.measuring import Columns
from tsqlora.null import FREE, NULL_SAMPLES
from tsqlora.quality import Floats, QualityScores, quality_scores, tempered
from tsqlora.scoring import Scorer
from tsqlora.selection import draw_size, drawn, unscored

POSITION = "position"
"""The column that holds a sample's row in the pool."""
NULL_SHARE = 20
"""Once an epoch, one mismatched pair for so many samples drawn shows what wrong targets cost."""


def null_pairs(drawn: int) -> int:
    """Mismatched pairs of generation's null, taken once an epoch of so many samples."""
    return min(NULL_SAMPLES, max(ENOUGH, drawn // NULL_SHARE))


class Visits:
    """What was measured of each of N samples when it was last trained on.

    `names`, `column` and `blocks` show those that ever were, in the pool's order.

    Attributes:
        last: 1 + the epoch of the last visit (N), 0 where there was none.
    """

    def __init__(self, samples: int) -> None:
        self.last = np.zeros(samples, dtype=np.int32)
        self._columns: Columns = {}
        self._fresh: list[tuple[int, Columns]] = []

    def add(self, epoch: int, columns: Columns) -> None:
        """Note a batch, whose `position` is among its columns; what is not finite is left out."""
        finite = np.all([np.isfinite(columns[name]) for name in FINITE], axis=0)
        self._fresh.append((epoch, {name: values[finite] for name, values in columns.items()}))

    def settle(self) -> None:
        """Take in what all processes have noted since the last time, in their order."""
        fresh, self._fresh = self._fresh, []
        for noted in processes.gather(fresh):
            for epoch, columns in noted:
                self._put(epoch + 1, columns)

    def _put(self, stamp: int, columns: Columns) -> None:
        positions = columns[POSITION]
        self.last[positions] = stamp
        for name, values in columns.items():
            if name not in self._columns:
                shape = (len(self.last), *values.shape[1:])
                self._columns[name] = np.zeros(shape, values.dtype)
            self._columns[name][positions] = values

    @property
    def seen(self) -> np.ndarray:
        """Positions in the pool of the samples that were visited."""
        return np.flatnonzero(self.last)

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self._columns)

    def column(self, name: str) -> np.ndarray:
        """A column of the samples seen."""
        return self._columns[name][self.seen].astype(np.float64)

    def blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same at once."""
        yield np.arange(len(self.seen)), self._columns[name][self.seen]

    def state(self) -> Columns:
        """All of it as arrays, those of the samples seen."""
        seen = self.seen
        columns = {f"column.{name}": values[seen] for name, values in self._columns.items()}
        return {"last": self.last, **columns}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Put `state` back."""
        self.last, self._columns, self._fresh = state["last"].copy(), {}, []
        named = {k.removeprefix("column."): v for k, v in state.items() if k.startswith("column.")}
        for name, values in named.items():
            whole = np.zeros((len(self.last), *values.shape[1:]), values.dtype)
            whole[self.seen] = values
            self._columns[name] = whole


class OnlineScorer:
    """Scores a pool by its visits, under the model that is being trained.

    Attributes:
        scorer: how; of generation with fewer mismatched pairs than before a training.
        spent: passes of its own that scoring has taken so far.
    """

    def __init__(self, scorer: Scorer, rows: Dataset) -> None:
        pairs = null_pairs(draw_size(len(rows), scorer.quality.fraction))
        self.scorer, self.rows = replace(scorer, null_samples=pairs), rows
        self.spent = 0.0

    def scores(self, visits: Visits, model: nn.Module) -> QualityScores:
        """The scores of all N samples; terms of those never visited are NaN."""
        quality, seed, ids = self.scorer.quality, self.scorer.seed, np.asarray(self.rows["id"])
        seen = visits.seen
        if len(seen) == 0:
            return unscored(ids, quality.fraction, seed, "no sample was scored")
        rows = self.rows.select(seen)
        with self.scorer.autocast(model):
            pool = self.scorer.measurements(visits, model, rows, True)
        found = quality_scores(pool, quality)
        if infer_kind(model) not in FREE:
            self.spent += 0.5 * min(len(seen), self.scorer.null_samples)
        scores = _spread(found, seen, ids)
        probability = tempered(scores.quality, scores.credibility, quality.temperature)
        selected = drawn(probability, quality.fraction, seed)
        return replace(scores, probability=probability, selected=selected)


def _spread(found: QualityScores, seen: np.ndarray, ids: np.ndarray) -> QualityScores:
    """The scores of those seen among all; the others have the highest quality, and all credit."""

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
    verdict = found.verdict + (f"; {missed} of {len(ids)} samples were never drawn" * bool(missed))
    return replace(
        found,
        ids=ids,
        loss=whole(found.loss, np.nan),
        gradient_norm=whole(found.gradient_norm, np.nan),
        loss_reduction=whole(found.loss_reduction, np.nan),
        convergence=whole(found.convergence, np.nan),
        credibility=whole(found.credibility, 1.0),
        quality=whole(found.quality, found.quality.max()),
        prediction=predicted(),
        verdict=verdict,
    )
