"""Credibility while a model is being trained, window by window. NumPy only.

Losses fall as a training goes on, so a sample's loss says whether its target is right only beside
what wrong targets cost at that time. When a window of visits ends, its losses and its own null give
c_i (`credibility.py`): the verdict on the samples visited in it.

Of generation, whose wrong targets stand apart, windows are short, and until the next one ends the
same c(u) decides on every sample in the loss itself,

    L = Σ w_i n_i ℓ_i / Σ n_i,    w_i = 1 if c(u_i) ≥ 0.7 else w₀

(n_i the sample's target tokens, w₀ = 0.001), so that a wrong target is not learnt even when it is
first seen. Where a window says nothing, or nothing is wrong, w = 1 and the training is the plain
one, bit for bit.

Hard classes and numbers look like wrong ones until they are learnt, and a model that never learns
them grows surer of what it believes. There a window is a whole epoch, the first is not acted on,
and a sample doubted in the next is drawn less from then on, in one round of twenty at least; no
loss is weighed. That verdict stands, as what is trained on is known by heart later. If already the
first epoch looks like the null, only samples and not the task may be learnt, and nothing is judged.
Judged at every step instead, a model that knows nothing yet passes the guards of `credibility.py`
by chance and collapses (all in benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tsqlora.credibility import (
    CREDIBLE,
    HARD,
    LIKE_NULL,
    Credibility,
    Floats,
    Ints,
    belong,
    drawable,
    from_null,
    percentiles,
)
from tsqlora.trusted import worth

LEAST, PART = 320, 6
"""A window is at most a PART-th of the pool, at least so many visits (or the whole pool)."""
LOWEST, LOWEST_OF_LABELS = 1e-3, 0.05
"""w₀ of generation (not 0, so that a sample's own gradient can still be told), and the least part
of the rounds that a doubted label is in."""
COMEBACK = 0.5
"""Of a doubted sample, the part of c_i with which it is in a round of the draw, at least w₀."""
NO_SIGN = 0.005
"""Below this share of wrong targets users are told that there is no sign of them."""
CLEARED = 0.3
"""With more of the pool than this like the null at first sight they are told that as well."""
BY_HEART = (
    "targets are not judged: after an epoch the model did not know the task, and what it fits "
    "since it may know by heart; trusted rows (quality.reference) would tell"
)
MERELY_HARD = f"targets are not judged: {HARD}"
SETTLED = 50
"""After so many doubted targets that were asked for, windows are believed."""
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


Pairs = tuple[Floats, Floats]
"""Losses of targets after their own inputs, and of the same after others' (M each)."""


class Verdicts:
    """What is thought of N samples so far.

    Attributes:
        credibility: c_i of the window that i is judged by (N), 1 before.
        judged: which samples a window has judged (N).
        windows: how many have ended.
        lowest: the least part of the rounds that a doubted sample is in.
        pool: how many samples come before the trusted ones, which are never doubted.
    """

    lowest = LOWEST_OF_LABELS

    def __init__(self, samples: int, trusted: int = 0) -> None:
        self.pool = samples - trusted
        self.credibility, self.judged = np.ones(samples), np.zeros(samples, dtype=bool)
        self.windows = 0

    @property
    def heeded(self) -> Floats:
        """The c_i that draws go by (N)."""
        return self.credibility

    @property
    def told(self) -> Floats:
        """The c_i that users are told (N)."""
        return self.credibility

    @property
    def wrong_share(self) -> float:
        """The share of wrong targets among those judged, 1 - mean c; NaN where none is."""
        return float(1 - self.told[self.judged].mean()) if self.judged.any() else np.nan

    @property
    def verdict(self) -> str:
        """One sentence for the user."""
        if not self.judged.any():
            return "targets are not judged: the model has not known the task for long enough"
        share = self.wrong_share
        if share < NO_SIGN:
            return "no sign of wrong targets"
        return f"about {share:.0%} of the targets look wrong"

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays."""
        return {
            "judge.credibility": self.credibility,
            "judge.judged": self.judged,
            "judge.windows": np.asarray([self.windows]),
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Put `state` back."""
        self.credibility, self.judged = (
            state[f"judge.{name}"].copy() for name in ("credibility", "judged")
        )
        self.windows = int(state["judge.windows"][0])


class LabelVerdicts(Verdicts):
    """Of classes and numbers, judged once an epoch.

    Draws go by the first verdict on a sample after the first window (that window's, if it comes in
    no other), users are told the mean of all after it: any label trained on costs less each time,
    and a window in which few look wrong, as the doubted are hardly drawn, clears those it holds.

    Attributes:
        random: ρ of the pool beside trusted rows (`trusted.random_share`), NaN where not known.
            Above 0 the first window is acted on, as hard labels are not taken for wrong ones then.
        scale: (1 - π) / (1 - ρ), by which c_i is the probability that a label is right.
        at_first: ρ̂ of the first window, NaN before it ends.
        total, times: the sum and the number of the verdicts since the first window (N).
    """

    random, scale, at_first = np.nan, 1.0, np.nan

    def __init__(self, samples: int, trusted: int = 0) -> None:
        super().__init__(samples, trusted)
        self.total, self.times = np.zeros(samples), np.zeros(samples)

    @property
    def by_heart(self) -> bool:
        """Whether the first window looked like the null: then nothing later is judged but beside
        trusted rows."""
        return self.at_first > LIKE_NULL

    @property
    def told(self) -> Floats:
        """The mean of c_i over the windows after the first that judged i (N), else the last c_i."""
        mean = np.where(self.times, self.total / np.maximum(self.times, 1), self.credibility)
        return np.where(self.judged, np.minimum(self.scale * mean, 1.0), mean)

    @property
    def heeded(self) -> Floats:
        """The c_i that draws go by (N): 1 after one window alone, as hard is not wrong."""
        acted = self.windows > 1 or self.random > 0
        return self.credibility if acted else np.ones(len(self.credibility))

    @property
    def verdict(self) -> str:
        """One sentence for the user."""
        if self.windows > 1 and self.by_heart and not self.judged.any():
            return BY_HEART
        if self.judged.any() and self.wrong_share < NO_SIGN and self.at_first > CLEARED:
            return (
                f"no sign of wrong targets after the first epoch; in it {self.at_first:.0%} looked "
                "like mismatched ones, which the model may know by heart since"
            )
        return super().verdict + "; judged beside the trusted ones" * (self.random > 0)

    @property
    def worth(self) -> float:
        """How often a trusted row is drawn beside one of the pool that is not doubted, ρ known."""
        return worth(self.random, float(1 - drawable(self.heeded[: self.pool]).mean()))

    def random_among(self, positions: Ints) -> float:
        """ρ of some of the pool, by what is thought of them; NaN where it is not known."""
        thought = np.where(self.judged, 1 - self.credibility, self.random)
        return float(thought[positions].mean()) if self.random > 0 else self.random

    def close(self, positions: Ints, found: Credibility) -> None:
        """Take the verdicts on a window's samples; where nothing is known those before stand."""
        self.windows += 1
        if self.windows == 1:
            self.at_first = found.like_null
        if found.known and (self.random > 0 or not self.by_heart):
            new = self.times[positions] == 0
            self.credibility[positions[new]], self.judged[positions] = found.values[new], True
            if self.windows > 1:
                self.total[positions] += found.values
                self.times[positions] += 1

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays."""
        own = {
            "random": np.asarray([self.random, self.scale]),
            "at_first": np.asarray([self.at_first]),
            "total": self.total,
            "times": self.times,
        }
        return {**super().state(), **{f"judge.{name}": values for name, values in own.items()}}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Put `state` back."""
        super().load(state)
        self.total, self.times = (state[f"judge.{name}"].copy() for name in ("total", "times"))
        self.random, self.scale = map(float, state["judge.random"])
        self.at_first = float(state.get("judge.at_first", [np.nan])[0])


class Judge(Verdicts):
    """Of generation, judged by windows that also weigh the losses of what comes after.

    Of free text the target itself says more of its loss than the input does, so hard ones look like
    mismatched ones. Before doubts are believed, targets are asked for after their own inputs and
    after others' (`credibility.belong`), until `SETTLED` of them were doubted as well.

    Attributes:
        curve: c(u) of the last window that found wrong ones, on a grid (GRID); empty before.
        fresh: whether that was the last window of all.
        null: losses of wrong targets (M), in order, of the last window that was judged.
        doubted, cheaper: targets asked for since a window was not believed that were doubted, and
            how many of these were cheaper after their own inputs.
        hard: windows that were not believed.
    """

    lowest = LOWEST

    def __init__(self, samples: int, trusted: int = 0) -> None:
        super().__init__(samples, trusted)
        self.curve: Floats = np.zeros(0)
        self.null: Floats = np.zeros(0)
        self.fresh, self.doubted, self.cheaper, self.hard = False, 0, 0, 0

    @property
    def verdict(self) -> str:
        """One sentence for the user."""
        return MERELY_HARD if self.hard and not self.judged.any() else super().verdict

    def weights(self, positions: Ints, loss: Floats) -> Floats:
        """w_i (n) of a batch that is being trained on, by the last curve.

        Where the last window that said something found nothing wrong, samples that were never
        doubted have 1.
        """
        if not self.acting:
            return np.ones(len(loss))
        found = _along(self.curve, percentiles(loss, self.null))
        if not self.fresh:
            found[self.credibility[positions] == 1] = 1.0
        found[positions >= self.pool] = 1.0
        return np.where(found >= CREDIBLE, 1.0, self.lowest)

    @property
    def acting(self) -> bool:
        """Whether any weight may be other than 1."""
        return len(self.curve) > 0

    def close(
        self, positions: Ints, loss: Floats, null: Floats, pairs: Callable[[], Pairs] | None = None
    ) -> bool:
        """Judge the samples of a window that has ended, at `positions` in the pool, if it can.

        A window that says nothing, or is not believed by `pairs`, changes nothing. One in which
        nothing looks wrong, as when the wrong ones are hardly drawn any more, judges those doubted
        before by the curve that doubted them.
        """
        self.windows += 1
        null = np.sort(null)
        u = percentiles(loss, null)
        found = from_null(u, len(null))
        if not found.known:
            return False
        fresh = bool((found.values < 1).any())
        if fresh:
            order = np.argsort(u, kind="stable")
            falling = np.minimum.accumulate(found.values[order])
            curve = np.interp(np.linspace(0, 1, GRID), u[order], falling)
            if pairs is not None and self.doubted < SETTLED and self._belong(curve, null, pairs()):
                return False
            self.curve, self.credibility[positions] = curve, found.values
        elif len(self.curve):
            doubted = self.credibility[positions] < 1
            self.credibility[positions[doubted]] = _along(self.curve, u[doubted])
        self.fresh, self.null, self.judged[positions] = fresh, null, True
        return True

    def _belong(self, curve: Floats, null: Floats, pairs: Pairs) -> bool:
        own, mismatched = pairs
        doubted = _along(curve, percentiles(own, null)) < CREDIBLE
        self.doubted += int(doubted.sum())
        self.cheaper += int((own < mismatched).sum(where=doubted))
        if not belong(self.cheaper, self.doubted):
            return False
        self.doubted, self.cheaper, self.hard = 0, 0, self.hard + 1
        return True

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays."""
        own = {"curve": self.curve, "fresh": np.asarray([self.fresh]), "null": self.null}
        own["asked"] = np.asarray([self.doubted, self.cheaper, self.hard])
        return {**super().state(), **{f"judge.{name}": values for name, values in own.items()}}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Put `state` back."""
        super().load(state)
        self.curve, self.null = state["judge.curve"], state["judge.null"]
        self.fresh = bool(state["judge.fresh"][0])
        self.doubted, self.cheaper, self.hard = map(int, state.get("judge.asked", [0, 0, 0]))


def _along(curve: Floats, u: Floats) -> Floats:
    return np.interp(u, np.linspace(0, 1, GRID), curve)


def inclusion(credibility: Floats, duplicates: Ints, lowest: float = LOWEST) -> Floats:
    """How likely each sample is in a round of the draw (N): q_i = d_i / max(1, Σ_{j ~ i} d_j).

    d_i is 1 where the sample may be drawn (`credibility.drawable`), else c_i / 2 or w₀ (`lowest`)
    where that is more, so that it comes back now and then, in generation to a new verdict. The sum
    is over its group of near-duplicates, so that a group counts as one sample, and a wrong copy
    hands its part to the others.
    """
    wanted = np.where(drawable(credibility), 1.0, np.maximum(COMEBACK * credibility, lowest))
    total = np.bincount(duplicates, weights=wanted)[duplicates]
    return wanted / np.maximum(total, 1.0)
