"""Which samples pull where the others pull: cosines of sketched gradients, block by block.

A pool's sketches may be larger than memory, so they are only ever seen in blocks of rows, and only
their sums are kept. NumPy and SciPy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from tsqlora.columns import column, distinct, release

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Block = tuple[Ints, Floats]
"""Positions (n) of samples and their sketches (n, k)."""

ROWS = 1024
"""Rows that are worked on at a time."""


class Stored(Protocol):
    """Sketches of N samples that lie elsewhere. `size` is k, their length."""

    size: int

    def blocks(self) -> Iterator[Block]:
        """All samples, in the same order every time."""


Sketches = Floats | Stored
"""(N, k)."""


def blocks(sketches: Sketches) -> Iterator[Block]:
    """The sketches in blocks of at most `ROWS`."""
    parts = (
        [(np.arange(len(sketches)), sketches)]
        if isinstance(sketches, np.ndarray)
        else sketches.blocks()
    )
    for positions, rows in parts:
        for start in range(0, len(rows), ROWS):
            yield positions[start : start + ROWS], rows[start : start + ROWS]


def width(sketches: Sketches) -> int:
    """k; 0 where nothing was sketched."""
    return int(sketches.shape[1]) if isinstance(sketches, np.ndarray) else sketches.size


def with_mean(sketches: Sketches, samples: int) -> Floats:
    """The cosine (N) of each sketch with the mean of them all."""
    mean = sum(rows.sum(0, dtype=np.float64) for _, rows in blocks(sketches)) / samples
    return with_direction(sketches, mean, samples)


def with_others(sketches: Sketches, groups: Ints) -> Floats:
    """The cosine (N) of each sketch with the mean unit sketch of the others of its group (N)."""
    values = distinct(groups)
    sums = np.zeros((len(values), width(sketches)))
    for positions, rows in blocks(sketches):
        index = np.searchsorted(values, groups[positions])
        member = csr_matrix((np.ones(len(rows)), (index, np.arange(len(rows)))))
        sums[: member.shape[0]] += member @ unit(rows).astype(np.float64)
    result = column(len(groups))
    for positions, rows in blocks(sketches):
        units = unit(rows)
        index = np.searchsorted(values, groups[positions])
        result[positions] = row_cosine(units, sums[index] - units)
    release()
    return result


def with_direction(sketches: Sketches, direction: Floats, samples: int) -> Floats:
    """The cosine (N) of each sketch with one direction (k)."""
    result = column(samples)
    for positions, rows in blocks(sketches):
        result[positions] = row_cosine(rows, np.broadcast_to(direction, rows.shape))
    return result


def unit(rows: Floats) -> Floats:
    """Rows divided by their length; zero rows stay zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def row_cosine(a: Floats, b: Floats) -> Floats:
    """Cosine of each row of `a` with the same row of `b`; 0 where either is zero."""
    return np.einsum("nk,nk->n", unit(a), unit(np.asarray(b)))  # type: ignore[no-any-return]
