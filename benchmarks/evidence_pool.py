"""Cells of the evidence in several processes at once, on the cores or side by side on a GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
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
        SystemExit: jobs failed in processes of the pool; it names them, once the others are done.
    """
    waiting = list(jobs)
    if pool is None:
        yield from ((job, job.line()) for job in tqdm(waiting, desc=what, unit="cell"))
        return
    failed = []
    given: dict[Future[dict[str, Any]], Job] = {pool.submit(job.line): job for job in waiting}
    try:
        for done in tqdm(as_completed(given), desc=what, unit="cell", total=len(given)):
            if error := done.exception():
                failed.append(f"{given[done].key}: {type(error).__name__}: {error}")
                tqdm.write(failed[-1])
            else:
                yield given[done], done.result()
    finally:
        for unfinished in given:
            unfinished.cancel()
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} cells failed:", *failed]))


def starting(processes: int) -> None:
    """A process of the pool takes its share of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    quiet()


def quiet() -> None:
    """Of the runs themselves only warnings are said."""
    logging.getLogger("tsqlora").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
