"""TsqLoRA against its rivals at equal cost, on clean and on damaged data: a grid that resumes.

Run: .venv/bin/pip install -c constraints.txt -e '.[demo,bench]'
     .venv/bin/python benchmarks/evidence.py run               # the core grid, cell by cell
     .venv/bin/python benchmarks/evidence.py run --processes 14   # as many cells at once, on a GPU
     .venv/bin/python benchmarks/evidence.py run --tasks cola --conditions clean --seeds 3
     .venv/bin/python benchmarks/evidence.py run --more mine.json --tasks mine
     .venv/bin/python benchmarks/evidence.py tune              # the rates alone
     .venv/bin/python benchmarks/evidence.py tables            # Markdown, and plots

Rates are tried first, judged on validation, and a cell follows as soon as its rate is known. Each
finished cell is a line of results/evidence.jsonl, each rate tried one of
results/evidence_tuning.jsonl; what is there is skipped, so it may be stopped at any time, unless
its rate is not the tuned one any more or --epochs another: then it is measured again, and the last
line of a cell counts. Nothing in the tables is written by hand.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from evidence_data import CONDITIONS, CORE, CORE_CONDITIONS, TASKS, more_tasks
from evidence_lines import RESULTS, Key, read_cells
from evidence_methods import CORE_METHODS, METHODS, UNTOLD
from evidence_pool import workers
from evidence_schedule import Schedule, pair_of

from tsqlora.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tune", "run", "tables"))
    parser.add_argument("--tasks", nargs="+", default=list(CORE))
    parser.add_argument("--more", type=Path, help="a JSON file of tasks of your own (more_tasks)")
    parser.add_argument(
        "--conditions", nargs="+", choices=CONDITIONS, default=list(CORE_CONDITIONS)
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(CORE_METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this, less one")
    parser.add_argument("--seed", type=int, nargs="+", help="these seeds alone")
    parser.add_argument("--epochs", type=float, help="another budget than the task's")
    parser.add_argument("--processes", type=int, default=1, help="cells at once")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where all of it is kept")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary folders are cleared
    if given.more:
        try:
            TASKS.update(more_tasks(given.more))
        except ConfigError as error:
            parser.error(str(error))
    if unknown := set(given.tasks) - set(TASKS):
        parser.error(f"no task {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
    given.results.mkdir(parents=True, exist_ok=True)
    if given.what == "tables":
        from evidence_tables import write_tables

        print(write_tables(read_cells(given.results), given.results))
        return
    wanted: list[Key] = [
        (task, condition, method, seed)
        for seed in given.seed or range(given.seeds)
        for task in given.tasks
        for condition in given.conditions
        for method in given.methods
        if condition not in UNTOLD.get(method, ())
    ]
    pairs = list(dict.fromkeys(map(pair_of, wanted)))
    cells = wanted if given.what == "run" else []
    with workers(given.processes) as pool:
        Schedule(given.results, pairs, cells, given.epochs).measure(pool)


if __name__ == "__main__":
    main()
