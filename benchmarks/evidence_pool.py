"""Cells of the evidence in several processes at once, on the cores or side by side on a GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
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
    """A cell to be measured at a rate."""

    task: Task
    condition: str
    method: str
    seed: int
    rate: float
    epochs: float | None = None

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
    jobs: Iterable[Job], pool: Executor | None, what: str
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every job and its line, as they are done.

    Raises:
        SystemExit: jobs failed; it names them, once the others are done.
    """
    waiting, failed = list(jobs), []
    done = _in_turn(waiting) if pool is None else _at_once(waiting, pool)
    for job, result in tqdm(done, desc=what, unit="cell", total=len(waiting)):
        try:
            line = result()
        except Exception as error:  # noqa: PERF203  a cell takes minutes
            failed.append(f"{job.key}: {type(error).__name__}: {error}")
            tqdm.write(failed[-1])
        else:
            yield job, line
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} cells failed:", *failed]))


Done = Iterator[tuple[Job, Callable[[], dict[str, Any]]]]


def _in_turn(jobs: list[Job]) -> Done:
    return ((job, job.line) for job in jobs)


def _at_once(jobs: list[Job], pool: Executor) -> Done:
    given = {pool.submit(job.line): job for job in jobs}
    try:
        for done in as_completed(given):
            yield given[done], done.result
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
