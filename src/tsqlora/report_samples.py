"""What the report says about samples: their scores, the samples themselves, the classes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tsqlora.config import DataConfig, RunConfig
from tsqlora.credibility import CREDIBLE
from tsqlora.errors import DataError, TsqloraError
from tsqlora.figures import Histogram, histogram
from tsqlora.quality import QualityScores
from tsqlora.run_folder import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("tsqlora")

SHOWN = 50
"""Samples in each table."""
CUT = 300
"""Characters of a text that are shown."""
CLASSES = 40
"""At most so many classes are listed; the rest are taken together."""
TERMS = {
    "loss": "ℓ when it was scored: after the brief adaptation, or at its last visit",
    "gradient_norm": "‖∇ℓ‖₂: how strongly the sample pulls at the adapter",
    "loss_reduction": "Δℓ: what one step on the sample alone would gain",
    "convergence": "ΔC: how far its gradient agrees with the others'",
    "credibility": "c: how likely its target is right",
    "quality": "Q: the weighted sum of the three terms",
    "probability": "N·p: how often it is drawn, where 1 is a draw that treats all alike",
}
LOGARITHMIC = ("loss", "gradient_norm", "probability")
"""Terms whose axis may be logarithmic."""

_UNSEEN = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


@dataclass(frozen=True)
class Sample:
    """A row of a table; `draws` is p · N, how often it is drawn compared with a uniform draw."""

    id: int
    text: str
    target: str
    loss: float
    credibility: float
    draws: float
    selected: bool


@dataclass(frozen=True)
class Share:
    """A class's share of all samples and of the selected ones."""

    name: str
    samples: int
    before: float
    after: float


@dataclass(frozen=True)
class Samples:
    """The scores in figures, and the samples at both ends.

    Attributes:
        count, selected: how many there are, and how many the first draw took.
        effective: Kish's effective sample size of the draw.
        doubtful: samples more likely wrong than right.
        verdict: one sentence on the targets.
        terms: (name, meaning, distribution or None where not measured).
        doubted: the least credible, below 1 only.
        informative: the most probable.
        shares: by class, where there are classes.
        problem: why there are no texts, or "".
    """

    count: int
    selected: int
    effective: float
    doubtful: int
    verdict: str
    terms: list[tuple[str, str, Histogram | None]]
    doubted: list[Sample]
    informative: list[Sample]
    shares: list[Share]
    problem: str


@dataclass(frozen=True)
class _Texts:
    """Text and target of the samples shown, by id, and every sample's class by id."""

    shown: dict[int, tuple[str, str]] = field(default_factory=dict)
    classes: dict[int, str] = field(default_factory=dict)
    problem: str = ""


def samples_part(folder: RunFolder, config: RunConfig) -> Samples | None:
    """From `scores.parquet` and the training data it names; None where there are no scores yet.

    Raises:
        RunError: the scores are broken.
    """
    if not folder.scores.exists():
        return None
    scores = QualityScores.from_parquet(folder.scores)
    doubted = np.argsort(scores.credibility, kind="stable")[:SHOWN]
    doubted = doubted[scores.credibility[doubted] < 1]
    informative = np.argsort(-scores.probability, kind="stable")[:SHOWN]
    texts = _texts(config, scores.ids[np.union1d(doubted, informative)].tolist())
    return Samples(
        count=len(scores.ids),
        selected=int(scores.selected.sum()),
        effective=scores.effective_samples,
        doubtful=int((scores.credibility < CREDIBLE).sum()),
        verdict=scores.verdict,
        terms=[_term(scores, name) for name in TERMS],
        doubted=_samples(scores, doubted.tolist(), texts),
        informative=_samples(scores, informative.tolist(), texts),
        shares=_shares(scores, texts.classes),
        problem=texts.problem,
    )


def _term(scores: QualityScores, name: str) -> tuple[str, str, Histogram | None]:
    values = getattr(scores, name) * (len(scores.ids) if name == "probability" else 1)
    return name, TERMS[name], histogram(values, scores.selected, name in LOGARITHMIC)


def cut(value: object) -> str:
    """`value` as one short line without invisible or direction-changing characters."""
    whole = str(value)
    line = _UNSEEN.sub(" ", whole[: 4 * CUT]).strip().encode("utf-8", "replace").decode()
    if len(whole) <= 4 * CUT and len(line) <= CUT:
        return line
    return f"{line[:CUT]} … ({len(whole):,} characters)"


def _samples(scores: QualityScores, rows: Sequence[int], texts: _Texts) -> list[Sample]:
    found = []
    for row in rows:
        number = int(scores.ids[row])
        text, target = texts.shown.get(number, ("", ""))
        found.append(
            Sample(
                id=number,
                text=cut(text),
                target=cut(target),
                loss=float(scores.loss[row]),
                credibility=float(scores.credibility[row]),
                draws=float(scores.probability[row] * len(scores.ids)),
                selected=bool(scores.selected[row]),
            )
        )
    return found


def _shares(scores: QualityScores, classes: dict[int, str]) -> list[Share]:
    names = [classes.get(number) for number in scores.ids.tolist()]
    before = Counter(name for name in names if name is not None)
    after = Counter(
        n for n, kept in zip(names, scores.selected, strict=True) if kept and n is not None
    )
    counts = [(cut(name), count, after[name]) for name, count in before.most_common()]
    if rest := counts[CLASSES:]:
        other = (f"{len(rest)} others", sum(c for _, c, _ in rest), sum(a for _, _, a in rest))
        counts = [*counts[:CLASSES], other]
    total, kept = max(before.total(), 1), max(after.total(), 1)
    return [Share(name, count, count / total, some / kept) for name, count, some in counts]


def _texts(config: RunConfig, ids: list[int]) -> _Texts:
    """What the training data says about the samples `ids`; nothing, and why, if it is gone."""
    from tsqlora.data import load_dataset
    from tsqlora.sources import said

    try:
        dataset = load_dataset(config.data.train, "data.train")
        if ids and max(ids) >= len(dataset):
            raise DataError(
                f"data.train: {said(config.data.train)} has fewer rows than when it was scored."
            )
        features = dataset.features
        shown = {int(row["id"]): _said(row, config.data, features) for row in dataset.select(ids)}
        return _Texts(shown, _classes(dataset, config))
    except (TsqloraError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The report shows no texts: %s", error)
        return _Texts(problem=cut(error))


def _said(row: Mapping[str, Any], data: DataConfig, features: Mapping[str, Any]) -> tuple[str, str]:
    """(text, target) of a row, as configured."""
    from tsqlora.data import render

    if data.messages is not None:
        turns = [f"{turn.get('role')}: {turn.get('content')}" for turn in row[data.messages]]
        return " ".join(turns[:-1]), " ".join(turns[-1:])
    specs = [data.text] if isinstance(data.text, str) else list(data.text or ())
    text = " ‖ ".join(render(row, spec) for spec in specs)
    if data.target is None:
        return text, ""
    if data.target in features:
        return text, _label(row[data.target], features[data.target])
    return text, render(row, data.target)


def _classes(dataset: Dataset, config: RunConfig) -> dict[int, str]:
    column, features = config.data.target, dataset.features
    if config.task != "classification" or column not in features:
        return {}
    named = (_label(value, features[column]) for value in dataset[column][:])
    return dict(zip(dataset["id"][:], named, strict=True))


def _label(value: Any, feature: Any) -> str:
    """The class's name where the data set names its classes, else the value."""
    names = getattr(feature, "names", None)
    return str(names[value]) if names and isinstance(value, int) and value >= 0 else str(value)
