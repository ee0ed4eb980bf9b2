"""Credibility while a model is being trained, window by window. NumPy only.

Losses fall as a training goes on, so a sample's loss says whether its target is right only beside
what wrong targets cost at that time. When a window of visits ends, its losses and its own null give
u and c(u) (`credibility.py`): the verdict on the samples visited in it. Until the next one ends the
same c(u) decides on every sample in the loss itself,

    L = Σ w_i n_i ℓ_i / Σ n_i,    w_i = 1 if c(u_i) ≥ 0.7 else w₀

(n_i the sample's labels or target tokens), so that a wrong target is not learnt even when it is
first seen. w₀ is 0.001 for generation, whose wrong targets stand apart; 0.2 for classes and
numbers, where hard samples look like wrong ones for long, and a model that never learns them grows
surer of what it believes. There nothing is acted on, either, before the share of wrong ones has
stopped falling from window to window, nor while fewer than one in fifty look wrong. Where a window
says nothing, or nothing is wrong, w = 1 and the training is the plain one, bit for bit. Judged at
every step instead, a model that knows nothing yet passes the guards of `credibility.py` by chance
and collapses (all in benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tsqlora.credibility import (
    CREDIBLE,
    ENOUGH,
    Floats,
    Ints,
    drawable,
    from_null,
    null_percentiles,
)

LEAST, PART = 320, 6
"""A window is at most a PART-th of the pool, at least so many visits (or the whole pool)."""
LOWEST, LOWEST_OF_LABELS = 1e-3, 0.2
"""w₀ of generation (not 0, so that a sample's own gradient can still be told), and of labels."""
COMEBACK = 0.5
"""Of a doubted sample, the part of c_i with which it is in a round of the draw, at least w₀."""
SETTLED = 0.75
"""A share of wrong ones below this part of the window's before is falling."""
FEW = 0.02
"""Labels of which fewer look wrong are trained on as they are: what is doubted then is mostly hard,
and of as much use as anything (benchmarks/LOG.md)."""
GRID = 257
"""Points of u between which c(u) is interpolated."""


def window_size(samples: int, visits: int) -> int:
    """Visits in the window that begins after so many: half as many, as losses fall fast at first,
    within the bounds."""
    return min(samples, max(LEAST, min(visits // 2, samples // PART)))


def window_ends(samples: int, visits: int, step: int) -> list[int]:
    """The visits after which a window ends, of so many in steps of `step` visits."""
    ends = [0]
    while (end := ends[-1] + window_size(samples, ends[-1])) <= visits:
        ends.append(-(-end // step) * step)
    return [end for end in ends[1:] if end <= visits]


@dataclass(frozen=True)
class Null:
    """Losses of wrong targets (M) and the class that each names (M)."""

    loss: Floats = field(default_factory=lambda: np.zeros(0))
    group: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int32))


class Judge:
    """What is thought of N samples so far.

    `gentle`, as for classes and numbers, w₀ is 0.2, and nothing is acted on before the share of
    wrong ones has settled.

    Attributes:
        lowest: w₀.
        credibility: c_i of the window that i was last visited in (N), 1 before.
        judged: which samples a window has judged (N).
        acted: the c_i of windows in which the share of wrong ones had settled (N), 1 before.
        curve: c(u) of the last window that found wrong ones, on a grid (GRID); empty before.
        fresh: whether that was the last window of all.
        settled: whether `curve` is gone by.
        null: of the last window that was judged.
        share: 1 - mean c of the samples that were not judged before in the last window that had
            enough of them; NaN before.
    """

    def __init__(self, samples: int, gentle: bool = False) -> None:
        self.gentle, self.lowest = gentle, LOWEST_OF_LABELS if gentle else LOWEST
        self.credibility, self.judged = np.ones(samples), np.zeros(samples, dtype=bool)
        self.acted = np.ones(samples)
        self.curve, self.fresh, self.settled, self.null = np.zeros(0), False, False, Null()
        self.share = np.nan

    def weights(self, positions: Ints, loss: Floats, group: Ints) -> Floats:
        """w_i (n) of a batch that is being trained on, by the last curve.

        Where the last window that said something found nothing wrong, samples that were never
        doubted have 1.
        """
        if not self.acting:
            return np.ones(len(loss))
        found = self._along(null_percentiles(loss, group, self.null.loss, self.null.group))
        if not self.fresh:
            found[self.acted[positions] == 1] = 1.0
        return np.where(found >= CREDIBLE, 1.0, self.lowest)

    @property
    def acting(self) -> bool:
        """Whether any weight may be other than 1."""
        few = self.gentle and not self.wrong_share >= FEW
        return self.settled and len(self.curve) > 0 and not few

    @property
    def heeded(self) -> Floats:
        """The c_i that draws and weights go by (N)."""
        return self.acted if self.acting else np.ones(len(self.acted))

    def close(
        self, positions: Ints, loss: Floats, group: Ints, null: Null, classes: int | None = None
    ) -> None:
        """Judge the samples of a window that has ended, at `positions` in the pool.

        `group` and `classes` as `credibility.null_percentiles` and `from_null` take them. A window
        that says nothing changes nothing. Gently, the first that does, and any in which the share
        of wrong ones is still falling, is not acted on, nor is what was said before. One in which
        nothing looks wrong, as when the wrong ones are hardly drawn any more, judges those doubted
        before by the curve that doubted them.
        """
        u = null_percentiles(loss, group, null.loss, null.group)
        found = from_null(u, len(null.loss), classes)
        if not found.known:
            return
        self.fresh = bool((found.values < 1).any())
        new = found.values[~self.judged[positions]]
        self.settled = not self.gentle or self._settles(new, len(null.loss))
        if not self.settled:
            self.acted[:], self.judged[:] = 1, False
        self.null, self.judged[positions] = null, True
        if self.fresh:
            order = np.argsort(u, kind="stable")
            falling = np.minimum.accumulate(found.values[order])
            self.curve = np.interp(np.linspace(0, 1, GRID), u[order], falling)
            self.credibility[positions] = found.values
        elif len(self.curve):
            doubted = self.credibility[positions] < 1
            self.credibility[positions[doubted]] = self._along(u[doubted])
        if self.settled:
            self.acted[positions] = self.credibility[positions]

    def _settles(self, found: Floats, null: int) -> bool:
        """Whether the share of wrong ones does not fall any more, by the c of those not judged
        before: what is wrong stays wrong, while what is hard is being learnt.

        Chance is two deviations, of so many samples and of two nulls (each 1/√M of the share).
        """
        if len(found) < ENOUGH:
            return self.settled
        before, self.share = self.share, float(1 - found.mean())
        chance = 2 * np.sqrt(before * (1 - before) / len(found) + 2 * before**2 / null)
        return self.share >= min(SETTLED * before, before - chance)

    def _along(self, u: Floats) -> Floats:
        return np.interp(u, np.linspace(0, 1, GRID), self.curve)

    @property
    def wrong_share(self) -> float:
        """The share of wrong targets among those judged, 1 - mean c; NaN where none is."""
        return float(1 - self.credibility[self.judged].mean()) if self.judged.any() else np.nan

    @property
    def verdict(self) -> str:
        """One sentence for the user."""
        if not self.judged.any():
            return "targets are not judged: the model has not known the task for long enough"
        share = self.wrong_share
        if share < 0.005:
            return "no sign of wrong targets"
        return f"about {share:.0%} of the targets look wrong"

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays."""
        return {
            "judge.credibility": self.credibility,
            "judge.judged": self.judged,
            "judge.curve": self.curve,
            "judge.acted": self.acted,
            "judge.flags": np.asarray([self.fresh, self.settled]),
            "judge.share": np.asarray([self.share]),
            "judge.null_loss": self.null.loss,
            "judge.null_group": self.null.group,
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Put `state` back."""
        self.credibility = state["judge.credibility"].copy()
        self.judged = state["judge.judged"].copy()
        self.acted, self.curve = state["judge.acted"].copy(), state["judge.curve"]
        self.fresh, self.settled = map(bool, state["judge.flags"])
        self.share = float(state["judge.share"][0])
        self.null = Null(state["judge.null_loss"], state["judge.null_group"])


def inclusion(credibility: Floats, duplicates: Ints, lowest: float = LOWEST) -> Floats:
    """How likely each sample is in a round of the draw (N): q_i = d_i / max(1, Σ_{j ~ i} d_j).

    d_i is 1 where the sample may be drawn (`credibility.drawable`), else c_i / 2 or w₀ (`lowest`)
    where that is more, so that it comes back now and then and may be judged again. The sum is over
    its group of near-duplicates, so that a group counts as one sample, and a wrong copy hands its
    part to the others.
    """
    wanted = np.where(drawable(credibility), 1.0, np.maximum(COMEBACK * credibility, lowest))
    total = np.bincount(duplicates, weights=wanted)[duplicates]
    return wanted / np.maximum(total, 1.0)
