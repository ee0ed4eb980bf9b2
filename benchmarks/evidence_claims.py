"""The nine claims of issue 5, each with what was measured for it and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
from evidence_stats import Cells, Interval, Statistic, bootstrap, closed, difference, markdown

OURS = "tsqlora"
HALF = "tsqlora_r4"
HARM = -0.3
FOUND = {"g2p": 0.95, "trec": 0.95, "sst2": 0.90}
"""AUROC of credibility that is asked for, by task."""
ENOUGH = 5
"""Seeds of a task below which nothing is said."""
Row = tuple[str, str, str, str]


def claims(cells: Cells, tasks: Sequence[str]) -> str:
    """A line a claim: target, measured [95 % interval] (tasks, pairs), whether that says so.

    `no` where it does not, `yes` where all of it is on the right side; claims without any cell yet
    are left out. Fewer tasks than the core's make it a claim of those tasks alone.
    """
    head = ("claim", "target", "measured", "holds")
    parts = (_gaps, _clean, _differences, _found, _rare)
    return markdown([head, *(row for part in parts for row in part(cells, tasks) if row[2])])


def _gaps(cells: Cells, tasks: Sequence[str]) -> Iterator[Row]:
    for number, end, least in ((1, "_trusted", 90.0), (2, "", 80.0)):
        for condition in ("wrong20", "wrong40"):
            names = (OURS + end, "lora" + end, "oracle" + end)
            groups = {task: cells.pairs(task, condition, *names) for task in tasks}
            pairs = list(groups.values())
            found, points = bootstrap(pairs, closed), bootstrap(pairs, difference)
            words = f"{number}. {condition}{', 300 trusted' if end else ', none trusted'}"
            shown = f"{_shown(found, ' %')}: {points} points" if found.tasks else ""
            shown += _by_task(groups, closed, 0)
            yield words, f"≥ {least:.0f} % of the gap", shown, _holds(found, least)


def _clean(cells: Cells, tasks: Sequence[str]) -> Iterator[Row]:
    for end, words in (("", ""), ("_trusted", ", 300 trusted")):
        for task in tasks:
            pairs = cells.pairs(task, "clean", OURS + end, "lora" + end)
            found = bootstrap([pairs], difference)
            yield f"3. clean{words}, {task}", f"≥ {HARM}", _shown(found), _holds(found, HARM)


def _differences(cells: Cells, tasks: Sequence[str]) -> Iterator[Row]:
    for words, condition, method, other, least in (
        ("4. clean, 0.6 of the cost − plain", "clean", "tsqlora_06", "lora", 0.0),
        ("5. 50 % near-duplicates", "duplicates50", OURS, "lora", 1.0),
        ("5. the same, 300 trusted", "duplicates50", f"{OURS}_trusted", "lora_trusted", 1.0),
        ("6. half the parameters − uniform r = 8", "clean", HALF, "lora", HARM),
        ("6. half the parameters − uniform r = 4", "clean", HALF, "lora_r4", 0.0),
        ("7. ranks alone − AdaLoRA", "clean", "tsqlora_ranks_only", "adalora", 0.0),
        ("7. ranks alone − EVA", "clean", "tsqlora_ranks_only", "eva", 0.0),
        ("7. ranks alone − uniform", "clean", "tsqlora_ranks_only", "lora", 0.0),
    ):
        groups = {task: cells.pairs(task, condition, method, other) for task in tasks}
        found = bootstrap(list(groups.values()), difference)
        shown = _shown(found) + _by_task(groups, difference)
        yield words, f"≥ {least}", shown, _holds(found, least)


def _found(cells: Cells, tasks: Sequence[str]) -> Iterator[Row]:
    """At the end of the training: of three epochs a forward of every sample alone is a sixth."""
    for task, condition in product(tasks, ("wrong20", "wrong40")):
        if task not in FOUND:
            continue
        values = [
            line["notes"]["auroc_credibility"]
            for key, line in cells.lines.items()
            if key[:3] == (task, condition, OURS) and "auroc_credibility" in line["notes"]
        ]
        found = bootstrap([np.array(values)], lambda groups: float(np.mean(groups[0])))
        shown = f"{found.shown(3)} ({len(values)} cells)"
        words = f"8. AUROC of credibility at the end, {task}, {condition}"
        yield words, f"≥ {FOUND[task]:.2f}", shown * bool(values), _holds(found, FOUND[task])


def _rare(cells: Cells, tasks: Sequence[str]) -> Iterator[Row]:
    rare = cells.of_rare()
    groups = [rare.pairs(task, "longtail", OURS, "lora") for task in rare.names(0)]
    found = bootstrap(groups, difference)
    yield "9. the rare class's recall − plain", "≥ 0.0", _shown(found), _holds(found, 0.0)


def _shown(found: Interval, unit: str = "") -> str:
    if not found.tasks:
        return ""
    return f"{found.shown(unit=unit)} ({found.tasks} tasks, {found.pairs} pairs)"


def _by_task(groups: Mapping[str, np.ndarray], statistic: Statistic, digits: int = 1) -> str:
    """What each task alone comes to, as a mean may hide one that differs."""
    known = {task: group for task, group in groups.items() if len(group)}
    each = ", ".join(f"{task} {statistic([group]):.{digits}f}" for task, group in known.items())
    return f"; {each}" if len(known) > 1 else ""


def _holds(found: Interval, least: float) -> str:
    if not found.tasks:
        return ""
    if found.pairs < ENOUGH * found.tasks:
        return f"open: fewer than {ENOUGH} seeds"
    return "yes" if found.low >= least else "no"
