"""Cells of the evidence in several processes at once, on the cores or side by side on a GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
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


def measured_all(
    jobs: Iterable[Job], processes: int, what: str
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every job and its line, as they are done; in this process where `processes` is 1.

    Raises:
        SystemExit: jobs failed in a process of the pool; it names them, after the others are done.
    """
    waiting = list(jobs)
    if processes == 1:
        quiet()
        yield from ((job, job.line()) for job in tqdm(waiting, desc=what, unit="cell"))
        return
    failed = []
    with ProcessPoolExecutor(processes, get_context("spawn"), starting, (processes,)) as pool:
        given: dict[Future[dict[str, Any]], Job] = {pool.submit(job.line): job for job in waiting}
        try:
            for done in tqdm(as_completed(given), desc=what, unit="cell", total=len(given)):
                job = given.pop(done)
                if error := done.exception():
                    failed.append(f"{job.key} at {job.rate}: {type(error).__name__}: {error}")
                    tqdm.write(failed[-1])
                else:
                    yield job, done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
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
