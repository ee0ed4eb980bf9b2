"""Means, paired differences and their intervals, from the lines of results/evidence.jsonl.

A mean is over seeds, with its 95 % interval by Student's t. A difference is paired: the same task,
condition and seed, so the same rows; its interval is a percentile bootstrap over the pairs, tasks
drawn apart (stratified), so that a task with few seeds weighs as much as another. Drawn from so few
pairs it would be too narrow (five normal ones: it holds the truth in 81 of 100 cases), so pairs are
first moved away from their mean, by √(n / (n − 1)) for the variance and t / z for its uncertainty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Line = dict[str, Any]
DRAWS = 4000
Statistic = Callable[[Sequence[np.ndarray]], float]
"""Of groups of (seeds, methods), one a task."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    tasks: int = 0
    pairs: int = 0

    def __str__(self) -> str:
        return self.shown()

    def shown(self, digits: int = 1, unit: str = "") -> str:
        """The mean and its interval, if one is known."""
        mean = f"{self.mean:.{digits}f}{unit}"
        known = np.isfinite(self.low) and np.isfinite(self.high)
        return f"{mean} [{self.low:.{digits}f}, {self.high:.{digits}f}]" if known else mean


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's interval of a mean; as wide as nothing known where there is one value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, float("-inf"), float("inf"), pairs=count)
    half = float(stats.t.ppf(0.975, count - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half, pairs=count)


class Cells:
    """The metric of every cell by (task, condition, method, seed)."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = {(x["task"], x["condition"], x["method"], x["seed"]): x for x in lines}

    def values(self, task: str, condition: str, method: str) -> dict[int, float]:
        """Metric by seed."""
        return {
            seed: line["metric"]
            for (t, c, m, seed), line in self.lines.items()
            if (t, c, m) == (task, condition, method)
        }

    def names(self, place: int) -> list[str]:
        """All tasks (0), conditions (1) or methods (2), in the order they came."""
        return list(dict.fromkeys(key[place] for key in self.lines))

    def pairs(self, task: str, condition: str, *methods: str) -> np.ndarray:
        """(seeds, methods): the seeds that all of them have."""
        found = [self.values(task, condition, method) for method in methods]
        seeds = sorted(set.intersection(*(set(values) for values in found)))
        return np.array([[values[seed] for values in found] for seed in seeds])

    def of_rare(self) -> Cells:
        """The same of the rows that the long tail makes rare, where they were measured."""
        lines = [line for line in self.lines.values() if "rare" in line]
        return Cells([{**line, "metric": line["rare"]} for line in lines])


def bootstrap(groups: Sequence[np.ndarray], statistic: Statistic) -> Interval:
    """The statistic of the groups (each (seeds, methods)), seeds drawn again within each group.

    No interval where no group has two seeds.
    """
    groups = [group for group in groups if len(group)]
    if not groups:
        return Interval(float("nan"), float("nan"), float("nan"))
    pairs = sum(len(group) for group in groups)
    free = pairs - len(groups)
    if not free:
        return Interval(statistic(groups), -np.inf, np.inf, len(groups), pairs)
    wide = [_spread(group, free) for group in groups]
    rng = np.random.default_rng(0)
    drawn = [
        statistic([group[rng.integers(0, len(group), len(group))] for group in wide])
        for _ in range(DRAWS)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Interval(statistic(groups), float(low), float(high), len(groups), pairs)


def _spread(group: np.ndarray, free: int) -> np.ndarray:
    """The group about its mean, as wide as a bootstrap of few needs it; `free`: of all groups."""
    n, mean = len(group), group.mean(axis=0)
    by = stats.t.ppf(0.975, free) / stats.norm.ppf(0.975) * np.sqrt(n / max(1, n - 1))
    return mean + by * (group - mean)


def difference(groups: Sequence[np.ndarray]) -> float:
    """Mean over tasks of the mean over seeds of first − second."""
    return float(np.mean([(group[:, 0] - group[:, 1]).mean() for group in groups]))


def closed(groups: Sequence[np.ndarray]) -> float:
    """Σ (method − plain) / Σ (oracle − plain) over tasks, in per cent: the part of the gap."""
    gained = sum(float((group[:, 0] - group[:, 1]).mean()) for group in groups)
    gap = sum(float((group[:, 2] - group[:, 1]).mean()) for group in groups)
    return 100 * gained / gap if gap > 0 else float("nan")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])
