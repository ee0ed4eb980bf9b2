"""The learning rate of every task and method, tried on seeds and rows that no cell has."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from common import read_lines
from evidence_data import TRUSTED, Task, read_rows

from tsqlora.errors import ConfigError

TUNING = "evidence_tuning.jsonl"
FIRST_SEED, TUNED_ON, TUNING_ROWS = 1000, ("clean", "wrong20"), 2000
"""Seeds of no cell, conditions and rows of validation: a method's rate has the best mean over them.

The rows are damaged as train is; there are so many because a rate's worth is less than the chance
of a few hundred. Where a task leaves fewer, its seeds are more (benchmarks/LOG.md).
"""
TRIAL = ("task", "condition", "method", "seed", "validation", "cost", "seconds", "versions", "at")
"""What is kept of a trial."""


Tried = dict[float, dict[tuple[str, int], float]]


def tried(task: Task, method: str, results: Path, epochs: float | None = None) -> Tried:
    """The validation metrics by rate and by (condition, seed), of so many epochs, or the task's."""
    found: Tried = {}
    wanted = (task.name, method, epochs or task.epochs)
    for line in read_lines(results / TUNING):
        if (line["task"], line["method"], line.get("epochs", task.epochs)) == wanted:
            cells = found.setdefault(line["rate"], {})
            cells[line["condition"], line["seed"]] = line["validation"]
    return found


def untried(task: Task, found: Tried) -> list[tuple[str, int, float]]:
    """The trials that are missing: of the task's rates, then of twice the best, if that is the
    highest tried, or half of it, if it is the lowest; of none where another one is as good."""
    wanted = set(task.rates)
    if wanted <= set(whole := _whole(task, found)):
        best = _best(whole)
        wanted = {2 * best} if best == max(whole) else {best / 2} if best == min(whole) else set()
        if list(whole.values()).count(whole[best]) > 1:
            wanted = set()
    return [
        (condition, seed, rate)
        for seed, condition, rate in product(_seeds(task), TUNED_ON, sorted(wanted))
        if (condition, seed) not in found.get(rate, {})
    ]


def _seeds(task: Task) -> range:
    return range(FIRST_SEED, FIRST_SEED + task.tuning_seeds)


def _whole(task: Task, found: Tried) -> dict[float, float]:
    """The mean metric of every rate that was tried in all cells."""
    cells = len(TUNED_ON) * len(_seeds(task))
    return {
        rate: sum(values.values()) / cells for rate, values in found.items() if len(values) == cells
    }


def _best(means: dict[float, float]) -> float:
    """Of equals the lowest."""
    return max(sorted(means), key=lambda rate: means[rate])


def best_rate(task: Task, found: Tried) -> float:
    """The tuned rate.

    Raises:
        ConfigError: not all trials are there.
    """
    if untried(task, found):
        raise ConfigError(f"{TUNING} has not all rates on {task.name}.")
    return _best(_whole(task, found))


def for_tuning(task: Task) -> Task:
    """The task with `TUNING_ROWS` rows of validation, or as many as its cells leave."""
    left = len(read_rows(task.train)) - TRUSTED - (task.samples or 0)
    rows = min(TUNING_ROWS, left) if task.samples else task.validation_rows
    return replace(task, validation_rows=max(rows, task.validation_rows))
