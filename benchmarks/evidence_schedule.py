"""Trials and cells of the evidence in one queue: each cell as soon as its rate is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evidence_data import TASKS
from evidence_lines import CELLS, Key, key, read_cells
from evidence_methods import RATE_OF
from evidence_pool import Job, measured_all
from evidence_tuning import TRIAL, TUNING, for_tuning, read_rate, tried, untried
from tqdm import tqdm

Pair = tuple[str, str]
"""A task and the method whose rate is tried on it."""


def pair_of(cell: Key) -> Pair:
    """The pair whose rate a cell takes."""
    task, _, method, _ = cell
    return task, RATE_OF.get(method, method)


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
        """
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
            for condition, seed, rate in untried(kind, tried(task, method, self.results))
        ]

    def _cells(self, pairs: Iterable[Pair]) -> list[Job]:
        """Those that are not there at the tuned rate."""
        rates = {(t, m): read_rate(TASKS[t], m, self.results) for t, m in pairs}
        there = {key(line): line["config"]["learning_rate"] for line in read_cells(self.results)}
        return [
            Job(TASKS[cell[0]], *cell[1:], rates[pair_of(cell)], self.epochs)
            for cell in self.cells
            if pair_of(cell) in rates and there.get(cell) != rates[pair_of(cell)]
        ]

    def _keep_trial(self, job: Job, line: dict[str, Any]) -> None:
        self._append(TUNING, {**{name: line[name] for name in TRIAL}, "rate": job.rate})
        tqdm.write(f"{job.task.name:6} {job.condition:12} {job.method:24} {job.seed} "
                   f"{job.rate} {line['validation']:.2f}")  # fmt: skip

    def _keep_cell(self, job: Job, line: dict[str, Any], seconds: dict[Key, float]) -> None:
        task, condition, method, seed = job.key
        seconds[job.key] = line["seconds"]
        plain = seconds.get((task, condition, "lora", seed))
        ratio = round(line["seconds"] / plain, 3) if plain else None
        self._append(CELLS, {**line, "seconds_ratio": ratio})
        tqdm.write(f"{task:6} {condition:12} {method:24} {seed} {line['metric']:.2f} "
                   f"cost {line['cost']:.2f} {line['seconds']:.0f} s")  # fmt: skip

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.results / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
