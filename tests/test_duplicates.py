"""Near-duplicates: what is found, what is kept apart, and that the fast way agrees with a loop."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from reference import looped_duplicates
from tsqlora import duplicates
from tsqlora.duplicates import THRESHOLD, WINDOW, banding, near_duplicates
from tsqlora.errors import DataError
from tsqlora.shingles import Shingles, similarity


def encoded(texts: list[list[int]], targets: list[Any] | None = None) -> Dataset:
    columns: dict[str, Any] = {"input_ids": texts}
    if targets is not None:
        columns["labels"] = targets
    return Dataset.from_dict(columns)


def together(groups: np.ndarray) -> set[tuple[int, int]]:
    """All pairs of one group."""
    same = groups[:, None] == groups[None]
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(same, 1)), strict=True)}


words = st.lists(st.integers(0, 5), max_size=9)


@st.composite
def similar_pools(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Texts, some of them made of others by leaving out, repeating or changing a token."""
    texts = draw(st.lists(words, min_size=1, max_size=5))
    for _ in range(draw(st.integers(0, 8))):
        text = list(draw(st.sampled_from(texts)))
        if text:
            place = draw(st.integers(0, len(text) - 1))
            text[place : place + 1] = draw(st.sampled_from([[], [text[place]] * 2, [6], text[:0]]))
        texts.append(text)
    targets = draw(st.lists(st.integers(0, 1), min_size=len(texts), max_size=len(texts)))
    return texts, targets


@given(similar_pools(), st.sampled_from([0.5, 0.7, 0.9, 1.0]))
def test_groups_are_those_of_a_loop_over_all_pairs(
    pool: tuple[list[list[int]], list[int]], threshold: float
) -> None:
    """Never joined below the threshold; always a little above it, where MinHash cannot miss."""
    texts, targets = pool
    found = together(near_duplicates(encoded(texts, targets), threshold))
    assert found <= together(np.array(looped_duplicates(texts, targets, threshold)))
    surely = min(threshold + 0.1, 1.0)
    assert found >= together(np.array(looped_duplicates(texts, targets, surely)))


def edited_pool(words: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """200 texts, 400 copies of them with one word left out or said twice, and whose copies."""
    chance = random.Random(seed)
    texts = [chance.sample(range(10, 500), words) for _ in range(200)]
    sources = [chance.randrange(200) for _ in range(400)]
    for source in sources:
        text, place = texts[source], chance.randrange(words)
        texts.append([*text[:place], *chance.choice([[], text[place : place + 1] * 2]),
                      *text[place + 1 :]])  # fmt: skip
    return texts, [*range(200), *sources]


@pytest.mark.parametrize("words", [6, 7, 12, 40])
def test_a_word_left_out_or_said_twice_is_found_and_nothing_else(words: int) -> None:
    texts, sources = edited_pool(words, seed=words)
    assert near_duplicates(encoded(texts)).tolist() == sources


def test_another_word_in_a_short_text_is_another_text() -> None:
    texts = [[1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6], [1, 2, 3, 4, 5, 9]]
    assert near_duplicates(encoded(texts)).tolist() == [0, 1, 2]


def test_one_phrase_about_many_things_is_many_texts() -> None:
    """ "What is a fear of food?", "... of fish?": at J ≥ 0.6 alone they would be one."""
    phrases = [[0, 1, 2, 3, 4, 5, 100 + i, 6, 7] for i in range(12)]
    others = [[0, *range(200 + 20 * i, 207 + 20 * i), 7] for i in range(200)]
    assert len(set(near_duplicates(encoded(phrases + others)).tolist())) == 212
    copies = [[*text[:4], *text[5:]] for text in others]
    found = near_duplicates(encoded(others + copies))
    assert found.tolist() == 2 * list(range(200))


def test_the_order_of_words_counts() -> None:
    assert near_duplicates(encoded([[1, 2, 3], [3, 2, 1]])).tolist() == [0, 1]


def test_exact_copies_are_found_at_any_length_and_number() -> None:
    texts = [[7], [8], [7], [], [], *[[9, 9]] * 3000, list(range(5000)), list(range(5000))]
    assert near_duplicates(encoded(texts)).tolist() == [0, 1, 0, 2, 2, *[3] * 3000, 4, 4]


@pytest.mark.parametrize("targets", [[0, 1, 0], [0.5, -0.5, 0.5], [[4, 5], [5, 4], [4, 5]]])
def test_one_input_with_two_targets_is_two_groups(targets: list[Any]) -> None:
    assert near_duplicates(encoded([[1, 2, 3]] * 3, targets)).tolist() == [0, 1, 0]


def test_completions_are_the_targets_of_their_prompts() -> None:
    prompt, shorter = list(range(10, 20)), list(range(11, 20))
    rows = [(prompt, [5, 6]), (prompt, [5, 7]), (shorter, [5, 6]), (prompt, [6, 5])]
    texts = [given + wanted for given, wanted in rows]
    labels = [[-100] * len(given) + wanted for given, wanted in rows]
    assert near_duplicates(encoded(texts, labels)).tolist() == [0, 1, 0, 2]


def test_plain_text_is_input_and_no_target() -> None:
    texts = [list(range(20)), list(range(1, 20)), list(range(40, 60))]
    assert near_duplicates(encoded(texts, texts)).tolist() == [0, 0, 1]


def test_groups_do_not_depend_on_the_order_of_the_samples() -> None:
    texts, sources = edited_pool(8, seed=3)
    order = np.random.default_rng(0).permutation(len(texts))
    groups = near_duplicates(encoded([texts[i] for i in order]))
    assert together(groups) == together(np.array(sources)[order])


def test_a_pool_of_selected_rows_is_read_as_selected() -> None:
    rows = encoded([[1, 2], [3, 4], [1, 2], [5, 6]]).select([2, 1, 0])
    assert near_duplicates(rows).tolist() == [0, 1, 0]


def test_samples_without_tokens_are_refused_with_what_they_have() -> None:
    with pytest.raises(DataError, match="`input_ids`: they have pixels"):
        near_duplicates(Dataset.from_dict({"pixels": [1]}))


def test_texts_that_share_most_words_are_compared_with_few_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begins = list(range(40))
    rows = encoded([[*begins, *range(1000 + 40 * i, 1040 + 40 * i)] for i in range(1000)])
    counted = []

    def counting(shingles: Shingles, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        counted.append(len(left))
        return similarity(shingles, left, right)

    monkeypatch.setattr(duplicates, "similarity", counting)
    assert len(set(near_duplicates(rows))) == 1000
    _, bands = banding(THRESHOLD)
    assert 0 < sum(counted) <= 1000 * bands * WINDOW  # of 499,500 pairs a band
