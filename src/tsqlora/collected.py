"""What was measured of a pool, read back from its parts for `quality.py`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tsqlora.calibration import Known, calibrated
from tsqlora.columns import column
from tsqlora.errors import TrainingError
from tsqlora.losses import CLASSIFICATION, REGRESSION
from tsqlora.parts import Measured

FINITE = ("loss", "gradient_norm")
"""What has to be finite of every sample."""


def numbers(
    parts: Measured,
    ids: np.ndarray,
    whole: np.ndarray,
    first_order: Callable[[np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    """Loss, gradient norm and loss reduction (N each), NaN where not wanted.

    Where only the samples at the positions `whole` were measured whole, the others are calibrated
    by them; `first_order` as in `calibration.calibrated`.

    Raises:
        TrainingError: a loss or gradient is not finite.
    """
    names = parts.names
    found: dict[str, np.ndarray] = {
        name: parts.column(name) if name in names else column(len(ids), np.float32, np.nan)
        for name in ("loss", "gradient_norm", "loss_reduction")
    }
    if "last_norm" not in names:
        _require_finite(ids, [found[name] for name in FINITE if name in names])
        return found
    last, norms = parts.column("last_norm"), found["gradient_norm"]
    measured = last.copy()
    measured[whole] = norms[whole]
    _require_finite(ids, [found["loss"], last, measured])
    known = Known(found["loss"], parts.column("length"), last)
    norms, reductions = calibrated(known, norms, found["loss_reduction"], first_order)
    found["gradient_norm"] = norms.astype(np.float32)
    found["loss_reduction"] = reductions.astype(np.float32)
    return found


def kin(parts: Measured, kind: str) -> np.ndarray | None:
    """Which samples' gradients belong together: see `Measurements.kin`."""
    if kind == CLASSIFICATION:
        return parts.column("label")
    if kind != REGRESSION:
        return None
    labels = parts.column("label")
    high = column(len(labels), np.int32)
    for positions, outputs in parts.blocks("output"):
        high[positions] = outputs[:, 0] > labels[positions]
    return high


def predictions(parts: Measured, kind: str) -> dict[str, np.ndarray]:
    """What the model says of classes and numbers (N each): see `Measurements`; else nothing."""
    if kind == CLASSIFICATION:
        return _classes(parts, parts.column("label"))
    if kind != REGRESSION:
        return {}
    predicted = column(len(parts.column("label")), np.float32)
    for positions, outputs in parts.blocks("output"):
        predicted[positions] = outputs[:, 0]
    return {"predicted": predicted}


def _classes(parts: Measured, labels: np.ndarray) -> dict[str, np.ndarray]:
    confidence, predicted = column(len(labels), np.float32), column(len(labels), np.int32)
    agrees = np.zeros(len(labels), dtype=bool)
    for positions, outputs in parts.blocks("output"):
        best = torch.tensor(outputs).topk(2)
        confidence[positions] = (best.values[:, 0] - best.values[:, 1]).numpy()
        predicted[positions] = best.indices[:, 0].numpy()
        agrees[positions] = predicted[positions] == labels[positions]
    return {"confidence": confidence, "agrees": agrees, "predicted": predicted}


def _require_finite(ids: np.ndarray, columns: list[np.ndarray]) -> None:
    bad = ~np.all([np.isfinite(column) for column in columns], axis=0)
    if bad.any():
        named = ", ".join(str(number) for number in ids[bad][:5])
        raise TrainingError(
            f"Loss or gradient of {bad.sum()} of {len(bad)} samples is not finite (rows "
            f"{named}{', ...' if bad.sum() > 5 else ''}): lower training.learning_rate, or mend "
            "these rows."
        )
