"""Texts of tokens as sets of hashed n-grams: what MinHash compares.

A text of n tokens is the set of its tokens and of its pairs of neighbours, its two ends counted as
neighbours too, each numbered where it comes again: 2n + 1 shingles. How alike two texts are is the
lesser of J = |A ∩ B| / |A ∪ B| and of J with every shingle x weighing log(1 + N / N_x), N_x the
samples of all N that hold it (inverse document frequency; Spärck Jones 1972). A token left out of n
gives a J of (n - 1) / (n + 1) or more, one said twice (2n + 1) / (2n + 3), another in its place
(n - 1) / (n + 2): which as a rule is a rare one, so that the weights tell "a fear of food" from "a
fear of fish".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tsqlora.columns import column

PIECE = 2**21
"""Shingles that are worked on at once."""
SPARE = 8
"""Bits of a hash that N_x is not counted by: 64 MiB, of which a small pool touches little."""

Block = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens of some samples one after the other, how many each has, and a number that samples must
share to be alike at all."""

_START, _END = -1, -2
_ONE, _TWO = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True)
class Shingles:
    """Sample i's hashes are `hashes[starts[i]:starts[i + 1]]`, in order and none twice.

    `held[h >> SPARE]` is N_x of the shingle whose hash is h, and of others that share these bits.
    """

    hashes: np.ndarray
    starts: np.ndarray
    held: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of some samples (M), one after the other, each with its number from 0."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        owner = np.repeat(np.arange(len(rows)), lengths)
        inside = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return owner, self.hashes[self.starts[rows][owner] + inside]

    def weights(self, hashes: np.ndarray) -> np.ndarray:
        """log(1 + N / N_x) of shingles."""
        return np.log1p(len(self) / self.held[hashes >> np.uint32(SPARE)])


def shingles_of(blocks: Iterator[Block], samples: int, tokens: int) -> Shingles:
    """The shingles of all blocks, of at most so many samples and tokens."""
    hashes = column(2 * tokens + samples, np.uint32)
    starts = column(samples + 1, np.int64)
    first = used = 0
    for values, lengths, apart in blocks:
        made, counts = _shingled(values, lengths, apart)
        hashes[used : used + len(made)] = made
        starts[first + 1 : first + 1 + len(counts)] = used + np.cumsum(counts)
        first, used = first + len(counts), used + len(made)
    return Shingles(hashes[:used], starts[: first + 1], _held(hashes[:used], starts[: first + 1]))


def _held(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many samples hold the shingles of each number that hashes without `SPARE` bits are."""
    held = column(2 ** (32 - SPARE), np.uint32)
    for rows in pieces(starts):
        some = hashes[starts[rows.start] : starts[rows.stop]] >> np.uint32(SPARE)
        numbers, counts = np.unique(some, return_counts=True)
        held[numbers] += counts.astype(np.uint32)
    return held


def similarity(shingles: Shingles, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The lesser J of pairs of samples (M)."""
    sizes = np.diff(shingles.starts)
    found = np.zeros(len(left))
    ends = np.cumsum(sizes[left] + sizes[right])
    start = 0
    while start < len(left):
        budget = (ends[start - 1] if start else 0) + PIECE
        stop = max(int(np.searchsorted(ends, budget, "right")), start + 1)
        found[start:stop] = _alike(shingles, left[start:stop], right[start:stop])
        start = stop
    return found


def _alike(shingles: Shingles, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The lesser J of pairs (M): both sides are in order, so one search serves all."""
    owner, hashes = shingles.of(left)
    other, others = shingles.of(right)
    wanted = (owner.astype(np.uint64) << np.uint64(32)) | hashes
    there = (other.astype(np.uint64) << np.uint64(32)) | others
    places = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
    shared = there[places] == wanted
    weights, count = shingles.weights(hashes), len(left)
    both, one, two = (
        np.stack([np.bincount(whose, each, count) for each in (None, weight)])
        for whose, weight in (
            (owner[shared], weights[shared]),
            (owner, weights),
            (other, shingles.weights(others)),
        )
    )
    return (both / (one + two - both)).min(axis=0)


def pieces(starts: np.ndarray) -> Iterator[slice]:
    """Samples in slices of about `PIECE` shingles, one sample at least."""
    first, samples = 0, len(starts) - 1
    while first < samples:
        stop = int(np.searchsorted(starts, starts[first] + PIECE, "right")) - 1
        stop = min(max(stop, first + 1), samples)
        yield slice(first, stop)
        first = stop


def _shingled(
    values: np.ndarray, lengths: np.ndarray, apart: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of some samples, in order within each, and how many each has."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths + 1)
    following = np.full(len(values) + len(lengths), _END, np.int64)
    inner = np.ones(len(following), bool)
    inner[ends - 1] = False
    following[inner] = values
    leading = np.full(len(following), _START, np.int64)
    leading[1:][inner[:-1]] = following[:-1][inner[:-1]]
    single = mixed(values.astype(np.uint64) * _ONE)
    pairs = mixed(mixed(leading.astype(np.uint64) * _ONE) + following.astype(np.uint64) * _TWO)
    of_pair = np.repeat(np.arange(len(lengths)), lengths + 1)
    counts = 2 * lengths + 1
    grams = _in_order(np.concatenate([single, pairs]), np.concatenate([owner, of_pair]))
    owner = np.repeat(np.arange(len(lengths)), counts)
    numbered = mixed(grams + mixed(_occurrence(grams, owner) * _ONE + apart[owner]))
    return _in_order(numbered, owner), counts


def _in_order(hashes: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Hashes in 32 bits, sample by sample, in order."""
    codes = (owner.astype(np.uint64) << np.uint64(32)) | (hashes >> np.uint64(32))
    codes.sort()
    return codes.astype(np.uint32)


def _occurrence(grams: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """How many equal ones stand before each in its sample; they stand side by side."""
    new = np.ones(len(grams), bool)
    new[1:] = (grams[1:] != grams[:-1]) | (owner[1:] != owner[:-1])
    places = np.arange(len(grams))
    return (places - np.maximum.accumulate(np.where(new, places, 0))).astype(np.uint64)


def mixed(values: np.ndarray) -> np.ndarray:
    """Well-mixed 64 bits of 64 bits (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
