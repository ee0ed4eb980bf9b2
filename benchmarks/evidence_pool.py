"""Cells of the evidence in several processes at once, on the cores or side by side on a GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
import transformers
from evidence_data import Task
from evidence_lines import Key, measured
from tqdm import tqdm


@dataclass(frozen=True)
class Job:
    """A cell to be measured at a rate, or a trial of that rate."""

    task: Task
    condition: str
    method: str
    seed: int
    rate: float
    epochs: float | None = None
    trial: bool = False

    @property
    def key(self) -> Key:
        """As of its line."""
        return self.task.name, self.condition, self.method, self.seed

    def line(self) -> dict[str, Any]:
        """What was measured."""
        return measured(self.task, self.condition, self.method, self.seed, self.rate, self.epochs)


def workers(processes: int) -> AbstractContextManager[Executor | None]:
    """So many processes, which share the cores; None for this one alone."""
    if processes == 1:
        quiet()
        return nullcontext()
    return ProcessPoolExecutor(processes, get_context("spawn"), starting, (processes,))


def measured_all(
    queue: list[Job], pool: Executor | None, what: str
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every job and its line, as they are done; whoever takes them may put more into the queue.

    Raises:
        SystemExit: jobs failed; it names them, once the others are done.
    """
    failed = []
    with tqdm(desc=what, unit="cell", total=len(queue)) as bar:
        for job, result, left in _in_turn(queue) if pool is None else _at_once(queue, pool):
            try:
                line = result()
            except Exception as error:
                failed.append(f"{job.key}: {type(error).__name__}: {error}")
                tqdm.write(failed[-1])
            else:
                yield job, line
            bar.total = bar.n + 1 + left + len(queue)
            bar.update()
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} cells failed:", *failed]))


Done = Iterator[tuple[Job, Callable[[], dict[str, Any]], int]]
"""Jobs, what gives their lines, and how many are under way beside those in the queue."""


def _in_turn(queue: list[Job]) -> Done:
    while queue:
        job = queue.pop(0)
        yield job, job.line, 0


def _at_once(queue: list[Job], pool: Executor) -> Done:
    given = dict[Future[dict[str, Any]], Job]()
    try:
        while queue or given:
            given.update({pool.submit(job.line): job for job in queue})
            queue.clear()
            for done in wait(given, return_when=FIRST_COMPLETED).done:
                yield given.pop(done), done.result, len(given)
    finally:
        for unfinished in given:
            unfinished.cancel()


def starting(processes: int) -> None:
    """A process of the pool takes its share of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    quiet()


def quiet() -> None:
    """Of the runs themselves only warnings are said."""
    logging.getLogger("tsqlora").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
