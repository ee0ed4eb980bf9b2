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
from tsqlora.parts import Parts

NULL_SAMPLES = 500
"""Mismatched pairs that make the null where it takes passes of its own (generation)."""
FREE = (CLASSIFICATION, REGRESSION)
"""Kinds whose null takes no pass."""

Null = tuple[np.ndarray, np.ndarray]
"""Losses of wrong targets (M), and the class that each names (M)."""


def null_of_outputs(parts: Parts, kind: str, seed: int) -> Null:
    """Of a class or number: each sample's stored output against another one's target."""
    labels = parts.column("label")
    partners = others(labels, np.random.default_rng(seed))
    losses = np.full(len(labels), np.nan)
    for positions, outputs in parts.blocks("output"):
        wrong = torch.from_numpy(labels[partners[positions]])
        wrong = wrong.long() if kind == CLASSIFICATION else wrong.float()
        losses[positions] = as_numpy(sample_losses(kind, torch.tensor(outputs), wrong))
    real = labels[partners] != labels
    group = labels[partners][real].astype(np.int64)
    return losses[real], group if kind == CLASSIFICATION else np.zeros_like(group)


def null_of_pairs(
    model: nn.Module, kind: str, dataset: Dataset, collator: Collator, batch_size: int, seed: int
) -> Null:
    """Of generation: inputs paired with other samples' targets, a forward each."""
    wrong = mismatched_pairs(subset(dataset, NULL_SAMPLES, seed), kind)
    losses = np.zeros(0 if wrong is None else len(wrong))
    if wrong is not None:
        pool, halving = Pool(model, wrong, collator, batch_size), Halving()
        with evaluating(model), torch.no_grad():
            for planned in pool.plan:
                for positions, batch in pool.take(planned):
                    found = halving(lambda piece: forward_losses(model, kind, piece), batch)
                    losses[positions] = np.concatenate([as_numpy(each) for each in found])
    return losses, np.zeros(len(losses), dtype=np.int64)


def others(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each of N samples another one, drawn among those of another label; itself if none is."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    first, last = (
        np.searchsorted(ordered, labels, "left"),
        np.searchsorted(ordered, labels, "right"),
    )
    different = len(labels) - (last - first)
    place = (random.random(len(labels)) * different).astype(np.int64)
    place += np.where(place >= first, last - first, 0)
    return np.where(
        different > 0, order[np.minimum(place, len(labels) - 1)], np.arange(len(labels))
    )
