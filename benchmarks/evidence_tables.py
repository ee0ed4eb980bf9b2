"""The tables and plots of the evidence, from results/evidence.jsonl alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from evidence_claims import OURS, claims
from evidence_data import CONDITIONS, CORE, CORE_CONDITIONS, TASKS
from evidence_methods import METHODS
from evidence_stats import (
    Cells,
    Line,
    bootstrap,
    closed,
    difference,
    markdown,
    mean_interval,
)

PLAIN = "lora"
FEW = 3
"""A task of fewer seeds than this is in no mean over tasks beside others that have them."""
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- evidence: by benchmarks/evidence.py tables -->", "<!-- /evidence -->"


def metric_table(cells: Cells, task: str) -> str:
    """Methods down, conditions across: mean and interval, and the seeds."""
    conditions = [c for c in cells.names(1) if any(k[:2] == (task, c) for k in cells.lines)]
    rows = [["method", *conditions, "cost", "seconds", "parameters"]]
    for method in cells.names(2):
        found = [cells.values(task, c, method) for c in conditions]
        if not any(found):
            continue
        lines = [x for k, x in cells.lines.items() if k[0] == task and k[2] == method]
        cost = float(np.mean([line["cost"] for line in lines]))
        ratios = [x["seconds_ratio"] for x in lines if x.get("seconds_ratio")]
        seconds = f"{np.median(ratios):.2f}" if ratios else ""
        parameters = round(float(np.mean([line["adapter_parameters"] for line in lines])))
        shown = [_shown(list(values.values())) if values else "" for values in found]
        rows.append([f"`{method}`", *shown, f"{cost:.2f}", seconds, f"{parameters:,}"])
    return markdown(rows)


def _shown(values: list[float]) -> str:
    found = mean_interval(values)
    half = found.high - found.mean
    return f"{found.mean:.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "") + f" ({len(values)})"


def pooled(cells: Cells) -> list[str]:
    """The tasks that means are taken over: the core's, as the others have another metric's points
    or fewer seeds; without any, all."""
    return [task for task in CORE if task in cells.names(0)] or cells.names(0)


def paired(cells: Cells, condition: str, *methods: str) -> list[np.ndarray]:
    """(seeds, methods) of each `pooled` task; of fewer than `FEW` seeds only where no task has
    more, as a task of one seed shows no spread and the interval would be too narrow."""
    groups = [cells.pairs(task, condition, *methods) for task in pooled(cells)]
    return [group for group in groups if len(group) >= FEW] or groups


def against_plain(cells: Cells) -> str:
    """Every method minus plain LoRA, paired, mean over the `pooled` tasks that have both.

    Methods with trusted rows minus plain LoRA that trains on these too, which itself is shown
    against plain LoRA.
    """
    conditions = cells.names(1)
    rows = [["method − plain LoRA", *conditions]]
    for method in cells.names(2):
        if method == PLAIN:
            continue
        plain = plain_of(method)
        row = [f"`{method}`" + (f" − `{plain}`" if plain != PLAIN else "")]
        for condition in conditions:
            found = bootstrap(paired(cells, condition, method, plain), difference)
            row.append(f"{found} ({found.tasks})" if found.tasks else "")
        rows.append(row)
    return markdown(rows)


def plain_of(method: str) -> str:
    """Plain LoRA on the rows that the method has."""
    trusted = f"{PLAIN}_trusted"
    return trusted if method.endswith("_trusted") and method != trusted else PLAIN


def gaps(cells: Cells) -> str:
    """How much of the gap between plain LoRA and the oracle each method closes, per cent."""
    conditions = [c for c in cells.names(1) if c not in ("clean", "longtail")]
    rows = [["gap closed, %", *conditions]]
    for method in cells.names(2):
        trusted = method.endswith("_trusted")
        plain, oracle = ("lora_trusted", "oracle_trusted") if trusted else (PLAIN, "oracle")
        if method in (plain, oracle):
            continue
        found = {c: bootstrap(paired(cells, c, method, plain, oracle), closed) for c in conditions}
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
            names = ("auroc_credibility", "auroc_loss", "wrong_share")
            means = [_mean_of_known([note[name] for note in notes]) for name in names]
            rows.append([task, condition, f"`{method}`", *means])
    return markdown(rows)


def _mean_of_known(values: list[float | None]) -> str:
    """None is what was not looked for, where a training was too short; said, how often it was."""
    known = [value for value in values if value is not None]
    few = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{np.mean(known):.3f}{few}" if known else ""


def rare_table(cells: Cells) -> str:
    """Of the rows that the long tail makes rare: a class's recall, else the task's metric."""
    rare = cells.of_rare()
    rows = [["task", *(f"`{method}`" for method in rare.names(2))]]
    for task in rare.names(0):
        found = [list(rare.values(task, "longtail", m).values()) for m in rare.names(2)]
        rows.append([task, *(_shown(values) if values else "" for values in found)])
    return markdown(rows)


def tables(cells: Cells) -> str:
    """All of them as Markdown."""
    parts = ["## Claims", claims(cells, pooled(cells))]
    parts += ["## Against plain LoRA, points, 95 % interval (tasks)", against_plain(cells)]
    parts += ["## Part of the gap to the oracle", gaps(cells)]
    parts += ["## Wrong targets found", found_table(cells)]
    parts += ["## The rare class, or the longest fifth, in the long tail", rare_table(cells)]
    for task in cells.names(0):
        metric = next(x["metric_name"] for k, x in cells.lines.items() if k[0] == task)
        parts += [f"## {task}: {metric}, mean ± half of the 95 % interval (seeds)"]
        parts += [metric_table(cells, task)]
    return "\n\n".join(parts) + "\n"


def write_tables(lines: Sequence[Line], folder: Path) -> str:
    """evidence.md and plots in `folder`; returns the Markdown."""
    cells = Cells(in_order(lines))
    text = tables(cells)
    (folder / "evidence.md").write_text(text, encoding="utf-8")
    for readme, shown in (
        (folder.parent / "README.md", text),
        (ROOT / "README.md", front_page(cells)),
    ):
        if folder == RESULTS:
            _show(readme, shown)
    plot(cells, folder)
    return text


def in_order(lines: Sequence[Line]) -> list[Line]:
    """By task, condition and method as they are defined, in whatever order the cells were run."""
    places = [{name: i for i, name in enumerate(known)} for known in (TASKS, CONDITIONS, METHODS)]

    def place(line: Line) -> list[int]:
        names = (line["task"], line["condition"], line["method"])
        return [known.get(name, len(known)) for known, name in zip(places, names, strict=True)]

    return sorted(lines, key=place)


def front_page(cells: Cells) -> str:
    """Plain LoRA, the default and the oracle on every core task."""
    conditions = (*CORE_CONDITIONS, "longtail")
    rows: list[list[str]] = [["task", "method", *conditions]]
    for task, method in product(pooled(cells), (PLAIN, OURS, "oracle")):
        found = [list(cells.values(task, c, method).values()) for c in conditions]
        shown = [_shown(values) if values else "" for values in found]
        rows.append([task if method == PLAIN else "", f"`{method}`", *shown])
    return markdown(rows)


def _show(readme: Path, text: str) -> None:
    """Put `text` between the two marks of a README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    shown = text.replace("\n## ", "\n### ").removeprefix("## ").strip()
    shown = f"### {shown}" if text.startswith("## ") else shown
    readme.write_text(f"{before}{BEGIN}\n\n{shown}\n\n{end}{after}", encoding="utf-8")


def plot(cells: Cells, folder: Path) -> None:
    """Difference from plain LoRA, a panel a condition, as evidence.png and evidence.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    conditions = cells.names(1)
    methods = [m for m in cells.names(2) if m != PLAIN]
    figure, axes = pyplot.subplots(
        1, len(conditions), sharey=True, figsize=(3.2 * len(conditions), 0.32 * len(methods) + 1.2)
    )
    for axis, condition in zip(np.atleast_1d(axes), conditions, strict=True):
        for place, method in enumerate(methods):
            found = bootstrap(paired(cells, condition, method, plain_of(method)), difference)
            if found.tasks and found.pairs > found.tasks:
                axis.plot([found.low, found.high], [place, place], color="0.5")
            if found.tasks:
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
