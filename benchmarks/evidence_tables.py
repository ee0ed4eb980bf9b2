"""The tables and plots of the evidence, from results/evidence.jsonl alone.

A mean is over seeds, with its 95 % interval by Student's t. A difference is paired: the same task,
condition and seed, so the same rows; its interval is a percentile bootstrap over the pairs, tasks
drawn apart (stratified), so that a task with few seeds weighs as much as another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Line = dict[str, Any]
DRAWS = 4000
PLAIN = "lora"


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    tasks: int = 0
    pairs: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


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


def bootstrap(
    groups: Sequence[np.ndarray], statistic: Callable[[Sequence[np.ndarray]], float]
) -> Interval:
    """The statistic of the groups (each (seeds, methods)), seeds drawn again within each group."""
    groups = [group for group in groups if len(group)]
    if not groups:
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(0)
    drawn = [
        statistic([group[rng.integers(0, len(group), len(group))] for group in groups])
        for _ in range(DRAWS)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    pairs = sum(len(group) for group in groups)
    return Interval(statistic(groups), float(low), float(high), len(groups), pairs)


def difference(groups: Sequence[np.ndarray]) -> float:
    """Mean over tasks of the mean over seeds of first − second."""
    return float(np.mean([(group[:, 0] - group[:, 1]).mean() for group in groups]))


def closed(groups: Sequence[np.ndarray]) -> float:
    """Σ (method − plain) / Σ (oracle − plain) over tasks, in per cent: the part of the gap."""
    gained = sum(float((group[:, 0] - group[:, 1]).mean()) for group in groups)
    gap = sum(float((group[:, 2] - group[:, 1]).mean()) for group in groups)
    return 100 * gained / gap if gap > 0 else float("nan")


def metric_table(cells: Cells, task: str) -> str:
    """Methods down, conditions across: mean and interval, and the seeds."""
    conditions = [c for c in cells.names(1) if any(k[:2] == (task, c) for k in cells.lines)]
    rows = [["method", *conditions, "cost", "parameters"]]
    for method in cells.names(2):
        found = [cells.values(task, c, method) for c in conditions]
        if not any(found):
            continue
        lines = [x for k, x in cells.lines.items() if k[0] == task and k[2] == method]
        cost = float(np.mean([line["cost"] for line in lines]))
        parameters = round(float(np.mean([line["adapter_parameters"] for line in lines])))
        shown = [_shown(list(values.values())) if values else "" for values in found]
        rows.append([f"`{method}`", *shown, f"{cost:.2f}", f"{parameters:,}"])
    return markdown(rows)


def _shown(values: list[float]) -> str:
    found = mean_interval(values)
    half = found.high - found.mean
    return f"{found.mean:.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "") + f" ({len(values)})"


def against_plain(cells: Cells) -> str:
    """Every method minus plain LoRA, paired, mean over the tasks that have both."""
    conditions, tasks = cells.names(1), cells.names(0)
    rows = [["method − plain LoRA", *conditions]]
    for method in cells.names(2):
        if method == PLAIN:
            continue
        row = [f"`{method}`"]
        for condition in conditions:
            groups = [cells.pairs(task, condition, method, PLAIN) for task in tasks]
            found = bootstrap(groups, difference)
            row.append(f"{found} ({found.tasks})" if found.tasks else "")
        rows.append(row)
    return markdown(rows)


def gaps(cells: Cells) -> str:
    """How much of the gap between plain LoRA and the oracle each method closes, per cent."""
    tasks, conditions = (
        cells.names(0),
        [c for c in cells.names(1) if c not in ("clean", "longtail")],
    )
    rows = [["gap closed, %", *conditions]]
    for method in cells.names(2):
        trusted = method.endswith("_trusted")
        plain, oracle = ("lora_trusted", "oracle_trusted") if trusted else (PLAIN, "oracle")
        if method in (plain, oracle):
            continue
        groups = {c: [cells.pairs(t, c, method, plain, oracle) for t in tasks] for c in conditions}
        found = {c: bootstrap(group, closed) for c, group in groups.items()}
        rows.append(
            [f"`{method}`", *(f"{x} ({x.tasks})" if x.tasks else "" for x in found.values())]
        )
    return markdown(rows)


def found_table(cells: Cells) -> str:
    """How well credibility finds planted wrong targets."""
    rows = [["task", "condition", "method", "AUROC credibility", "AUROC loss", "share found"]]
    seen = dict.fromkeys((k[0], k[1], k[2]) for k in cells.lines)
    for task, condition, method in seen:
        notes = [x["notes"] for k, x in cells.lines.items() if k[:3] == (task, condition, method)]
        notes = [note for note in notes if "auroc_credibility" in note]
        if notes:
            means = [
                float(np.mean([note[name] for note in notes]))
                for name in ("auroc_credibility", "auroc_loss", "wrong_share")
            ]
            rows.append([task, condition, f"`{method}`", *(f"{mean:.3f}" for mean in means)])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def write_tables(lines: Sequence[Line], folder: Path) -> str:
    """evidence.md and plots in `folder`; returns the Markdown."""
    cells = Cells(lines)
    parts = ["## Against plain LoRA, points, 95 % interval (tasks)", against_plain(cells)]
    parts += ["## Part of the gap to the oracle", gaps(cells)]
    parts += ["## Wrong targets found", found_table(cells)]
    for task in cells.names(0):
        metric = next(x["metric_name"] for k, x in cells.lines.items() if k[0] == task)
        parts += [f"## {task}: {metric}, mean ± half of the 95 % interval (seeds)"]
        parts += [metric_table(cells, task)]
    text = "\n\n".join(parts) + "\n"
    (folder / "evidence.md").write_text(text, encoding="utf-8")
    plot(cells, folder)
    return text


def plot(cells: Cells, folder: Path) -> None:
    """Difference from plain LoRA, a panel a condition, as evidence.png and evidence.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    conditions, tasks = cells.names(1), cells.names(0)
    methods = [m for m in cells.names(2) if m != PLAIN]
    figure, axes = pyplot.subplots(
        1, len(conditions), sharey=True, figsize=(3.2 * len(conditions), 0.32 * len(methods) + 1.2)
    )
    for axis, condition in zip(np.atleast_1d(axes), conditions, strict=True):
        for place, method in enumerate(methods):
            groups = [cells.pairs(task, condition, method, PLAIN) for task in tasks]
            found = bootstrap(groups, difference)
            if found.tasks:
                axis.plot([found.low, found.high], [place, place], color="0.5")
                axis.plot(found.mean, place, "o", color="black")
        axis.axvline(0, color="0.7", linewidth=0.8)
        axis.set_title(condition)
        axis.set_xlabel("points over plain LoRA")
    first = np.atleast_1d(axes)[0]
    first.set_yticks(range(len(methods)), methods)
    first.invert_yaxis()
    figure.tight_layout()
    for ending in ("png", "svg"):
        figure.savefig(folder / f"evidence.{ending}", dpi=130)
    pyplot.close(figure)
