"""Which samples say nearly the same: MinHash over their shingles, verified, joined to groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tsqlora.columns import blocks_of
from tsqlora.errors import DataError
from tsqlora.losses import IGNORED
from tsqlora.shingles import Block, Shingles, mixed, pieces, shingles_of, similarity

THRESHOLD = 0.6
"""How alike: what lets a token be left out of six, and another be put in its place in long texts
alone, or where it is common (benchmarks/LOG.md)."""
HASHES = 160
"""Random orders of the shingles, in bands."""
MISSED = 1e-4
"""Of pairs just as alike as the threshold, about so many share no band."""
WINDOW = 8
"""Pairs that a sample is looked at in, in each band: those of one band are rarely more."""
SEED = 0

_ALONE = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Khmer}\p{Lao}\p{Myanmar}])"


def near_duplicates(rows: Dataset, threshold: float = THRESHOLD) -> np.ndarray:
    """The group of every encoded sample (N), numbered from 0 in the order of their first samples.

    Two samples are of one group if their inputs are so much alike (J of `shingles.py`) and their
    targets are the same, or through others. An input is `input_ids` without the tokens that are
    targets; plain text, of which every token is one, is all input. MinHash with banding (Broder
    1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, §3) finds the pairs; it misses
    about one in 10,000 of those that are just alike enough. None is taken unverified.

    Raises:
        DataError: the samples have no `input_ids`.
    """
    if "input_ids" not in rows.column_names:
        raise DataError(
            "near-duplicates are looked for among tokens, but the samples have no `input_ids`: "
            f"they have {', '.join(rows.column_names)}. Encode them first."
        )
    return groups(shingles_of(_encoded(rows), len(rows), _tokens(rows)), threshold)


def groups(shingles: Shingles, threshold: float) -> np.ndarray:
    """The group of every sample (N): joined where J is the threshold or more."""
    depth, bands = banding(threshold)
    random = np.random.default_rng(SEED)
    group = np.arange(len(shingles))
    before = np.zeros(len(shingles), np.uint64)
    for _ in range(bands):
        keys = _band(shingles, random, depth)
        left, right = _neighbours(keys, before, group)
        alike = similarity(shingles, left, right) >= threshold
        group = _joined(group, left[alike], right[alike])
        before = keys
    return group


def banding(threshold: float) -> tuple[int, int]:
    """(orders in a band, bands): as many in a band as `MISSED` lets there be."""
    for depth in range(16, 1, -1):
        if (1 - threshold**depth) ** (HASHES // depth) <= MISSED:
            return depth, HASHES // depth
    return 1, HASHES


def _band(shingles: Shingles, random: np.random.Generator, depth: int) -> np.ndarray:
    """One number (N) for the first shingle of every sample in each of `depth` random orders."""
    keys = np.zeros(len(shingles), np.uint64)
    masks = random.integers(0, 2**32, depth, dtype=np.uint32)
    factors = random.integers(0, 2**31, depth, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    for rows in pieces(shingles.starts):
        begin, end = shingles.starts[rows.start], shingles.starts[rows.stop]
        hashes, starts = shingles.hashes[begin:end], shingles.starts[rows] - begin
        for mask, factor in zip(masks, factors, strict=True):
            lowest = np.minimum.reduceat((hashes ^ mask) * factor, starts)
            keys[rows] = mixed(keys[rows] + lowest)
    return keys


def _neighbours(
    keys: np.ndarray, before: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of one key that are of two groups yet; of many, those that were together before too."""
    order = np.lexsort((before, keys))
    pairs = []
    for distance in range(1, min(WINDOW, len(order) - 1) + 1):
        left, right = order[:-distance], order[distance:]
        new = (keys[left] == keys[right]) & (group[left] != group[right])
        pairs.append(np.stack([left[new], right[new]]))
    both = np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1)
    return both[0], both[1]


def _joined(group: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The groups when these pairs are of one, numbered in the order of their first samples."""
    shape = (len(group), len(group))
    edges = coo_array((np.ones(len(left), np.int8), (group[left], group[right])), shape=shape)
    joined = connected_components(edges, directed=False)[1][group]
    _, first, number = np.unique(joined, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def _encoded(rows: Dataset) -> Iterator[Block]:
    """The input of every sample, and a number for its target."""
    labelled = "labels" in rows.column_names
    for block in blocks_of(len(rows)):
        table = rows.with_format("arrow")[block]
        values, lengths = _flat(table["input_ids"].combine_chunks())
        labels = table["labels"].combine_chunks() if labelled else None
        if labels is None:
            yield values, lengths, np.zeros(len(lengths), np.uint64)
        elif not pa.types.is_nested(labels.type):
            numbers = labels.to_numpy(zero_copy_only=False).astype(np.float64)
            yield values, lengths, mixed(numbers.view(np.uint64))
        else:
            yield _split(values, lengths, *_flat(labels))


def _split(
    values: np.ndarray, lengths: np.ndarray, labels: np.ndarray, label_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts without completions where the labels mark these; targets as one number a sample."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    label_owner = np.repeat(np.arange(len(lengths)), label_lengths)
    masked = labels == IGNORED
    within = (lengths == label_lengths) & (_sums(masked, label_lengths) > 0)
    kept = np.ones(len(values), bool)
    kept[within[owner]] = masked[within[label_owner]]
    place = np.arange(len(labels)) - np.repeat(
        np.cumsum(label_lengths) - label_lengths, label_lengths
    )
    place -= np.where(within[label_owner], _before(masked, label_lengths), 0)
    code = mixed(mixed(labels.astype(np.int64).astype(np.uint64)) + (place + 1).astype(np.uint64))
    apart = _sums(np.where(masked & within[label_owner], np.uint64(0), code), label_lengths)
    apart[_plain(values, lengths, labels, label_lengths)] = 0
    return values[kept], _sums(kept, lengths), apart


def _plain(
    values: np.ndarray, lengths: np.ndarray, labels: np.ndarray, label_lengths: np.ndarray
) -> np.ndarray:
    """Which samples are all target (N)."""
    same = lengths == label_lengths
    owner, label_owner = (np.repeat(np.arange(len(n)), n) for n in (lengths, label_lengths))
    differs = values[same[owner]] != labels[same[label_owner]]
    same[np.unique(owner[same[owner]][differs])] = False
    return same


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The sum of every sample's values (N)."""
    dtype = np.int64 if values.dtype == bool else values.dtype
    total = np.concatenate([np.zeros(1, dtype), np.cumsum(values, dtype=dtype)])
    ends = np.cumsum(lengths)
    return total[ends] - total[ends - lengths]


def _before(marked: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many marked ones stand before each value in its sample."""
    running = np.cumsum(marked) - marked
    starts = np.cumsum(lengths) - lengths
    return running - np.repeat(running[np.minimum(starts, len(running) - 1)], lengths)


def _flat(lists: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return pc.list_flatten(lists).to_numpy(zero_copy_only=False), lengths.astype(np.int64)


def _tokens(rows: Dataset) -> int:
    """How many there are in all."""
    table = rows.with_format("arrow")
    lengths = (pc.list_value_length(table[block]["input_ids"]) for block in blocks_of(len(rows)))
    return sum(pc.sum(each).as_py() or 0 for each in lengths)


def near_duplicate_texts(texts: list[str], threshold: float = THRESHOLD) -> np.ndarray:
    """The group of every text (N) as `near_duplicates` has it, by words and whatever the targets.

    A word is a run of letters and digits, in lower case, or one sign of a script without spaces.
    """
    if not texts:
        return np.zeros(0, np.int64)
    lower = pc.utf8_lower(pa.array(texts, pa.large_string()))
    apart = pc.replace_substring_regex(lower, _ALONE, r" \1 ")
    words = pc.split_pattern_regex(apart, r"[^\pL\pN\pM]+")
    values, lengths = pc.list_flatten(words), pc.list_value_length(words).to_numpy()
    known = pc.not_equal(values, "")
    owner = np.repeat(np.arange(len(texts)), lengths)
    counts = np.bincount(owner[known.to_numpy(zero_copy_only=False)], minlength=len(texts))
    tokens = values.filter(known).dictionary_encode().indices.to_numpy()
    block = (tokens, counts, np.zeros(len(texts), np.uint64))
    return groups(shingles_of(iter([block]), len(texts), len(tokens)), threshold)
