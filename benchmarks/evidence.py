"""TsqLoRA against its rivals at equal cost, on clean and on damaged data: a grid that resumes.

Run: .venv/bin/pip install -c constraints.txt -e '.[demo,bench]'
     .venv/bin/python benchmarks/evidence.py tune              # rates, judged on validation
     .venv/bin/python benchmarks/evidence.py run               # the core grid, cell by cell
     .venv/bin/python benchmarks/evidence.py run --processes 14   # as many cells at once, on a GPU
     .venv/bin/python benchmarks/evidence.py run --tasks cola --conditions clean --seeds 3
     .venv/bin/python benchmarks/evidence.py tune --more mine.json --tasks mine   # then run
     .venv/bin/python benchmarks/evidence.py tables            # Markdown, and plots

Each finished cell is a line of results/evidence.jsonl, each rate tried one of
results/evidence_tuning.jsonl; what is there is skipped, so it may be stopped at any time, unless
its rate is not the tuned one any more: then it is measured again, and the last line of a cell
counts. Nothing in the tables is written by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import Executor
from itertools import product
from pathlib import Path

from evidence_data import CORE, CORE_CONDITIONS, TASKS, more_tasks
from evidence_lines import CELLS, RESULTS, Key, key, read_cells
from evidence_methods import METHODS, RATE_OF
from evidence_pool import Job, measured_all, workers
from evidence_tuning import read_rate, tune
from tqdm import tqdm


def run(keys: Iterable[Key], epochs: float | None, results: Path, pool: Executor | None) -> None:
    """Each cell that is not there at its tuned rate; others may run beside on other shares.

    Seconds are compared with plain LoRA's where both were taken here: machines differ by the day.

    Raises:
        ConfigError: a rate is not tuned yet.
    """
    wanted = list(keys)
    rates = {(t, m): read_rate(TASKS[t], m, results) for t, m in {(t, m) for t, _, m, _ in wanted}}
    there = {key(line): line["config"]["learning_rate"] for line in read_cells(results)}
    jobs = [
        Job(TASKS[t], c, m, seed, rates[t, m], epochs)
        for t, c, m, seed in wanted
        if there.get((t, c, m, seed)) != rates[t, m]
    ]
    seconds = dict[Key, float]()
    for job, line in measured_all(jobs, pool, "cells"):
        task, condition, method, seed = job.key
        seconds[job.key] = line["seconds"]
        plain = seconds.get((task, condition, "lora", seed))
        line["seconds_ratio"] = round(line["seconds"] / plain, 3) if plain else None
        with (results / CELLS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(f"{task:6} {condition:12} {method:24} {seed} {line['metric']:.2f} "
                   f"cost {line['cost']:.2f} {line['seconds']:.0f} s")  # fmt: skip


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
    parser.add_argument("--processes", type=int, default=1, help="cells at once")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where all of it is kept")
    given = parser.parse_args()
    if given.more:
        TASKS.update(more_tasks(given.more))
    if unknown := set(given.tasks) - set(TASKS):
        parser.error(f"no task {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
    given.results.mkdir(parents=True, exist_ok=True)
    first, of = given.share
    if given.what == "tune":
        own = [method for method in given.methods if method not in RATE_OF]
        pairs = list(product(given.tasks, own))
        with workers(given.processes) as pool:
            tune(pairs[first - 1 :: of], given.epochs, given.results, pool)
    elif given.what == "run":
        order: list[Key] = [
            (task, condition, method, seed)
            for seed in range(given.seeds)
            for task in given.tasks
            for condition in given.conditions
            for method in given.methods
            if condition != "clean" or not method.startswith("oracle")  # there it is plain LoRA
        ]
        with workers(given.processes) as pool:
            run(order[first - 1 :: of], given.epochs, given.results, pool)
    else:
        from evidence_tables import write_tables

        print(write_tables(read_cells(given.results), given.results))


if __name__ == "__main__":
    main()
