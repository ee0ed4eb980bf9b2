"""How likely each sample's target is right, from loss and prediction. NumPy and scikit-learn only.

A *permutation null* shows what a wrong target costs under the present model: the losses of inputs
with other samples' targets. u_i is the share of null losses (of the same group: the class, so that
a model that only knows the class frequencies looks like what it is) below sample i's loss. If the
target is wrong, u_i is uniform on [0, 1]; if it is right, u_i lies near 0. So in the pool

    f(u) = (1 - π) f₁(u) + ρ · 1,        c(u) = P(right | u) = 1 - ρ / f(u)

with f₁ the density of right targets (the local false discovery rate of Efron 2001, with Storey's
2002 estimate of ρ from the upper half, where right targets do not reach). The null itself is made
of targets one of which may happen to be right: with C classes and a share π of wrong labels
ρ = π / (1 - π / (C - 1)), which is solved for π.

Of free text the target says more of its loss than whether it goes with its input, and hard ones
look like wrong ones. So of generation doubted targets are asked for after their own inputs and
after others' (`belong`), before any is believed to be wrong.

A *systematic* wrong label, a class taken for its neighbour, does not look like a permuted one. So
classes are also judged by what the model, where it is sure of itself, thinks of the label. Let s(a)
be the share of labels that agree with the prediction at confidence a. If a share π of the labels is
wrong whatever the text, s(a) = (1 - π) · P(prediction right | a), which levels off at 1 - π, and

    c = P(right | disagrees, a) = (1 - π - s(a)) / (1 - s(a)),        c = 1 where they agree.

The null knows of some of that π already, and to doubt a sample twice for the same reason would lose
two or three times as many sound ones as asked for. So here π is what the null leaves unexplained,
and the product of both c is the probability that a label is wrong in neither way.

(The idea of confident learning, Northcutt et al. 2021, arXiv 1911.00068, as a false discovery
rate.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.isotonic import IsotonicRegression

from tsqlora.columns import blocks_of, column, copied, distinct, kept, release

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

BINS = 20
"""Bins of u where densities are not known to decrease; each holds 5 % of the null."""
FINE_BINS = 100
"""Bins of u where they are, at most one for every 20 samples."""
ENOUGH = 40
"""Below so many samples (or null losses of a group) nothing is said."""
SIGNIFICANT = 6.6
"""2 Δ log-likelihood that chance exceeds once in a hundred."""
RECOGNISED, RECOGNISED_LABELS = 0.8, 0.75
"""Where less of the sound samples than this has c of at least `CREDIBLE`, nothing is judged; of
labels, two in five of them wrong, it is 0.78 to 0.88 once the task is known, and before 0.71 at
most (benchmarks/LOG.md)."""
CREDIBLE = 0.7
"""A wrong target costs more than a sound one brings, so a sample must be this credible to be drawn
(benchmarks/LOG.md), unless that would leave out more than `LOSABLE` of the sound ones."""
LOSABLE = 0.05
FITTED = 200_000
"""Samples at most that how often the model agrees is learnt from, drawn where there are more."""
NAMED = 0.25
"""Labels of a class that the model names less than this part as often as they do are not judged by
what it names: it may know how common the other classes are, and no more."""
SURE = 0.7
"""Log-odds (2 : 1) that a model must have for its first class over its second to be called sure."""
LEAST_SHARE = 0.02
"""Below this share of wrong targets nothing is doubted."""
UNTOLD = "sound samples cannot be told from wrong ones yet"
SOUND = 0.1
"""Where more of the doubted targets than this are sound, the doubt is not believed."""
HARD = "those that look wrong go with their own inputs, and are merely hard"
LIKE_NULL = 0.85
"""Above this part of a pool that is like the null the model does not know the task."""
STEEPEST = 1.6
"""Above this ratio of f between the third and the last quarter of u, and what chance may add to it,
right targets reach into the null's range: the model does not know the task well enough for its
losses to judge the targets."""


@dataclass(frozen=True)
class Credibility:
    """The verdict on a pool.

    Attributes:
        values: c_i in [0, 1] (N); all 1 where nothing is known or nothing is wrong.
        wrong_share: π̂, the estimated share of wrong targets; NaN where not known.
        verdict: one sentence for the user.
        like_null: ρ̂, the part of the pool that is like the null; NaN where not known.
    """

    values: Floats
    wrong_share: float
    verdict: str
    like_null: float = float("nan")

    @property
    def known(self) -> bool:
        """Whether the losses allow a judgement."""
        return not np.isnan(self.wrong_share)


def null_percentiles(loss: Floats, group: Ints, null_loss: Floats, null_group: Ints) -> Floats:
    """u_i (N): the share of null losses of sample i's group below its loss, ties counted half.

    NaN in groups with fewer than `ENOUGH` null losses. Another group's are no measure: to a model
    that knows the class frequencies alone a wrong label that is common costs little, so beside the
    null of both every common label would look right and every rare one wrong.
    """
    own = {value: null_group == value for value in distinct(group)}
    nulls = {k: _sorted(kept(null_loss, of)) for k, of in own.items() if of.sum() >= ENOUGH}
    result = column(len(loss))
    for rows in blocks_of(len(loss)):
        found = np.full(len(loss[rows]), np.nan)
        for value in np.unique(group[rows]):
            if value in nulls:
                of_it = group[rows] == value
                found[of_it] = percentiles(loss[rows][of_it], nulls[value])
        result[rows] = found
    release()
    return result


def _sorted(values: Floats) -> Floats:
    made = copied(values)
    made.sort()
    return made


def percentiles(loss: Floats, null: Floats) -> Floats:
    """u_i (N) beside one null, which is in order: the share below each loss, ties counted half."""
    below, upto = np.searchsorted(null, loss, "left"), np.searchsorted(null, loss, "right")
    return (below + upto) / (2 * max(len(null), 1))


def from_null(u: Floats, null: float, classes: int | None = None) -> Credibility:
    """Credibility from the permutation null alone, with no trusted sample.

    `null` is how many losses u was taken beside (infinite where that is its distribution itself);
    `classes` is C for classification, None where a permuted target is never right by chance.
    Nothing is judged (c = 1) when there are too few samples or no null, when f is not flat over the
    upper half of u, or when the pool looks like the null itself: then the model cannot know.
    """
    if len(u) < ENOUGH:
        return unknown(u, f"only {len(u)} samples, too few to judge targets by their losses")
    if null == 0:
        return unknown(u, "no wrong ones to compare with")
    density = float(np.mean(u > 0.5) * 2)
    if _is_steep(u, null):
        return unknown(u, "sound but hard samples cannot be told from wrong ones yet", density)
    if density > LIKE_NULL:
        why = "the model does not know the task yet: targets look like permuted ones"
        return unknown(u, why, density)
    if density < least_share(len(u)):
        share = share_of_wrong(density, classes)
        return Credibility(column(len(u), fill=1), share, "no sign of wrong targets", density)
    found = beside(u, density, classes)
    recognised = RECOGNISED if classes is None else RECOGNISED_LABELS
    return found if are_recognised(found.values, recognised) else unknown(u, UNTOLD, density)


def least_share(samples: int) -> float:
    """The share of wrong targets below which none of so many is doubted."""
    return max(LEAST_SHARE, 3 / samples)


def are_recognised(values: Floats, part: float) -> bool:
    """Whether so much of the sound samples, of which Σ c are expected, is credible."""
    return bool(values.sum(where=values >= CREDIBLE) >= part * values.sum())


def _is_steep(u: Floats, null: float) -> bool:
    """Whether f falls over the upper half of u by more than `STEEPEST`, and than chance would have
    it: of a quarter of N samples (4 deviations), and of the quarters' ends, which are quantiles of
    M null losses. A quarter of a flat f of level ρ lies ρ√(3/M) about it by those, and the two
    quarters vary against each other by -1/3, so third - `STEEPEST` · last by 3.7 ρ/√M (2 of it).
    """
    third, last = float(np.mean((u > 0.5) & (u <= 0.75)) * 4), float(np.mean(u > 0.75) * 4)
    by_samples = 4 * np.sqrt(4 * max(last, 4 / len(u)) / len(u))
    by_null = 2 * 3.7 * (third + last) / 2 / np.sqrt(null)
    return third > STEEPEST * last + by_samples + by_null and third > 0.1


def foreseen(label: Ints, predicted: Ints | Floats) -> NDArray[np.bool_]:
    """Which labels (N) are of a class that the model names often enough (`NAMED`)."""
    numbers = copied(label, np.int64)
    given = np.bincount(numbers)
    named = np.bincount(copied(predicted, np.int64), minlength=len(given))
    return (named[: len(given)] >= NAMED * given)[numbers]


def from_agreement(
    confidence: Floats, agrees: NDArray[np.bool_], classes: int, explained: float = 0.0
) -> Floats:
    """c_i (N) of class labels by the model's own predictions; all 1 where they are no guide.

    `confidence` is the log-odds of the model's first class against its second, whatever the label,
    `agrees` whether the label is the first. s(a) is fitted increasing; of what its level over the
    surest quarter lacks to 1, π̂ is what is not `explained`, the share that the null calls wrong.
    No guide: too few samples, a model not sure of that quarter (`SURE`), a level over 98 % (nothing
    is wrong) or below ½ + 0.3/C (guessing could look like that).
    """
    if len(agrees) < ENOUGH:
        return column(len(agrees), fill=1)
    surest = np.quantile(confidence, 0.75)
    level = float(agrees[confidence >= surest].mean())
    if surest < SURE or not 0.5 + 0.3 / classes <= level <= 0.98:
        return column(len(agrees), fill=1)
    share_left = max(0.0, 1 - level - explained)
    increasing = IsotonicRegression(increasing=True, out_of_bounds="clip")
    if len(agrees) <= FITTED:
        increasing.fit(confidence, agrees.astype(float))
    else:
        few = np.random.default_rng(0).integers(len(agrees), size=FITTED)
        increasing.fit(confidence[few], agrees[few].astype(float))
    result = column(len(agrees))
    for rows in blocks_of(len(agrees)):
        disagree = np.maximum(1 - increasing.predict(confidence[rows]), 1e-12)
        doubted = np.clip(1 - share_left / disagree, 0, 1)
        result[rows] = np.where(agrees[rows], 1.0, doubted)
    return result


def belong(cheaper: int, doubted: int) -> bool:
    """Whether targets that are doubted go with their own inputs all the same, and are merely hard.

    A wrong target costs as much after its own input as after another one, so it is cheaper after
    its own in half of the cases; a sound one nearly always, whatever it costs. `cheaper` of so many
    `doubted` say that more than `SOUND` of them are right where chance alone would have so many
    once in a hundred (a sign test).
    """
    return are_more(cheaper, doubted, (1 + SOUND) / 2)


def are_more(found: int, of: int, part: float) -> bool:
    """Whether `found` are more than such a part: chance would have so many once in a hundred."""
    return bool(binom.sf(found - 1, of, part) < 0.01)


def drawable(values: Floats) -> NDArray[np.bool_]:
    """Which samples may be drawn (N): c ≥ `CREDIBLE`, and as many of the others, the most credible
    first, as it takes to lose at most `LOSABLE` of the sound ones, of which Σ c are expected."""
    low = np.flatnonzero(values < CREDIBLE)
    low = low[np.argsort(values[low], kind="stable")]
    lost = np.cumsum(values[low])
    drawn = np.ones(len(values), dtype=bool)
    drawn[low[lost <= LOSABLE * values.sum()]] = False
    return drawn


def from_reference(
    u: Floats, reference_u: Floats, null: float, classes: int | None = None
) -> Credibility:
    """Credibility where trusted samples show what right targets cost: f₁ is their density of u.

    ρ maximises the likelihood of the pool under (1 - ρ) f₁ + ρ; it counts only when the gain over
    ρ = 0 is significant for two samples of these sizes. A reference that is itself dirty by
    the null is not
    believed, nor is one of fewer than `ENOUGH` samples: then the null alone judges.
    """
    by_null = from_null(reference_u, null, classes)
    if len(reference_u) < ENOUGH or (by_null.known and by_null.wrong_share > 0.05):
        return from_null(u, null, classes)
    trusted = _histogram(reference_u, prior=0.5)
    counts = np.histogram(u, BINS, (0, 1))[0]
    grid = np.linspace(0, 0.95, 191)[:, None]
    likelihood = (counts * np.log((1 - grid) * trusted + grid / BINS)).sum(1)
    best = int(likelihood.argmax())
    gain = 2 * (likelihood[best] - likelihood[0])
    if gain * len(reference_u) / (len(reference_u) + len(u)) < SIGNIFICANT:
        return Credibility(
            column(len(u), fill=1), 0.0, "no sign of wrong targets beside the reference", 0.0
        )
    density = float(grid[best, 0])
    mixture = (1 - density) * trusted + density / BINS
    fitted = IsotonicRegression(increasing=False).fit_transform(
        np.arange(BINS), (1 - density) * trusted / mixture, sample_weight=np.maximum(counts, 1)
    )
    return _judged(_by_bin(u, fitted), density, classes)


def beside(u: Floats, density: float, classes: int | None = None) -> Credibility:
    """Credibility where the part ρ of the pool that is like the null is known beforehand.

    c = 1 - ρ / f(u), f decreasing. Nothing has to be told apart from hard targets, so it is never
    silent; c is 0 where f is ρ, at or below chance.
    """
    values = _by_bin(u, np.clip(1 - density / _decreasing_density(u), 0, 1))
    return _judged(values, density, classes)


def share_of_wrong(density: float, classes: int | None) -> float:
    """π of a pool whose part ρ (`density`) is like the null: ρ / (1 + ρ/(C - 1)).

    Of classes the null now and then has a right label for a wrong one.
    """
    return density if classes is None else density / (1 + density / max(classes - 1, 1))


def _judged(values: Floats, density: float, classes: int | None) -> Credibility:
    share = share_of_wrong(density, classes)
    return Credibility(values, share, f"about {share:.0%} of the targets look wrong", density)


def unknown(u: Floats, why: str, density: float = float("nan")) -> Credibility:
    """c = 1 of all, as nothing can be said."""
    verdict = f"targets are not judged: {why}"
    return Credibility(column(len(u), fill=1), float("nan"), verdict, density)


def _histogram(u: Floats, bins: int = BINS, prior: float = 0.0) -> Floats:
    counts = np.histogram(u, bins, (0, 1))[0] + prior
    return counts / counts.sum()


def _decreasing_density(u: Floats) -> Floats:
    """f by bins of u under the constraint that f decreases (Grenander 1956), from a histogram."""
    bins = int(np.clip(len(u) // 20, BINS, FINE_BINS))
    heights = _histogram(u, bins) * bins
    fitted = IsotonicRegression(increasing=False).fit_transform(np.arange(bins), heights)
    return np.maximum(fitted, 1e-12)


def _by_bin(u: Floats, of: Floats) -> Floats:
    """For each u_i what `of` has for the bin that it is in (N)."""
    result = column(len(u))
    for rows in blocks_of(len(u)):
        result[rows] = of[np.minimum((u[rows] * len(of)).astype(int), len(of) - 1)]
    return result
