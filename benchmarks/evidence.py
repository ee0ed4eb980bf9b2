"""TsqLoRA against its rivals at equal cost, on clean and on damaged data: a grid that resumes.

Run: .venv/bin/pip install -c constraints.txt -e '.[demo,bench]'
     .venv/bin/python benchmarks/evidence.py tune              # rates, judged on validation
     .venv/bin/python benchmarks/evidence.py run               # the core grid, cell by cell
     .venv/bin/python benchmarks/evidence.py run --tasks cola --conditions clean --seeds 3
     .venv/bin/python benchmarks/evidence.py tune --more mine.json --tasks mine   # then run
     .venv/bin/python benchmarks/evidence.py tables            # Markdown, and plots

Each finished cell is a line of results/evidence.jsonl; cells that are there are skipped, so it may
be stopped at any time. Rates are those of results/evidence_rates.json. Nothing in the tables is
written by hand.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from evidence_cell import Cell, Outcome
from evidence_data import CORE, CORE_CONDITIONS, TASKS, make_cell, more_tasks, write_cell
from evidence_methods import METHODS, RATE_OF
from tqdm import tqdm

from tsqlora import __version__
from tsqlora.artefacts import atomic_write_json, digest
from tsqlora.errors import ConfigError

RESULTS = Path(__file__).resolve().parent / "results"
CELLS, RATES = "evidence.jsonl", "evidence_rates.json"
TUNING_SEED, TUNED_ON = 1000, ("clean", "wrong20")
"""A seed of no cell; a method's rate is the best mean validation metric over these conditions."""

Key = tuple[str, str, str, int]


def run(keys: Iterable[Key], epochs: float | None, results: Path) -> None:
    """Each cell that is not there yet, in turn; others may run beside on other shares.

    Seconds are compared with plain LoRA's where both were taken here: machines differ by the day.
    """
    rates, seconds = read_rates(results), dict[Key, float]()
    for task, condition, method, seed in tqdm(list(keys), desc="cells", unit="cell"):
        if (task, condition, method, seed) in set(map(key, read_cells(results))):
            continue
        rate = rates.get(f"{task}/{RATE_OF.get(method, method)}")
        if rate is None:
            raise ConfigError(
                f"{results / RATES} has no rate for {method} on {task}: run `tune` first."
            )
        line = measured(task, condition, method, seed, rate, epochs)
        seconds[key(line)] = line["seconds"]
        plain = seconds.get((task, condition, "lora", seed))
        line["seconds_ratio"] = round(line["seconds"] / plain, 3) if plain else None
        with (results / CELLS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(f"{task:6} {condition:12} {method:24} {seed} {line['metric']:.2f} "
                   f"cost {line['cost']:.2f} {line['seconds']:.0f} s")  # fmt: skip


def measured(
    task: str, condition: str, method: str, seed: int, rate: float, epochs: float | None = None
) -> dict[str, Any]:
    """A cell's line."""
    kind = TASKS[task]
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        data = make_cell(kind, condition, seed)
        write_cell(data, Path(folder) / "data")
        cell = Cell(kind, condition, method, seed, data, Path(folder), rate, epochs or kind.epochs)
        outcome = METHODS[method](cell)
        config = cell.config().to_dict()
    rare = {"rare": round(points(outcome, "rare", kind.of_rare), 3)} if data.rare else {}
    return {
        "task": task,
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


def tune(tasks: Iterable[str], methods: Iterable[str], epochs: float | None, results: Path) -> None:
    """The rate of each task and method, kept in results/evidence_rates.json with what was tried."""
    file = results / RATES
    rates = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    own = [method for method in methods if method not in RATE_OF]
    missing = [(t, m) for t in tasks for m in own if f"{t}/{m}" not in rates]
    for task, method in tqdm(missing, desc="tuning", unit="method"):
        tried = {
            rate: {
                condition: measured(task, condition, method, TUNING_SEED, rate, epochs)[
                    "validation"
                ]
                for condition in TUNED_ON
            }
            for rate in TASKS[task].rates
        }
        best = max(TASKS[task].rates, key=lambda rate: sum(tried[rate].values()))
        rates[f"{task}/{method}"] = {"rate": best, "tried": {str(r): v for r, v in tried.items()}}
        atomic_write_json(file, rates)
        tqdm.write(f"{task:6} {method:24} {best}")


def read_rates(results: Path = RESULTS) -> dict[str, float]:
    """The tuned rate by "task/method"."""
    file = results / RATES
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: entry["rate"] for name, entry in found.items()}


def read_cells(results: Path = RESULTS) -> list[dict[str, Any]]:
    """All finished cells; a line cut off by an interruption is not one."""
    path = results / CELLS
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
    if given.what == "tune":
        tune(given.tasks, given.methods, given.epochs, given.results)
    elif given.what == "run":
        order: list[Key] = [
            (task, condition, method, seed)
            for seed in range(given.seeds)
            for task in given.tasks
            for condition in given.conditions
            for method in given.methods
            if condition != "clean" or not method.startswith("oracle")  # there it is plain LoRA
        ]
        first, of = given.share
        run(order[first - 1 :: of], given.epochs, given.results)
    else:
        from evidence_tables import write_tables

        print(write_tables(read_cells(given.results), given.results))


if __name__ == "__main__":
    main()
