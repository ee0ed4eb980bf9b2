"""Scores as a CSV for a spreadsheet: the rows most likely wrong first, each with its reason.

A cell that a spreadsheet would take for a formula is given an apostrophe in front (OWASP's advice
on CSV injection). The file begins with a byte order mark, without which Excel reads UTF-8 as
something else, and its lines end as Excel's do.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from tsqlora.artefacts import atomic_file
from tsqlora.columns import column, copied
from tsqlora.config import RunConfig
from tsqlora.credibility import drawable
from tsqlora.data import numbered
from tsqlora.null import FREE
from tsqlora.quality import QualityScores
from tsqlora.row_texts import said_of

COSTLY, UNRELATED = "as much as a wrong target costs", "it goes with other inputs as well"
"""Why a class or number looks wrong, and why a text does, scored upfront."""
COLUMNS = (
    "id", "text", "target", "prediction", "likely_wrong", "credibility", "loss", "why",
)  # fmt: skip
LONGEST = 32_000
"""Characters of a cell; Excel holds 32,767."""
MOST = 1_048_000
"""Rows; a sheet of Excel holds 1,048,576."""
ROWS = 1000

_FORMULA = re.compile(r"\s*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")


def likely_wrong(scores: QualityScores) -> NDArray[np.bool_]:
    """The samples that are never drawn (N), as their targets are not credible enough."""
    return ~drawable(scores.credibility)


def ranking(scores: QualityScores) -> NDArray[np.int64]:
    """Positions, the most likely wrong first (N): those `likely_wrong`, then the others, each by
    falling loss, which goes on telling where credibility is 0 for many.
    """
    return np.lexsort((-scores.loss, ~likely_wrong(scores)))


def write_ranked(
    path: Path, scores: QualityScores, dataset: Dataset, config: RunConfig, labels: Sequence[str]
) -> None:
    """Write `COLUMNS` of every sample (of the first `MOST` in a larger pool) in their `ranking`.

    `dataset` is what was loaded or a part of it, with the ids of its rows; `labels` name predicted
    classes.
    """
    order = ranking(scores)[:MOST]
    wrong, above = likely_wrong(scores), _share_below(scores.loss)
    against = COSTLY if config.task in FREE else UNRELATED
    with atomic_file(path) as file, file.open("w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(COLUMNS)
        for positions, rows in _rows(dataset, scores.ids, order):
            for i, row in zip(positions, rows, strict=True):
                text, target = said_of(row, config.data, dataset.features)
                said = _prediction(scores, i, labels)
                about = against if wrong[i] else "", float(scores.credibility[i]), float(above[i])
                why = _why(about, said if said and config.task == "classification" else "", target)
                writer.writerow(
                    [
                        int(scores.ids[i]),
                        *map(cell, (text, target, said)),
                        "yes" if wrong[i] else "",
                        f"{scores.credibility[i]:.3f}",
                        f"{scores.loss[i]:.4f}",
                        why,
                    ]
                )


def cell(text: str) -> str:
    """`text` as a cell: never a formula, not too long, without control characters."""
    clean = _CONTROL.sub(" ", text.encode("utf-8", "replace").decode())
    if len(clean) > LONGEST:
        clean = f"{clean[:LONGEST]} … ({len(text):,} characters)"
    return "'" + clean if _FORMULA.match(clean) and not _NUMBER.fullmatch(clean) else clean


def _prediction(scores: QualityScores, position: int, labels: Sequence[str]) -> str:
    """The class's name or the number that the model said; nothing of a text."""
    if scores.prediction is None:
        return ""
    found = scores.prediction[position]
    if not labels:
        return f"{float(found):.4g}"
    return labels[int(found)] if 0 <= found < len(labels) else ""


def _why(about: tuple[str, float, float], said: str, target: str) -> str:
    """A sentence of what speaks for or against a target."""
    against, credible, above = about
    parts = []
    if said:
        parts.append("the model agrees" if said == target else f"the model says {_short(said)}")
    parts.append(f"loss above that of {math.floor(100 * above)} % of the rows")
    if against:
        parts.append(f"right with probability {credible:.2f}: {against}")
    elif credible < 1:
        parts.append(f"right with probability {credible:.2f}")
    return cell("; ".join(parts))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _share_below(values: np.ndarray) -> np.ndarray:
    """For each value the share of all that are less (N)."""
    ordered, found = copied(values), column(len(values))
    ordered.sort()
    found[:] = np.searchsorted(ordered, values, "left")
    found /= max(len(values), 1)
    return found


def _rows(
    dataset: Dataset, ids: np.ndarray, order: np.ndarray
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Positions in that order and their rows, some at a time."""
    numbers = numbered(dataset)
    numbers = np.arange(len(dataset)) if numbers is None else numbers
    sorted_by = np.argsort(numbers, kind="stable")
    for start in range(0, len(order), ROWS):
        positions = order[start : start + ROWS]
        found = np.searchsorted(numbers, ids[positions], sorter=sorted_by)
        columns = dataset[sorted_by[found].tolist()]
        rows = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        yield positions.tolist(), rows
