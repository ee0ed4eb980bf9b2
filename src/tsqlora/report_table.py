"""The samples as a table that a page unpacks: numbers by column, texts by line, within a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsqlora.credibility import CREDIBLE
from tsqlora.packed import Packed, packed_floats, packed_integers, packed_text
from tsqlora.quality import QualityScores
from tsqlora.report_texts import Said, Texts, one_line

MOST = 100_000
"""Samples in the table; of more, those of the views and some of the others."""
INFORMATIVE = 1000
"""At most so many are called most informative, and at most a tenth of all."""
ROOM = 5_200_000
"""Bytes for the table in the page."""
LENGTHS = (2000, 1000, 500, 300, 200, 140, 100, 70, 50, 35, 20)
"""Characters of a text at most: as many as there is room for."""
FIRST, LONGEST = 200, 1000
"""So many samples at the head of each view have their texts up to so many characters."""
COMPARED = 1000
"""Characters of a text by which near-duplicates are found."""
TRIED = 2000
"""Texts that are packed to see how long all may be."""
SELECTED, DOUBTFUL, TELLING = 1, 2, 4
"""Flags of a sample."""

NUMBERS = {
    "credibility": "credibility",
    "loss": "loss",
    "drawn": "drawn",
    "quality": "quality",
    "gradient_norm": "gradient norm",
    "loss_reduction": "loss reduction",
    "convergence": "convergence",
}
"""The columns of numbers, and their titles."""


@dataclass(frozen=True)
class Table:
    """What the page needs to show the samples.

    Attributes:
        rows: how many samples it holds.
        pieces: the columns.
        notes: their names and titles, the classes, and how texts were cut.
        longest: characters of the texts at the head of a view, at most.
    """

    rows: int
    pieces: list[Packed]
    notes: dict[str, Any]
    longest: int = LONGEST


def views(scores: QualityScores) -> tuple[np.ndarray, np.ndarray]:
    """Positions of those likely wrong, the least credible first, and of the most informative."""
    doubtful = np.flatnonzero(scores.credibility < CREDIBLE)
    doubtful = doubtful[np.argsort(scores.credibility[doubtful], kind="stable")]
    count = min(INFORMATIVE, -(-len(scores.ids) // 10))
    return doubtful, np.argsort(-scores.probability, kind="stable")[:count]


def shown(scores: QualityScores) -> np.ndarray:
    """The positions of the samples in the table: all, or the views' and a random part."""
    if len(scores.ids) <= MOST:
        return np.arange(len(scores.ids))
    doubtful, informative = views(scores)
    kept = np.union1d(doubtful[: MOST // 2], informative)
    rest = np.setdiff1d(np.arange(len(scores.ids)), kept, assume_unique=True)
    more = np.random.default_rng(0).choice(rest, MOST - len(kept), replace=False)
    return np.sort(np.concatenate([kept, more]))


def sample_table(scores: QualityScores, rows: np.ndarray, texts: Texts) -> Table:
    """The samples at the positions `rows`, of which `texts` tells."""
    doubtful, informative = views(scores)
    columns = _numbers(scores, rows)
    pieces = [packed_integers("id", scores.ids[rows])]
    pieces += [packed_floats(name, values) for name, values in columns.items()]
    pieces.append(packed_integers("flags", _flags(scores, doubtful, informative)[rows]))
    notes: dict[str, Any] = {
        "count": len(rows),
        "numbers": {name: NUMBERS[name] for name in columns},
        "classes": [],
        "alike": 0,
        "predicts": None,
        "texts": not texts.problem,
        "cut": 0,
    }
    if not texts.problem:
        groups = _groups(texts.inputs)
        notes["alike"] = int((groups > 0).sum())
        pieces.append(packed_integers("group", groups))
        pieces += _targets(texts, notes)
    pieces += _predictions(scores, rows, texts, notes)
    if not texts.problem:
        first = np.isin(rows, np.concatenate([doubtful[:FIRST], informative[:FIRST]]))
        room = ROOM - sum(len(piece.text) for piece in pieces)
        more, limit = _fitting(texts, first, room, not notes["classes"])
        longest = max((said.length for said in (*texts.inputs, *texts.targets)), default=0)
        notes["cut"] = limit if longest > limit else 0
        pieces += more
    return Table(len(rows), pieces, notes)


def _numbers(scores: QualityScores, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The columns that were measured; `drawn` is p · N."""
    found = {}
    for name in NUMBERS:
        values = scores.probability * len(scores.ids) if name == "drawn" else getattr(scores, name)
        if np.isfinite(values).any():
            found[name] = np.asarray(values)[rows]
    return found


def _flags(scores: QualityScores, doubtful: np.ndarray, informative: np.ndarray) -> np.ndarray:
    flags = np.where(scores.selected, SELECTED, 0)
    flags[doubtful] |= DOUBTFUL
    flags[informative] |= TELLING
    return flags


def _groups(inputs: Sequence[Said]) -> np.ndarray:
    """Of near-duplicates the number of their group from 1, of all others 0."""
    from tsqlora.duplicates import near_duplicate_texts

    groups = near_duplicate_texts([text.start[:COMPARED] for text in inputs])
    several = np.bincount(groups) > 1
    return np.where(several, np.cumsum(several), 0)[groups]


def _targets(texts: Texts, notes: dict[str, Any]) -> list[Packed]:
    """Classes as numbers; all other targets are texts."""
    if not texts.labels:
        return []
    names = list(dict.fromkeys([*texts.labels, *(said.start for said in texts.targets)]))
    notes["classes"] = [one_line(name, 100) for name in names]
    numbers = {name: i for i, name in enumerate(names)}
    codes = np.array([numbers[said.start] for said in texts.targets], np.int64)
    return [packed_integers("class", codes)]


def _predictions(
    scores: QualityScores, rows: np.ndarray, texts: Texts, notes: dict[str, Any]
) -> list[Packed]:
    """A class as its number + 1, where its name is known, or a number."""
    if scores.prediction is None:
        return []
    predicted = scores.prediction[rows]
    if np.issubdtype(predicted.dtype, np.floating):
        notes["predicts"] = "numbers"
        return [packed_floats("prediction", predicted)]
    if not texts.labels or predicted.max(initial=0) >= len(texts.labels):
        return []
    notes["predicts"] = "classes"
    return [packed_integers("prediction", predicted + 1)]


def _fitting(
    texts: Texts, first: np.ndarray, room: int, with_targets: bool
) -> tuple[list[Packed], int]:
    """The texts, cut so that they fit, and to how many characters."""
    columns = {"text": texts.inputs, **({"target": texts.targets} if with_targets else {})}
    count = len(first)
    tried = np.random.default_rng(0).permutation(count)[:TRIED].tolist()
    for limit in LENGTHS:
        some = sum(
            len(packed_text(name, "\n".join(values[i].line(limit) for i in tried)).text)
            for name, values in columns.items()
        )
        if some * count > 0.97 * room * max(len(tried), 1) and limit != LENGTHS[-1]:
            continue
        pieces = [_lines(name, values, first, limit) for name, values in columns.items()]
        if sum(len(piece.text) for piece in pieces) <= room:
            break
    return pieces, limit


def _lines(name: str, values: Sequence[Said], first: np.ndarray, limit: int) -> Packed:
    """A text a line; those that come first at more length."""
    longer = max(limit, LONGEST)
    lines = [
        said.line(longer if wanted else limit)
        for said, wanted in zip(values, first.tolist(), strict=True)
    ]
    return packed_text(name, "\n".join(lines))
