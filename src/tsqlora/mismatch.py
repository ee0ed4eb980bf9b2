"""Inputs paired with other samples' targets: what a wrong target looks like in generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from tsqlora.losses import CAUSAL_LM, IGNORED


def mismatched_pairs(dataset: Dataset, kind: str) -> Dataset | None:
    """Each row's input with the next other row's target, or None where rows have no such parts.

    A causal row is its prompt (labels -100) followed by its completion; plain text has no prompt.
    """
    if not {"input_ids", "labels"} <= set(dataset.column_names) or len(dataset) < 2:
        return None
    rows: list[dict[str, Any]] = [dict(row) for row in dataset]
    if kind != CAUSAL_LM:
        targets = [row["labels"] for row in rows]
        return Dataset.from_list(
            [
                {**row, "labels": targets[i - 1]}
                for i, row in enumerate(rows)
                if row["labels"] != targets[i - 1]
            ]
        )
    prompts = [_prompt_length(row["labels"]) for row in rows]
    if not all(prompts):
        return None
    return Dataset.from_list(
        [_spliced(row, prompts[i], rows[i - 1], prompts[i - 1]) for i, row in enumerate(rows)]
    )


def _prompt_length(labels: Sequence[int]) -> int:
    """Positions up to the last turn's target: what comes before the final run of counted labels."""
    masked = [i for i, label in enumerate(labels) if label == IGNORED]
    return masked[-1] + 1 if masked else 0


def _spliced(row: dict[str, Any], at: int, other: dict[str, Any], other_at: int) -> dict[str, Any]:
    longest = max(len(row["labels"]), len(other["labels"]))
    ids = (row["input_ids"][:at] + other["input_ids"][other_at:])[:longest]
    labels = ([IGNORED] * at + other["labels"][other_at:])[:longest]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
