"""What the rows of a data set say as text, and how many tokens that is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tsqlora.chats import question_and_answer, turns_of
from tsqlora.data import render, require_columns
from tsqlora.errors import DataError
from tsqlora.looking import Chosen

TOKENS_A_WORD = 1.5
"""Where no tokenizer is at hand, of words and numbers in English."""
CHARACTERS_A_TOKEN = 3.0
"""The same for text without spaces between words."""
TOKENS_AROUND = 32
"""What a chat template adds to a question and its answer, a system prompt of its own with it."""
COVERED = 0.99
"""Share of the rows that fit `max_length` whole."""


def texts_of(rows: Dataset, chosen: Chosen) -> list[tuple[str, str]]:
    """(input, target to write) of the rows that have both, as text."""
    if "messages" in chosen.data:
        chats = _chats(rows, chosen)
        said = [(" ".join(str(turn.get("content")) for turn in chat), "") for chat in chats]
        return said or [("", "")]
    text, target = chosen.data["text"], chosen.data.get("target")
    require_columns(rows, chosen.columns, "data.train")
    specs = [text] if isinstance(text, str) else list(text)
    written = [target] if target and chosen.task in ("seq2seq", "causal-lm") else []
    found = []
    for row in rows:
        with suppress(DataError):  # a note says that values are missing
            answer = "".join(render(row, spec) for spec in written)
            found.append((" ".join(render(row, spec) for spec in specs), answer))
    return found or [("", "")]


def lengths_of(
    texts: Sequence[tuple[str, str]], chosen: Chosen, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[tuple[int, int, int], str]:
    """The middle, 99th percentile and longest length, in the model's tokens where it is here."""
    task = chosen.task
    both = [text + target if task == "causal-lm" else text for text, target in texts]
    others = [target for _, target in texts] if task == "seq2seq" else []
    counted = "tokens"
    if tokenizer is not None:
        counts = [len(ids) for ids in tokenizer(both, verbose=False)["input_ids"]]
        if others:
            written = tokenizer(text_target=others, verbose=False)["input_ids"]
            counts = np.maximum(counts, [len(ids) for ids in written]).tolist()
        counts = [count + 1 for count in counts] if task == "causal-lm" else counts
    else:
        counts = [_guessed(text) + TOKENS_AROUND * chosen.is_chat for text in both]
        counts = np.maximum(counts, [_guessed(text) for text in others or both]).tolist()
        counted = "tokens, guessed from words"
    middle, high = np.quantile(counts, [0.5, COVERED])
    return (int(middle), math.ceil(high), int(max(counts))), counted


def _guessed(text: str) -> int:
    words = len(re.findall(r"\w+|[^\w\s]", text))
    spaceless = len(text) / CHARACTERS_A_TOKEN if " " not in text.strip() else 0.0
    return math.ceil(max(TOKENS_A_WORD * words, spaceless)) + 4


def _chats(rows: Dataset, chosen: Chosen) -> Iterator[list[dict[str, Any]]]:
    """The turns of every row that has them."""
    data = chosen.data
    for row in rows:
        with suppress(DataError):  # a note says that values are missing
            if "messages" in data:
                yield turns_of(row, data["messages"])[0]
            else:
                yield question_and_answer(render(row, data["text"]), render(row, data["target"]))


def templated(
    rows: Dataset, chosen: Chosen, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """The chats as the tokenizer's template writes them, as `texts_of` gives texts."""
    found = []
    for turns in _chats(rows, chosen):
        with suppress(TemplateError):  # training names such a row
            found.append((str(tokenizer.apply_chat_template(turns, tokenize=False)), ""))
    return found or [("", "")]
