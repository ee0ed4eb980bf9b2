"""Columns as long as the pool, in files that are mapped into memory, worked on a block at a time.

So a column takes no memory that the system could not take back, and what is computed of it no more
than a block's.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike

from tsqlora.artefacts import os_errors

ROWS = 65_536
"""Rows of a block."""
SMALL = 2**18
"""Bytes up to which a column stays in memory."""


class _Mapping(mmap.mmap):
    """One that can be referred to weakly."""


_open: weakref.WeakValueDictionary[int, _Mapping] = weakref.WeakValueDictionary()


def mapping_of(descriptor: int, size: int = 0, writable: bool = False) -> mmap.mmap:
    """An open file, mapped so that `release` knows of it; it may be closed."""
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    mapping = _Mapping(descriptor, size, access=access)
    _open[id(mapping)] = mapping
    return mapping


def release() -> None:
    """Let go of the pages of all that is mapped; they are read again when wanted."""
    for mapping in list(_open.values()) if hasattr(mmap, "MADV_DONTNEED") else ():
        mapping.madvise(mmap.MADV_DONTNEED)


def column(samples: int, dtype: DTypeLike = np.float64, fill: float = 0) -> np.ndarray:
    """An array (N) of one number; where it is large, in a file without a name.

    Raises:
        RunError: there is no room for it among the temporary files.
    """
    size = samples * np.dtype(dtype).itemsize
    if size <= SMALL:
        return np.full(samples, fill, dtype)
    with os_errors(tempfile.gettempdir()), tempfile.TemporaryFile(prefix="tsqlora-") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk shows now, not when a page is written
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
        made = np.frombuffer(mapping_of(file.fileno(), size, writable=True), dtype)
    if fill:
        made.fill(fill)
    return made


def blocks_of(samples: int) -> Iterator[slice]:
    """0 to N in slices of at most `ROWS`."""
    for start in range(0, samples, ROWS):
        yield slice(start, min(start + ROWS, samples))


def copied(values: np.ndarray, dtype: DTypeLike | None = None) -> np.ndarray:
    """The same values in a column of their own."""
    made = column(len(values), values.dtype if dtype is None else dtype)
    made[:] = values
    return made


def kept(values: np.ndarray, which: np.ndarray, dtype: DTypeLike | None = None) -> np.ndarray:
    """`values[which]` for a mask (N)."""
    made = column(int(which.sum()), values.dtype if dtype is None else dtype)
    start = 0
    for rows in blocks_of(len(values)):
        found = values[rows][which[rows]]
        made[start : start + len(found)] = found
        start += len(found)
    return made


def distinct(values: np.ndarray) -> np.ndarray:
    """What values there are, in order."""
    found = [np.unique(values[rows]) for rows in blocks_of(len(values))]
    return np.unique(np.concatenate([values[:0], *found]))


def in_python(values: np.ndarray) -> Iterator[int]:
    """Python's own integers, which take several times the memory, a block at a time."""
    for rows in blocks_of(len(values)):
        yield from values[rows].tolist()
