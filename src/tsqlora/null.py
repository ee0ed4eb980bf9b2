"""The null of credibility: losses of inputs with other samples' targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from tsqlora.batches import Collator, Pool, evaluating, forward_losses, passing, places
from tsqlora.columns import blocks_of, column, copied, distinct, kept
from tsqlora.credibility import ENOUGH
from tsqlora.losses import CLASSIFICATION, REGRESSION, sample_losses
from tsqlora.measuring import as_numpy
from tsqlora.memory import Halving
from tsqlora.mismatch import matched_pairs, mismatched_pairs
from tsqlora.parts import Measured

NULL_SAMPLES = 500
"""Mismatched pairs that make the null where it takes passes of its own (generation)."""
FREE = (CLASSIFICATION, REGRESSION)
"""Kinds whose null takes no pass."""

Null = tuple[np.ndarray, np.ndarray]
"""Losses of wrong targets (M), and the class that each names or, of generation, the row that it is
the target of (M)."""


def null_of_outputs(parts: Measured, kind: str, seed: int) -> Null:
    """Of a class or number: each sample's stored output against another one's target.

    A class that fewer than `ENOUGH` of these name is named by all samples of another label instead,
    or by `NULL_SAMPLES` of them.
    """
    labels = parts.column("label")
    partners = others(labels, np.random.default_rng(seed))
    losses, wrong_labels = (
        column(len(labels), np.float32, np.nan),
        column(len(labels), labels.dtype),
    )
    for rows in blocks_of(len(labels)):
        wrong_labels[rows] = labels[partners[rows]]
    for positions, outputs in parts.blocks("output"):
        wrong = torch.from_numpy(wrong_labels[positions])
        wrong = wrong.long() if kind == CLASSIFICATION else wrong.float()
        losses[positions] = as_numpy(sample_losses(kind, torch.tensor(outputs), wrong))
    real = wrong_labels != labels
    if kind != CLASSIFICATION:
        return kept(losses, real), column(int(real.sum()), np.int32)
    found = kept(losses, real), kept(wrong_labels, real, np.int32)
    counts = np.bincount(found[1], minlength=int(labels.max()) + 1)
    rare = [k for k in map(int, distinct(labels)) if counts[k] < ENOUGH]
    return _with_rare(found, rare, parts, labels, seed) if rare else found


def _with_rare(
    found: Null, rare: Sequence[int], parts: Measured, labels: np.ndarray, seed: int
) -> Null:
    """`found`, its losses of `rare` classes replaced by what other samples' outputs cost there."""
    common = ~np.isin(found[1], rare)
    losses, named = [found[0][common]], [found[1][common]]
    chosen = places(len(labels), NULL_SAMPLES, seed)
    for positions, outputs in parts.blocks("output"):
        of_it = np.isin(positions, chosen)
        own, logits = labels[positions[of_it]], torch.tensor(outputs[of_it])
        for k in rare:
            wrong = torch.full((len(own),), k)
            losses.append(as_numpy(sample_losses(CLASSIFICATION, logits, wrong))[own != k])
            named.append(np.full(len(losses[-1]), k, np.int32))
    return np.concatenate(losses), np.concatenate(named)


def null_of_pairs(
    model: nn.Module,
    kind: str,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    seed: int,
    most: int = NULL_SAMPLES,
    dropout: bool = False,
    own: bool = False,
) -> Null:
    """Of generation: at most so many inputs paired with others' targets, a forward each.

    With `dropout` it is on, as where the losses beside them were taken. `own` gives the losses of
    the same targets after their own inputs instead.
    """
    chosen = places(len(dataset), most, seed)
    found = mismatched_pairs(dataset.select(chosen), kind)
    if found is None:
        return np.zeros(0), chosen[:0]
    owners = chosen[found[1]]
    rows = matched_pairs(dataset.select(owners), kind) if own else found[0]
    pool, halving, losses = Pool(model, rows, collator, batch_size), Halving(), np.zeros(len(rows))
    bar = passing(pool.tokens, pool.plan, "mismatched pairs")
    drawn = _drawn(model, seed) if dropout else nullcontext()
    with evaluating(model), torch.no_grad(), drawn, bar as passed:
        for planned in pool.plan:
            for positions, batch in pool.take(planned):
                pieces = halving(lambda piece: forward_losses(model, kind, piece), batch)
                losses[positions] = np.concatenate([as_numpy(each) for each in pieces])
            passed(planned)
    return losses, owners


@contextmanager
def _drawn(model: nn.Module, seed: int) -> Iterator[None]:
    """Dropout on, drawn apart from whatever else is."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        yield
        model.eval()


def others(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each of N samples another one, drawn among those of another label; itself if none is."""
    order = copied(np.argsort(labels, kind="stable"))
    ordered, result = column(len(labels), labels.dtype), column(len(labels), np.int64)
    for rows in blocks_of(len(labels)):
        ordered[rows] = labels[order[rows]]
    for rows in blocks_of(len(labels)):
        own = labels[rows]
        first, last = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
        different = len(labels) - (last - first)
        place = (random.random(len(own)) * different).astype(np.int64)
        place += np.where(place >= first, last - first, 0)
        found = order[np.minimum(place, len(labels) - 1)]
        result[rows] = np.where(different > 0, found, np.arange(rows.start, rows.stop))
    return result
