"""Trials and cells of the evidence in one queue: each cell as soon as its rate is known."""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import append_line
from evidence_data import TASKS, Task
from evidence_lines import CELLS, Key, key, read_cells
from evidence_methods import RATE_OF
from evidence_pool import Job, measured_all
from evidence_tuning import TRIAL, TUNING, Tried, best_rate, for_tuning, tried, untried
from tqdm import tqdm

Pair = tuple[str, str]
"""A task and the method whose rate is tried on it."""


def pair_of(cell: Key) -> Pair:
    """The pair whose rate a cell takes."""
    task, _, method, _ = cell
    alone = method.removesuffix("_trusted")
    return task, RATE_OF.get(alone, alone)


@dataclass
class Schedule:
    """What is wanted: rates of `pairs`, and `cells` at them; `epochs` for another budget."""

    results: Path
    pairs: list[Pair]
    cells: list[Key] = field(default_factory=list)
    epochs: float | None = None

    def measure(self, pool: Executor | None) -> None:
        """All that is not there yet, a line each as it is done.

        Of a pair first the rates of its task, then whatever lies beyond a best one at an edge, then
        its cells. Seconds are compared with plain LoRA's where both were taken here: machines
        differ by the day.

        Raises:
            SystemExit: another run writes into the same folder.
        """
        with _alone(self.results / CELLS):
            self._measure(pool)

    def _measure(self, pool: Executor | None) -> None:
        queue = [job for pair in self.pairs for job in self._trials(pair)]
        left = Counter(pair_of(job.key) for job in queue)
        queue += self._cells(pair for pair in self.pairs if not left[pair])
        seconds = dict[Key, float]()
        for job, line in measured_all(queue, pool, "cells"):
            if not job.trial:
                self._keep_cell(job, line, seconds)
                continue
            self._keep_trial(job, line)
            left[pair := pair_of(job.key)] -= 1
            if not left[pair]:
                more = self._trials(pair)
                left[pair] = len(more)
                queue += more or self._cells([pair])

    def _trials(self, pair: Pair) -> list[Job]:
        task, method = pair
        kind = for_tuning(TASKS[task])
        return [
            Job(kind, condition, method, seed, rate, self.epochs, trial=True)
            for condition, seed, rate in untried(kind, self._tried(pair))
        ]

    def _cells(self, pairs: Iterable[Pair]) -> list[Job]:
        """Those that are not there at the tuned rate, or of another budget."""
        rates = {pair: best_rate(TASKS[pair[0]], self._tried(pair)) for pair in pairs}
        there = {
            key(line): (line["config"]["learning_rate"], line["config"].get("epochs"))
            for line in read_cells(self.results)
        }
        jobs = [
            Job(TASKS[cell[0]], *cell[1:], rates[pair_of(cell)], self.epochs)
            for cell in self.cells
            if pair_of(cell) in rates
        ]
        return [job for job in jobs if there.get(job.key) != (job.rate, self._epochs(job.task))]

    def _tried(self, pair: Pair) -> Tried:
        task, method = pair
        return tried(TASKS[task], method, self.results, self._epochs(TASKS[task]))

    def _epochs(self, task: Task) -> float:
        return self.epochs or task.epochs

    def _keep_trial(self, job: Job, line: dict[str, Any]) -> None:
        about = {"rate": job.rate, "epochs": self._epochs(job.task)}
        append_line(self.results / TUNING, {**{name: line[name] for name in TRIAL}, **about})
        tqdm.write(f"{job.task.name:6} {job.condition:12} {job.method:24} {job.seed} "
                   f"{job.rate} {line['validation']:.2f}")  # fmt: skip

    def _keep_cell(self, job: Job, line: dict[str, Any], seconds: dict[Key, float]) -> None:
        task, condition, method, seed = job.key
        seconds[job.key] = line["seconds"]
        plain = seconds.get((task, condition, "lora", seed))
        ratio = round(line["seconds"] / plain, 3) if plain else None
        append_line(self.results / CELLS, {**line, "seconds_ratio": ratio})
        tqdm.write(f"{task:6} {condition:12} {method:24} {seed} {line['metric']:.2f} "
                   f"cost {line['cost']:.2f} {line['seconds']:.0f} s")  # fmt: skip


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"{path} is being written by another run: wait, or stop it.") from None
        yield
