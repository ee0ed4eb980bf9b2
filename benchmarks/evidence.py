"""TsqLoRA against its rivals at equal cost, on clean and on damaged data: a grid that resumes.

Run: .venv/bin/pip install -c constraints.txt -e '.[demo,bench]'
     .venv/bin/python benchmarks/evidence.py tune              # rates, judged on validation
     .venv/bin/python benchmarks/evidence.py run               # the core grid, cell by cell
     .venv/bin/python benchmarks/evidence.py run --tasks cola --conditions clean --seeds 3
     .venv/bin/python benchmarks/evidence.py tune --more mine.json --tasks mine   # then run
     .venv/bin/python benchmarks/evidence.py tables            # Markdown, and plots

Each finished cell is a line of results/evidence.jsonl, each rate tried one of
results/evidence_tuning.jsonl; what is there is skipped, so it may be stopped at any time. Nothing
in the tables is written by hand.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from evidence_cell import Cell, Outcome
from evidence_data import (
    CORE,
    CORE_CONDITIONS,
    TASKS,
    TRUSTED,
    Task,
    make_cell,
    more_tasks,
    read_rows,
    write_cell,
)
from evidence_methods import METHODS, RATE_OF
from tqdm import tqdm

from tsqlora import __version__
from tsqlora.artefacts import digest
from tsqlora.errors import ConfigError

RESULTS = Path(__file__).resolve().parent / "results"
CELLS, TUNING = "evidence.jsonl", "evidence_tuning.jsonl"
TUNING_SEEDS, TUNED_ON, TUNING_ROWS = (1000, 1001), ("clean", "wrong20"), 2000
"""Seeds of no cell, conditions and rows of validation: a method's rate has the best mean over them.

The rows are damaged as train is; there are so many because a rate's worth is less than the chance
of a few hundred (benchmarks/LOG.md).
"""

TRIAL = ("task", "condition", "method", "seed", "validation", "cost", "seconds", "versions", "at")
"""What is kept of a trial."""

Key = tuple[str, str, str, int]


def run(keys: Iterable[Key], epochs: float | None, results: Path) -> None:
    """Each cell that is not there yet, in turn; others may run beside on other shares.

    Seconds are compared with plain LoRA's where both were taken here: machines differ by the day.
    """
    seconds = dict[Key, float]()
    for task, condition, method, seed in tqdm(list(keys), desc="cells", unit="cell"):
        if (task, condition, method, seed) in set(map(key, read_cells(results))):
            continue
        rate = read_rate(TASKS[task], method, results)
        line = measured(TASKS[task], condition, method, seed, rate, epochs)
        seconds[key(line)] = line["seconds"]
        plain = seconds.get((task, condition, "lora", seed))
        line["seconds_ratio"] = round(line["seconds"] / plain, 3) if plain else None
        with (results / CELLS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(f"{task:6} {condition:12} {method:24} {seed} {line['metric']:.2f} "
                   f"cost {line['cost']:.2f} {line['seconds']:.0f} s")  # fmt: skip


def measured(
    kind: Task, condition: str, method: str, seed: int, rate: float, epochs: float | None = None
) -> dict[str, Any]:
    """A cell's line."""
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        data = make_cell(kind, condition, seed)
        write_cell(data, Path(folder) / "data")
        cell = Cell(kind, condition, method, seed, data, Path(folder), rate, epochs or kind.epochs)
        outcome = METHODS[method](cell)
        config = cell.config().to_dict()
    rare = {"rare": round(points(outcome, "rare", kind.of_rare), 3)} if data.rare else {}
    return {
        "task": kind.name,
        "condition": condition,
        "method": method,
        "seed": seed,
        "metric_name": kind.metric,
        "metric": round(points(outcome, "test", kind.metric), 3),
        "validation": round(points(outcome, "validation", kind.metric), 3),
        **rare,
        "cost": round(outcome.passes / cell.budget, 4),
        "seconds": round(outcome.seconds, 1),
        "adapter_parameters": outcome.parameters,
        "notes": outcome.notes,
        "config": {
            "learning_rate": rate,
            "epochs": cell.epochs,
            "samples": len(data.train),
            "batch": kind.batch,
            "digest": digest({**config, "output": None, "data": None, "model": None}),
        },
        "versions": versions(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def points(outcome: Outcome, split: str, metric: str) -> float:
    """In points of 100; a loss as it is, with its sign turned so that more is better."""
    value = outcome.metrics[split][metric]
    return -value if metric == "loss" else 100 * value


def versions() -> dict[str, str]:
    """What it ran on."""
    return {
        "tsqlora": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "machine": "cuda" if torch.cuda.is_available() else platform.machine(),
    }


def tune(pairs: Iterable[tuple[str, str]], epochs: float | None, results: Path) -> None:
    """Try the rates of these tasks and methods, a line of results/evidence_tuning.jsonl each."""
    for task, method in tqdm(list(pairs), desc="tuning", unit="method"):
        while missing := untried(TASKS[task], tried(task, method, results)):
            for condition, seed, rate in tqdm(missing, desc=f"{method} on {task}", leave=False):
                kind = for_tuning(TASKS[task])
                line = measured(kind, condition, method, seed, rate, epochs)
                kept = {name: line[name] for name in TRIAL}
                with (results / TUNING).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**kept, "rate": rate}) + "\n")
                tqdm.write(f"{task:6} {condition:12} {method:24} {seed} {rate} "
                           f"{line['validation']:.2f}")  # fmt: skip


Tried = dict[float, dict[tuple[str, int], float]]


def tried(task: str, method: str, results: Path) -> Tried:
    """The validation metrics by rate and by (condition, seed)."""
    found: Tried = {}
    for line in read_lines(results / TUNING):
        if (line["task"], line["method"]) == (task, method):
            cells = found.setdefault(line["rate"], {})
            cells[line["condition"], line["seed"]] = line["validation"]
    return found


def untried(task: Task, found: Tried) -> list[tuple[str, int, float]]:
    """The trials that are missing: of the task's rates, then of twice the best, if that is the
    highest tried, or half of it, if it is the lowest."""
    wanted = set(task.rates)
    if wanted <= set(whole := _whole(found)):
        best = _best(whole)
        wanted = {2 * best} if best == max(whole) else {best / 2} if best == min(whole) else set()
    return [
        (condition, seed, rate)
        for seed, condition, rate in product(TUNING_SEEDS, TUNED_ON, sorted(wanted))
        if (condition, seed) not in found.get(rate, {})
    ]


def _whole(found: Tried) -> dict[float, float]:
    """The mean metric of every rate that was tried in all cells."""
    cells = len(TUNED_ON) * len(TUNING_SEEDS)
    return {
        rate: sum(values.values()) / cells for rate, values in found.items() if len(values) == cells
    }


def _best(means: dict[float, float]) -> float:
    """Of equals the lowest."""
    return max(sorted(means), key=lambda rate: means[rate])


def read_rate(task: Task, method: str, results: Path = RESULTS) -> float:
    """The tuned rate.

    Raises:
        ConfigError: not all trials are there.
    """
    name = RATE_OF.get(method, method)
    found = tried(task.name, name, results)
    if untried(task, found):
        raise ConfigError(
            f"{results / TUNING} has not all rates of {name} on {task.name}: run `tune` first."
        )
    return _best(_whole(found))


def for_tuning(task: Task) -> Task:
    """The task with `TUNING_ROWS` rows of validation, or as many as its cells leave."""
    left = len(read_rows(task.train)) - TRUSTED - (task.samples or 0)
    rows = min(TUNING_ROWS, left) if task.samples else task.validation_rows
    return replace(task, validation_rows=max(rows, task.validation_rows))


def read_cells(results: Path = RESULTS) -> list[dict[str, Any]]:
    """All finished cells."""
    return read_lines(results / CELLS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a JSON Lines file holds; a line cut off by an interruption is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def key(line: dict[str, Any]) -> Key:
    """What tells a cell from the others."""
    return line["task"], line["condition"], line["method"], line["seed"]


def share(text: str) -> tuple[int, int]:
    """ "2/3" as (2, 3)."""
    first, of = map(int, text.split("/"))
    return first, of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tune", "run", "tables"))
    parser.add_argument("--tasks", nargs="+", default=list(CORE))
    parser.add_argument("--more", type=Path, help="a JSON file of tasks of your own (more_tasks)")
    parser.add_argument("--conditions", nargs="+", default=list(CORE_CONDITIONS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this, less one")
    parser.add_argument("--epochs", type=float, help="another budget than the task's")
    parser.add_argument(
        "--share",
        type=share,
        default=(1, 1),
        help="1/2 and 2/2: half of the cells in a process each",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where all of it is kept")
    given = parser.parse_args()
    logging.getLogger("tsqlora").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    if given.more:
        TASKS.update(more_tasks(given.more))
    if unknown := set(given.tasks) - set(TASKS):
        parser.error(f"no task {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
    given.results.mkdir(parents=True, exist_ok=True)
    first, of = given.share
    if given.what == "tune":
        own = [method for method in given.methods if method not in RATE_OF]
        pairs = list(product(given.tasks, own))
        tune(pairs[first - 1 :: of], given.epochs, given.results)
    elif given.what == "run":
        order: list[Key] = [
            (task, condition, method, seed)
            for seed in range(given.seeds)
            for task in given.tasks
            for condition in given.conditions
            for method in given.methods
            if condition != "clean" or not method.startswith("oracle")  # there it is plain LoRA
        ]
        run(order[first - 1 :: of], given.epochs, given.results)
    else:
        from evidence_tables import write_tables

        print(write_tables(read_cells(given.results), given.results))


if __name__ == "__main__":
    main()
