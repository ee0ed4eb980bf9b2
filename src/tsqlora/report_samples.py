"""What the report says about samples: their scores in figures, the table, the classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tsqlora.charts import Spec, bar_chart, histogram_chart
from tsqlora.config import RunConfig
from tsqlora.figures import histogram, number
from tsqlora.quality import QualityScores
from tsqlora.report_table import Table, sample_table, shown, views
from tsqlora.report_texts import Texts, one_line, read_texts
from tsqlora.run_folder import RunFolder

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


@dataclass(frozen=True)
class Term:
    """A term's distribution in words and as a chart; neither where it was not measured."""

    name: str
    meaning: str
    summary: str = ""
    chart: Spec | None = None


@dataclass(frozen=True)
class Share:
    """A class's share of all samples and of the selected ones."""

    name: str
    samples: int
    before: float
    after: float


@dataclass(frozen=True)
class Samples:
    """The scores in figures, and the samples themselves.

    Attributes:
        count, selected: how many there are, and how many the first draw took.
        effective: Kish's effective sample size of the draw.
        doubtful, informative: how many are likely wrong, and how many are most informative.
        verdict: one sentence on the targets.
        terms: the distributions.
        shares, shares_chart: by class, where there are classes.
        table: the samples, for the page to unpack.
        problem: why there are no texts, or "".
    """

    count: int
    selected: int
    effective: float
    doubtful: int
    informative: int
    verdict: str
    terms: list[Term]
    shares: list[Share]
    shares_chart: Spec | None
    table: Table
    problem: str


def samples_part(folder: RunFolder, config: RunConfig) -> Samples | None:
    """From `scores.parquet` and the training data it names; None where there are no scores yet.

    Raises:
        RunError: the scores are broken.
    """
    if not folder.scores.exists():
        return None
    scores = QualityScores.from_parquet(folder.scores)
    rows = shown(scores)
    texts = read_texts(folder, config, scores.ids[rows])
    doubtful, informative = views(scores)
    shares = _shares(scores, texts)
    return Samples(
        count=len(scores.ids),
        selected=int(scores.selected.sum()),
        effective=scores.effective_samples,
        doubtful=len(doubtful),
        informative=len(informative),
        verdict=scores.verdict,
        terms=[_term(scores, name) for name in TERMS],
        shares=shares,
        shares_chart=_shares_chart(shares),
        table=sample_table(scores, rows, texts),
        problem=texts.problem,
    )


def _term(scores: QualityScores, name: str) -> Term:
    values = getattr(scores, name) * (len(scores.ids) if name == "probability" else 1)
    drawn = histogram(values, scores.selected, name in LOGARITHMIC)
    if drawn is None:
        return Term(name, TERMS[name])
    words = f"Median {number(drawn.median)}{', logarithmic axis' if drawn.log else ''}."
    return Term(name, TERMS[name], words, histogram_chart(name.replace("_", " "), drawn))


def _shares(scores: QualityScores, texts: Texts) -> list[Share]:
    names = [texts.classes.get(number) for number in scores.ids.tolist()]
    before = Counter(name for name in names if name is not None)
    after = Counter(
        n for n, kept in zip(names, scores.selected, strict=True) if kept and n is not None
    )
    counts = [(one_line(name, 100), count, after[name]) for name, count in before.most_common()]
    if rest := counts[CLASSES:]:
        other = (f"{len(rest)} others", sum(c for _, c, _ in rest), sum(a for _, _, a in rest))
        counts = [*counts[:CLASSES], other]
    total, kept = max(before.total(), 1), max(after.total(), 1)
    return [Share(name, count, count / total, some / kept) for name, count, some in counts]


def _shares_chart(shares: list[Share]) -> Spec | None:
    if not shares:
        return None
    rows = [
        (share.name, group, part)
        for share in shares
        for group, part in (("before", share.before), ("after", share.after))
    ]
    return bar_chart("Share of each class before and after", rows, ".1%")
