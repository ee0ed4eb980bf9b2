"""Some samples measured whole, the others by their last layers: what those would have come to.

The economical mode (`quality.depth` below 1) takes every sample forward, and back through the last
layers only. A few, drawn at random, go all the way and take their own step; from them it is learnt
how what is cheap tells of what is not. NumPy and scikit-learn only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

ONE_IN, LEAST = 16, 64
"""One sample in so many is measured whole, but at least so many."""
PENALTIES = np.logspace(-2, 4, 13)
"""Of the ridge regressions: each takes the one that predicts the samples left out best."""
TINY = 1e-12


def measured_whole(samples: int) -> int:
    """How many of so many samples are measured whole."""
    return min(samples, max(LEAST, -(-samples // ONE_IN)))


def drawn_whole(samples: int, seed: int) -> Ints:
    """Positions of the samples that are measured whole, in order; all alike likely."""
    drawn = np.random.default_rng(seed).permutation(samples)[: measured_whole(samples)]
    return np.sort(drawn)


@dataclass(frozen=True)
class Known:
    """What is known of all N samples.

    Attributes:
        loss: ℓ_i (N).
        length: target tokens (N).
        last_norm: ‖g_i‖ of the last layers' factors alone (N).
    """

    loss: Floats
    length: Ints
    last_norm: Floats

    @property
    def features(self) -> Floats:
        """(N, 4): ℓ, log ℓ, log T, log ‖g‖ of the last layers."""
        norm = np.log(np.maximum(self.last_norm, TINY))
        rows = [self.loss, np.log(np.maximum(self.loss, 0) + 1e-3), np.log(self.length), norm]
        return np.stack(rows, 1).astype(np.float64)


def calibrated(
    known: Known, norms: Floats, reductions: Floats, first_order: Callable[[Floats], Floats]
) -> tuple[Floats, Floats]:
    """‖g_i‖ of all factors and Δℓ_i (N each), from both where measured whole, NaN elsewhere.

    What was measured stays as it was. Elsewhere, by ridge regressions on `Known.features`, fitted
    to what was measured: exp of log ‖g‖, and the share of the first-order estimate η_i‖g_i‖² that
    comes true, times that estimate, which `first_order` gives for norms (N).
    """
    filled = np.exp(_filled(known.features, np.log(np.maximum(norms, TINY))))
    all_norms = np.where(np.isnan(norms), filled, norms)
    expected = np.maximum(first_order(all_norms), TINY)
    share = _filled(known.features, reductions / expected)
    return all_norms, np.where(np.isnan(reductions), share * expected, reductions)


def _filled(features: Floats, values: Floats) -> Floats:
    """`values` (N), those that are NaN predicted from `features` (N, F); all NaN stay so."""
    there = np.isfinite(values)
    if there.all() or not there.any():
        return values
    model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    model.fit(features[there], values[there])
    return np.where(there, values, model.predict(features))
