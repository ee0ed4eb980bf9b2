"""What targets cost after other samples' inputs, on disk: of some, and of all where it tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import nn

from tsqlora import processes
from tsqlora.batches import Collator
from tsqlora.measuring import LAST_TURN
from tsqlora.null import NULL_SAMPLES, null_of_pairs
from tsqlora.pairs import from_pairs
from tsqlora.parts import Measured, Parts

PAIRS = "pairs"
"""The folder of what is asked for, beside those of what is measured."""
BLOCK = 2000
"""Samples whose inputs and targets are paired among each other: what an interruption loses."""


@dataclass(frozen=True)
class Asking:
    """Pairs of a pool's inputs and targets, a forward each, a block of them at a time.

    Attributes:
        share: of several processes this one takes every so many-th block from the first on.
    """

    model: nn.Module
    kind: str
    rows: Dataset
    collator: Collator
    batch_size: int
    seed: int
    share: tuple[int, int]

    def ask(self, folder: Path, key: str, losses: Callable[[], np.ndarray]) -> None:
        """Ask for the first block, and for all where some of its targets look wrong.

        `losses` (N) are those after their own inputs; `key` says what the parts in the folder have
        to be measured on to be gone on with.
        """
        parts, (first, every) = Parts(folder / PAIRS, len(self.rows)), self.share
        blocks = pair_blocks(len(self.rows), self.seed)
        if first == 0:
            parts.prepare(key)
            self._fill(parts, blocks, [0])
        self._wait()
        owners, mismatched = asked(folder)
        if (from_pairs(losses()[owners], mismatched).values < 1).any():
            self._fill(parts, blocks, range(1 + first, len(blocks), every))
            self._wait()

    def _fill(self, parts: Parts, blocks: list[np.ndarray], numbers: Iterable[int]) -> None:
        there = parts.there()
        for number in numbers:
            if number in there:
                continue
            began, block = time.perf_counter(), blocks[number]
            how = self.collator, self.batch_size, self.seed, len(block)
            losses, owners = null_of_pairs(self.model, self.kind, self.rows.select(block), *how)
            columns = {"position": block[owners], "mismatched": losses}
            parts.write(number, [columns], 0, None, time.perf_counter() - began)

    def _wait(self) -> None:
        if self.share[1] > 1:
            processes.wait()


def pair_blocks(samples: int, seed: int) -> list[np.ndarray]:
    """Positions in random order, so that rows of one source are not paired: `NULL_SAMPLES` first,
    then `BLOCK` at a time."""
    order = np.random.default_rng(seed).permutation(samples)
    return np.split(order, range(NULL_SAMPLES, samples, BLOCK))


def asked(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The samples asked for (M), in their order, and the losses of their targets after others'
    inputs (M)."""
    parts = Parts(folder / PAIRS, 0)
    found = list(parts.blocks("mismatched"))
    positions = np.concatenate([np.zeros(0, np.int64), *(each for each, _ in found)])
    losses = np.concatenate([np.zeros(0), *(each for _, each in found)])
    order = np.argsort(positions)
    return positions[order], losses[order]


def own_losses(parts: Measured) -> np.ndarray:
    """Losses of what is paired (N), after its own input: of chats of the last turn."""
    return parts.column(LAST_TURN if LAST_TURN in parts.names else "loss")
