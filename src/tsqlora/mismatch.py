"""Inputs paired with other samples' targets: what a wrong target looks like in generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from tsqlora.losses import CAUSAL_LM, IGNORED


def mismatched_pairs(dataset: Dataset, kind: str) -> tuple[Dataset, list[int]] | None:
    """Each row's input with the target of the row before, where the two targets differ, and the
    numbers of the rows whose targets these are.

    None where rows have no such parts, or no two targets differ. A causal row is its prompt (labels
    -100) followed by its completion; plain text has no prompt.
    """
    if not {"input_ids", "labels"} <= set(dataset.column_names) or len(dataset) < 2:
        return None
    rows: list[dict[str, Any]] = [dict(row) for row in dataset]
    starts = [_prompt_length(row["labels"]) if kind == CAUSAL_LM else 0 for row in rows]
    if kind == CAUSAL_LM and not all(starts):
        return None
    targets = [row["labels"][start:] for row, start in zip(rows, starts, strict=True)]
    differ = [i for i, target in enumerate(targets) if target != targets[i - 1]]
    if not differ:
        return None
    owners = [(i - 1) % len(rows) for i in differ]
    if kind != CAUSAL_LM:
        pairs = [
            {**rows[i], "labels": targets[owner]} for i, owner in zip(differ, owners, strict=True)
        ]
    else:
        pairs = [_spliced(rows[i], starts[i], rows[i - 1], starts[i - 1]) for i in differ]
    return Dataset.from_list(pairs), owners


def _prompt_length(labels: Sequence[int]) -> int:
    """Positions up to the last turn's target: what comes before the final run of counted labels."""
    masked = [i for i, label in enumerate(labels) if label == IGNORED]
    return masked[-1] + 1 if masked else 0


def _spliced(row: dict[str, Any], at: int, other: dict[str, Any], other_at: int) -> dict[str, Any]:
    longest = max(len(row["labels"]), len(other["labels"]))
    ids = (row["input_ids"][:at] + other["input_ids"][other_at:])[:longest]
    labels = ([IGNORED] * at + other["labels"][other_at:])[:longest]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
