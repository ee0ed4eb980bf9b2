"""Inputs paired with other samples' targets: what a wrong target looks like in generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from tsqlora.losses import CAUSAL_LM, IGNORED


@dataclass(frozen=True)
class Pair:
    """A row as an input and a target, both as tokens; `rest` are its other columns."""

    prompt: list[int]
    target: list[int]
    rest: dict[str, Any]


def mismatched_pairs(dataset: Dataset, kind: str) -> tuple[Dataset, list[int]] | None:
    """Each row's input with the target of the row before, where both inputs and both targets
    differ, and the numbers of the rows whose targets these are.

    None where rows have no such parts, or no two differ. A causal row is what comes before its last
    turn (labels -100), followed by that turn; plain text has nothing before.
    """
    rows = _pairs(dataset, kind)
    differ = [
        i
        for i in range(len(rows))
        if rows[i].prompt != rows[i - 1].prompt and rows[i].target != rows[i - 1].target
    ]
    if not differ:
        return None
    made = [_joined(rows[i], rows[i - 1], kind) for i in differ]
    return Dataset.from_list(made), [(i - 1) % len(rows) for i in differ]


def matched_pairs(dataset: Dataset, kind: str) -> Dataset:
    """The same targets, of causal rows the last turns, after their own inputs."""
    return Dataset.from_list([_joined(row, row, kind) for row in _pairs(dataset, kind)])


def _pairs(dataset: Dataset, kind: str) -> list[Pair]:
    """The rows taken apart; none where they cannot be."""
    if not {"input_ids", "labels"} <= set(dataset.column_names):
        return []
    rows: list[dict[str, Any]] = [dict(row) for row in dataset]
    if kind != CAUSAL_LM:
        return [Pair(row["input_ids"], row["labels"], row) for row in rows]
    spans = [last_turn(row["labels"]) for row in rows]
    if not all(start for start, _ in spans):
        return []
    return [
        Pair(row["input_ids"][:start], row["input_ids"][start:stop], {})
        for row, (start, stop) in zip(rows, spans, strict=True)
    ]


def last_turn(labels: list[int]) -> tuple[int, int]:
    """Where the last run of counted labels begins and ends; (0, 0) where none is counted."""
    stop = next((i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORED), 0)
    start = next((i for i in range(stop, 0, -1) if labels[i - 1] == IGNORED), 0)
    return start, stop


def _joined(row: Pair, other: Pair, kind: str) -> dict[str, Any]:
    """The input of a row with the target of another, no longer than the longer of both: it is the
    input that is cut, after its first token, as the target is what is compared."""
    if kind != CAUSAL_LM:
        return {**row.rest, "labels": other.target}
    longest = max(len(each.prompt) + len(each.target) for each in (row, other))
    cut = max(0, len(row.prompt) + len(other.target) - longest)
    prompt = row.prompt[:1] + row.prompt[1 + cut :]
    ids = prompt + other.target
    labels = [IGNORED] * len(prompt) + other.target
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
