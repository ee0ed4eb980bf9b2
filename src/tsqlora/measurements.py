"""What is known of a pool's samples when their quality is told. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tsqlora.convergence import Sketches
from tsqlora.credibility import Floats, Ints


@dataclass(frozen=True)
class Measurements:
    """What one pass over a pool of N samples measured.

    Attributes:
        ids: stable sample ids (N).
        loss: ℓ_i (N).
        gradient_norm: ‖g_i‖₂ (N), NaN where not measured.
        loss_reduction: ℓ_i(θ) - ℓ_i(θ - η_i g_i) (N), NaN where not measured.
        sketch: random projections of g_i (N, k), in memory or on disk; k = 0 where not measured.
        length: target tokens (N).
        group: class label (N), or 0 for all.
        null_loss: losses of inputs with other samples' targets (M), M = 0 where there are none.
        null_group: the class those targets name (M).
        null_owner: the samples whose targets they are (M), of generation: all, or of some if none
            looks wrong.
        null_own: what those cost after their own inputs (M).
        confidence: log-odds of the model's first class against its second (N); empty if no classes.
        agrees: whether the label is that first class (N); empty if no classes.
        classes: C for classification, else None.
        kin: which samples pull at the same thing (N), by number: those of one class, those of one
            number's too high or too low predictions; None if all do.
        alignment: the exact cosine of g_i with a reference's mean unit gradient (N), None if there
            is none.
        predicted: the model's class (its number) or number (N); None for generation.
    """

    ids: Ints
    loss: Floats
    gradient_norm: Floats
    loss_reduction: Floats
    sketch: Sketches
    length: Ints
    group: Ints
    null_loss: Floats
    null_group: Ints
    confidence: Floats = field(default_factory=lambda: np.zeros(0))
    agrees: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    classes: int | None = None
    kin: Ints | None = None
    null_owner: Ints | None = None
    null_own: Floats = field(default_factory=lambda: np.zeros(0))
    alignment: Floats | None = None
    predicted: Ints | Floats | None = None
