"""The null of credibility: losses of inputs with other samples' targets."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from tsqlora.batches import Collator, Pool, evaluating, forward_losses, subset
from tsqlora.losses import CLASSIFICATION, REGRESSION, sample_losses
from tsqlora.measuring import as_numpy
from tsqlora.memory import Halving
from tsqlora.mismatch import mismatched_pairs
from tsqlora.parts import Measured

NULL_SAMPLES = 500
"""Mismatched pairs that make the null where it takes passes of its own (generation)."""
ROWS_AT_ONCE = 65_536
FREE = (CLASSIFICATION, REGRESSION)
"""Kinds whose null takes no pass."""

Null = tuple[np.ndarray, np.ndarray]
"""Losses of wrong targets (M), and the class that each names (M)."""


def null_of_outputs(parts: Measured, kind: str, seed: int) -> Null:
    """Of a class or number: each sample's stored output against another one's target."""
    labels = parts.column("label")
    partners = others(labels, np.random.default_rng(seed))
    losses = np.full(len(labels), np.nan, dtype=np.float32)
    for positions, outputs in parts.blocks("output"):
        wrong = torch.from_numpy(labels[partners[positions]])
        wrong = wrong.long() if kind == CLASSIFICATION else wrong.float()
        losses[positions] = as_numpy(sample_losses(kind, torch.tensor(outputs), wrong))
    wrong_labels = labels[partners]
    real = wrong_labels != labels
    group = wrong_labels[real] if kind == CLASSIFICATION else np.zeros(real.sum())
    return losses[real], group.astype(np.int32)


def null_of_pairs(
    model: nn.Module,
    kind: str,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    seed: int,
    most: int = NULL_SAMPLES,
) -> Null:
    """Of generation: at most so many inputs paired with others' targets, a forward each."""
    wrong = mismatched_pairs(subset(dataset, most, seed), kind)
    losses = np.zeros(0 if wrong is None else len(wrong))
    if wrong is not None:
        pool, halving = Pool(model, wrong, collator, batch_size), Halving()
        with evaluating(model), torch.no_grad():
            for planned in pool.plan:
                for positions, batch in pool.take(planned):
                    found = halving(lambda piece: forward_losses(model, kind, piece), batch)
                    losses[positions] = np.concatenate([as_numpy(each) for each in found])
    return losses, np.zeros(len(losses), dtype=np.int32)


def others(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each of N samples another one, drawn among those of another label; itself if none is."""
    order = np.argsort(labels, kind="stable")
    ordered, result = labels[order], np.arange(len(labels))
    for start in range(0, len(labels), ROWS_AT_ONCE):  # as many arrays of N would fill the memory
        own = labels[start : start + ROWS_AT_ONCE]
        first, last = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
        different = len(labels) - (last - first)
        place = (random.random(len(own)) * different).astype(np.int64)
        place += np.where(place >= first, last - first, 0)
        found = order[np.minimum(place, len(labels) - 1)]
        result[start : start + len(own)][different > 0] = found[different > 0]
    return result
