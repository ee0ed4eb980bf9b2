"""Credibility of free text: what a target costs after its own input and after another one.

Of free text the target says more of its loss than whether it is right, so hard targets look like
wrong ones. After its own input and after another one it is as hard, and what it costs less after
its own is what the two have to do with each other,

    t = (ℓ(y | x) - ℓ(y | x′)) / (ℓ(y | x) + ℓ(y | x′)),        x′ another sample's input.

A wrong target has as much to do with one as with the other, so its t is symmetric about 0; a right
one has t < 0. What lies above 0 is therefore half of the wrong ones, and its mirror image shows the
other half (as decoys do for peptides, Elias and Gygi 2007, and knockoffs for variables, Barber and
Candès 2015):

    π = 2 P(t > 0),        c(t) = P(right | t) = 1 - f(-t) / f(t) where t < 0, else 0,

with the share of what is above 0 among the targets of one |t| fitted decreasing. Neither a model of
sound losses nor a trusted sample is needed. A right target that says nothing of its input, a text
that goes with any, counts as wrong. NumPy and scikit-learn only.
"""

from __future__ import annotations

import numpy as np
from sklearn.isotonic import IsotonicRegression

from tsqlora.credibility import (
    ENOUGH,
    LIKE_NULL,
    RECOGNISED,
    UNTOLD,
    Credibility,
    Floats,
    are_recognised,
    least_share,
    unknown,
)


def contrast(own: Floats, mismatched: Floats) -> Floats:
    """t (N) of losses after the own input and after another one; 0 where both are 0."""
    total = np.maximum(own + mismatched, np.finfo(np.float32).tiny)
    return (own - mismatched) / total


def from_pairs(own: Floats, mismatched: Floats) -> Credibility:
    """c_i (N) by the losses of targets after their own inputs and after others' (N each)."""
    return from_contrast(contrast(own, mismatched))


def from_contrast(t: Floats) -> Credibility:
    """c_i (N) by t_i.

    Nothing is judged (c = 1) of fewer than `ENOUGH`, where nearly all look wrong, or where most of
    the sound ones could be as well: then the model does not know the task.
    """
    if len(t) < ENOUGH:
        return unknown(t, f"only {len(t)} samples, too few to compare inputs")
    above = (t > 0) + 0.5 * (t == 0)
    share = min(1.0, 2 * float(above.mean()))
    if share > LIKE_NULL:
        why = "the model does not know the task yet: targets go with other inputs as well"
        return unknown(t, why, share)
    if share < least_share(len(t)):
        return Credibility(np.ones(len(t)), share, "no sign of wrong targets", share)
    values = _mirrored(t, above)
    if not are_recognised(values, RECOGNISED):
        return unknown(t, UNTOLD, share)
    verdict = f"about {share:.0%} of the targets look wrong: they go with other inputs as well"
    return Credibility(values, share, verdict, share)


def _mirrored(t: Floats, above: Floats) -> Floats:
    """1 - f(-t)/f(t) = (1 - 2p) / (1 - p) where t < 0, p the share above 0 among those of |t|."""
    falling = IsotonicRegression(increasing=False, out_of_bounds="clip")
    part = np.minimum(falling.fit_transform(np.abs(t), above), 0.5)
    return np.where(t < 0, (1 - 2 * part) / (1 - part), 0.0)
