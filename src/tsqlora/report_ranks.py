"""What the report says about ranks: the plan, where they moved, the sensitivity behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tsqlora.allocation import RankPlan
from tsqlora.artefacts import read_json, read_lines
from tsqlora.figures import Cell, Grid, grids, kind_of
from tsqlora.run_folder import RunFolder

COLUMNS = 12
"""At most so many points in time stand beside one another."""
NAMED = 5
"""At most so many modules that gained or lost are named."""


@dataclass(frozen=True)
class Sensitivity:
    """The estimator, the largest value, and tables in hundredths of it."""

    estimator: str
    largest: float
    tables: list[Grid]


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
        tables: the final ranks by stack, layer and kind, with the change since the plan.
        over_time: total rank of each kind of module.
        gained, lost: (module, planned, final) of those that changed most.
    """

    plan: RankPlan
    final: dict[str, int]
    moves: list[Move]
    tables: list[Grid]
    over_time: Grid
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
    values = {name: value or 0.0 for name, value in raw["modules"].items()}
    largest = max(values.values(), default=0.0)
    return Sensitivity(raw["estimator"], largest, grids(values, unit=largest / 100 or 1.0))


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
    steps = ["plan"] + [f"step {line['step']:,}" for line in lines]
    changes = {name: history[-1][name] - rank for name, rank in plan.ranks.items()}
    ordered = sorted((name for name in changes if changes[name]), key=lambda n: (changes[n], n))
    named = [(name, plan.ranks[name], history[-1][name]) for name in ordered]
    return Ranks(
        plan=plan,
        final=history[-1],
        moves=[_move(line, r, plan) for line, r in zip(lines, history[1:], strict=True)],
        tables=grids(history[-1], {name: f"{changes[name]:+d}" for name in ordered}),
        over_time=_over_time(steps, history),
        gained=[entry for entry in named if entry[2] > entry[1]][: -NAMED - 1 : -1],
        lost=[entry for entry in named if entry[2] < entry[1]][:NAMED],
    )


def _move(line: Mapping[str, dict[str, int]], ranks: dict[str, int], plan: RankPlan) -> Move:
    pruned, grown = line["pruned"], line["grown"]
    return Move(
        step=line["step"],  # type: ignore[arg-type]
        pruned=sum(pruned.values()),
        pruned_in=len(pruned),
        grown=sum(grown.values()),
        grown_in=len(grown),
        total_rank=sum(ranks.values()),
        parameters=sum(r * sum(plan.shapes[n]) for n, r in ranks.items() if n in plan.shapes),
    )


def _over_time(steps: list[str], history: list[dict[str, int]]) -> Grid:
    picked = np.unique(np.linspace(0, len(history) - 1, COLUMNS).round().astype(int)).tolist()
    totals = [Counter[str]() for _ in picked]
    for total, index in zip(totals, picked, strict=True):
        for name, rank in history[index].items():
            total[kind_of(name)] += rank
    most = max((max(total.values(), default=0) for total in totals), default=0) or 1
    rows: list[tuple[str, list[Cell | None]]] = [
        (kind, [Cell(str(t[kind]), round(100 * t[kind] / most)) for t in totals])
        for kind in totals[0]
    ]
    return Grid("", [steps[i] for i in picked], rows)
