"""How many samples a batch holds, found by trial: twice as many as long as they fit and it pays."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import nn

from tsqlora.batches import Batch, Collator, Pool
from tsqlora.losses import infer_kind
from tsqlora.measuring import Meter, Wanted
from tsqlora.per_sample_grads import PROBED
from tsqlora.progress import progress

SMALLEST, LARGEST = 8, 1024
PAYS = 0.95
"""Twice the samples are worth their memory if each then takes this share of its time, or less."""
SHARE_OF_POOL = 16
"""At most one in so many samples is tried out."""
ROOM = 0.5
"""Share of the free memory that a batch may be expected to take on a CPU, where the system ends a
process for which it runs out."""


def fitting_batch_size(
    model: nn.Module, dataset: Dataset, collator: Collator, wanted: Wanted
) -> int:
    """The number of the longest samples that fit, where each takes least time, by measuring them.

    On an accelerator larger batches are tried until memory runs out or they pay no more; on a CPU
    until they pay no more, which is soon, or until twice as much would not fit what is free.
    """
    pool = Pool(model, dataset, collator, LARGEST)
    longest = pool.plan[0]
    meter = Meter(model, infer_kind(model), wanted)
    meter.prepare(_taken(pool, longest[:PROBED]))
    best, least = SMALLEST, math.inf
    size, most = SMALLEST, min(LARGEST, len(longest), len(dataset) // SHARE_OF_POOL)
    sizes = (most // SMALLEST).bit_length()
    with progress("finding the batch size", sizes, "sizes") as tried:
        while size <= most and not meter.single:
            before, batch = _resident(), _taken(pool, longest[:size])
            seconds = min(_timed(meter, batch) for _ in range(2)) / size
            if meter.halving.halvings or seconds > PAYS * least:
                break
            best, least = size, seconds
            if not _room(model, 2 * (_resident() - before)):
                break
            size *= 2
            tried()
    return best


def _taken(pool: Pool, positions: np.ndarray) -> Batch:
    return next(pool.take(positions))[1]


def _timed(meter: Meter, batch: Batch) -> float:
    started = time.perf_counter()
    meter.measure(batch)  # ends on the CPU, so it waits for the accelerator
    meter.take_units()
    return time.perf_counter() - started


def _room(model: nn.Module, wanted: float) -> bool:
    """Whether so many bytes more can be had; an accelerator says itself when they cannot."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return not on_cpu or wanted <= ROOM * _free()


def _resident() -> float:
    """The most bytes that this process has held so far; 0 where the system does not tell."""
    return 1024 * _kilobytes(Path("/proc/self/status"), "VmHWM", 0)


def _free() -> float:
    """Bytes that can still be had; infinite where the system does not tell."""
    return 1024 * _kilobytes(Path("/proc/meminfo"), "MemAvailable", math.inf)


def _kilobytes(file: Path, name: str, unknown: float) -> float:
    if not file.exists():
        return unknown
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [f"{name}:"]), unknown)
