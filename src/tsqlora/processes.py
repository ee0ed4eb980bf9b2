"""Several processes (`accelerate launch`): which one this is, waiting for all, working alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState

logger = logging.getLogger("tsqlora")

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""What a launcher tells each process of itself."""
PATIENCE = timedelta(days=30)
"""How long processes wait for each other: one may adapt the model while the others do nothing."""


def join() -> None:
    """Meet the other processes of this launch, over gloo where there is no accelerator."""
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= set(os.environ) and (
        "WORLD_SIZE" not in os.environ
    ):
        logger.warning(
            "accelerate has started one process, as it does where it finds no two GPUs: for more "
            "of them on a CPU add --multi_gpu to `accelerate launch`."
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def count() -> int:
    """How many processes have joined; 1 where none was launched."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one that writes."""
    return index() == 0


def wait() -> None:
    """Go on when all processes have come here."""
    if count() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block before the others do."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process looks as if it had been launched singly, to the Trainer above all."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    if not hidden:  # it is alone, and arguments made before hold accelerate's state
        yield
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.update(hidden)
        AcceleratorState._reset_state(reset_partial_state=True)
