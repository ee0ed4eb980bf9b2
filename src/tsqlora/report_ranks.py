"""What the report says about ranks: the plan, where they moved, the sensitivity behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsqlora.allocation import RankPlan
from tsqlora.artefacts import read_json, read_lines
from tsqlora.charts import Spec, heat_map
from tsqlora.figures import Stack, stacks
from tsqlora.run_folder import RunFolder

MOMENTS = 60
"""At most so many points in time can be looked at."""
NAMED = 5
"""At most so many modules that gained or lost are named."""

Table = list[tuple[str, list[str]]]
"""(layer, cells) by row."""


@dataclass(frozen=True)
class Grid:
    """One stack's numbers: as a heat map, and as a table of texts."""

    title: str
    kinds: list[str]
    rows: Table
    chart: Spec


@dataclass(frozen=True)
class Sensitivity:
    """The estimator, the largest value, and each stack in hundredths of it."""

    estimator: str
    largest: float
    grids: list[Grid]


@dataclass(frozen=True)
class Move:
    """A reallocation: components pruned and grown, in how many modules, and what that left."""

    step: int
    pruned: int
    pruned_in: int
    grown: int
    grown_in: int
    total_rank: int
    parameters: int


@dataclass(frozen=True)
class Ranks:
    """The plan and what became of it.

    Attributes:
        plan: as planned, before any move.
        final: rank by module after the last move.
        moves: the reallocations in order.
        grids: the final ranks by stack, layer and kind.
        moments: what a page needs to show them as they were: {label, cells of each stack}.
        gained, lost: (module, planned, final) of those that changed most.
    """

    plan: RankPlan
    final: dict[str, int]
    moves: list[Move]
    grids: list[Grid]
    moments: list[dict[str, Any]]
    gained: list[tuple[str, int, int]]
    lost: list[tuple[str, int, int]]

    @property
    def mean(self) -> float:
        """The mean final rank of all modules."""
        return sum(self.final.values()) / max(len(self.final), 1)

    @property
    def parameters(self) -> int:
        """The adapter parameters after the last move."""
        return self.moves[-1].parameters if self.moves else self.plan.parameters

    @property
    def used(self) -> list[int]:
        """The final ranks that are not 0, in order."""
        return sorted(rank for rank in self.final.values() if rank)


def sensitivity_part(folder: RunFolder) -> Sensitivity | None:
    """From `sensitivity.json`; None where there is none yet.

    Raises:
        RunError: it is broken.
    """
    if not folder.sensitivity.exists():
        return None
    raw = read_json(folder.sensitivity)
    values = {name: float(value or 0.0) for name, value in raw["modules"].items()}
    largest = max(values.values(), default=0.0)
    parts = {name: 100 * value / (largest or 1.0) for name, value in values.items()}
    found = []
    for stack in stacks(values):
        means = stack.means(parts)
        cells = _cells(
            "sensitivity", stack, means, {place: _short(v) for place, v in means.items()}
        )
        found.append(_grid("sensitivity", stack, cells, 100.0))
    return Sensitivity(raw["estimator"], largest, found)


def ranks_part(folder: RunFolder) -> Ranks | None:
    """From `plan.json` and `ranks.jsonl`; None where there is no plan yet.

    Raises:
        RunError: one of them is broken.
    """
    if not folder.plan.exists():
        return None
    plan = RankPlan.load(folder.plan)
    lines = read_lines(folder.ranks)
    history = [plan.ranks] + [{**plan.ranks, **line["ranks"]} for line in lines]
    labels = ["as planned"] + [f"after step {line['step']:,}" for line in lines]
    changes = {name: history[-1][name] - rank for name, rank in plan.ranks.items()}
    ordered = sorted((name for name in changes if changes[name]), key=lambda n: (changes[n], n))
    named = [(name, plan.ranks[name], history[-1][name]) for name in ordered]
    found = stacks(plan.ranks)
    largest = float(max((max(ranks.values(), default=0) for ranks in history), default=0))
    last = [_ranked(stack, history[-1], plan.ranks) for stack in found]
    return Ranks(
        plan=plan,
        final=history[-1],
        moves=[_move(line, r, plan) for line, r in zip(lines, history[1:], strict=True)],
        grids=[_grid("rank", stack, c, largest) for stack, c in zip(found, last, strict=True)],
        moments=_moments(labels, history, found),
        gained=[entry for entry in named if entry[2] > entry[1]][: -NAMED - 1 : -1],
        lost=[entry for entry in named if entry[2] < entry[1]][:NAMED],
    )


def _moments(
    labels: Sequence[str], history: Sequence[Mapping[str, int]], found: Sequence[Stack]
) -> list[dict[str, Any]]:
    picked = np.unique(np.linspace(0, len(history) - 1, MOMENTS).round().astype(int)).tolist()
    return [
        {
            "label": labels[i],
            "total": sum(history[i].values()),
            "stacks": [_ranked(stack, history[i], history[0]) for stack in found],
        }
        for i in picked
    ]


def _ranked(
    stack: Stack, ranks: Mapping[str, int], planned: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The cells: a rank, and an arrow where it is another than was planned."""
    means, before = stack.means(ranks), stack.means(planned)
    arrows = {
        place: "↑" * (v > before[place]) + "↓" * (v < before[place]) for place, v in means.items()
    }
    labels = {place: _short(value) + arrows[place] for place, value in means.items()}
    return _cells("rank", stack, means, labels)


def _cells(
    what: str,
    stack: Stack,
    means: Mapping[tuple[str, str], float],
    labels: Mapping[tuple[str, str], str],
) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "kind": kind,
            "value": means[layer, kind],
            "label": labels[layer, kind],
            "module": names[0] if len(names) == 1 else f"mean of {len(names)} {kind}",
            what: labels[layer, kind],
        }
        for (layer, kind), names in stack.cells.items()
    ]


def _grid(what: str, stack: Stack, cells: list[dict[str, Any]], largest: float) -> Grid:
    labels = {(cell["layer"], cell["kind"]): cell["label"] for cell in cells}
    rows = [
        (layer, [labels.get((layer, kind), "–") for kind in stack.kinds]) for layer in stack.layers
    ]
    return Grid(stack.title, stack.kinds, rows, heat_map(what, stack, cells, largest))


def _move(line: Mapping[str, Any], ranks: dict[str, int], plan: RankPlan) -> Move:
    pruned, grown = line["pruned"], line["grown"]
    return Move(
        step=line["step"],
        pruned=sum(pruned.values()),
        pruned_in=len(pruned),
        grown=sum(grown.values()),
        grown_in=len(grown),
        total_rank=sum(ranks.values()),
        parameters=sum(r * sum(plan.shapes[n]) for n, r in ranks.items() if n in plan.shapes),
    )


def _short(value: float) -> str:
    if value == int(value):
        return str(int(value))
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.05 else "<0.1"
