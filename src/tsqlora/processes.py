"""Several processes (`accelerate launch`): which one this is, waiting for all, working alone."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed import distributed_c10d

from tsqlora.artefacts import temporary_name
from tsqlora.errors import RunError, TsqloraError

T = TypeVar("T")

logger = logging.getLogger("tsqlora")
_alone = False

_LAUNCHED = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"),
)
"""What a launcher tells each process of itself, and of how they work together."""
PATIENCE = timedelta(days=30)
"""How long processes wait for each other: one may adapt the model while the others do nothing."""


def join() -> None:
    """Meet the other processes of this launch: over gloo on CPUs, over NCCL on CUDA."""
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= set(os.environ) and (
        "WORLD_SIZE" not in os.environ
    ):
        logger.warning(
            "accelerate has started one process, as it does where it finds no two GPUs: for more "
            "of them on a CPU add --multi_gpu to `accelerate launch`."
        )
    # each process scores under the whole model, so each must load it
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
        PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
        atexit.register(_leave)


def _leave() -> None:
    """End gloo's threads before the interpreter goes, which may abort the process otherwise.

    NCCL is left as it is: to end it one would have to wait for processes that may have failed.
    """
    if dist.is_initialized() and "nccl" not in str(dist.get_backend_config()):
        dist.destroy_process_group()


def count() -> int:
    """How many processes have joined; 1 where none was launched, or inside `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def index() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def is_main() -> bool:
    """Whether this is the one that writes."""
    return index() == 0


def wait() -> None:
    """Go on when all processes have come here (dist.barrier would keep a GPU busy)."""
    total(0.0)


def total(value: float) -> float:
    """The sum of what each process came with."""
    if count() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(shared)
    return float(shared)


def largest(value: int) -> int:
    """The largest of what each process came with."""
    if count() == 1:
        return value
    shared = torch.tensor(value, device=_device())
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def gather(value: T) -> list[T]:
    """What each process came with, in their order; any small object."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def from_main(function: Callable[[], T]) -> T:
    """What `function` gives in the main process, which alone runs it, in all of them.

    Raises:
        TsqloraError: the main process's, in all of them.
    """
    found: list[Any] = [None, None]
    if is_main():
        try:
            found[0] = function()
        except TsqloraError as error:
            found[1] = error
    if count() > 1:
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return cast(T, found[0])


def require_shared(folder: Path) -> None:
    """Refuse a folder that not all processes of this launch see: all read what one writes.

    Raises:
        RunError: they do not.
    """

    def touch() -> Path:
        probe = temporary_name(folder / "probe")
        probe.touch()
        return probe

    probe = from_main(touch)
    os.listdir(folder) if folder.is_dir() else ()  # a network's file system looks again
    seen = gather(probe.exists())
    if is_main():
        probe.unlink()
    if not all(seen):
        raise RunError(
            f"{folder} is not the same folder for all processes: put `output` on a file "
            "system that all machines share, under the same path."
        )


def speaks() -> bool:
    """Whether this process is the first of all to fail, so that one of them tells what is wrong."""
    if count() == 1:
        return True
    try:
        return distributed_c10d._get_default_store().add("tsqlora/failed", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return False


def shard_on_cpu() -> None:
    """Let accelerate shard a model (FSDP2) where there is no accelerator, as torch can.

    accelerate would take no notice of the wish, and train by DistributedDataParallel.
    """
    shared = PartialState._shared_state
    if shared.get("distributed_type") == DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU
        AcceleratorState._reset_state()


def _device() -> torch.device:
    """Where tensors have to be to be exchanged."""
    over = dist.get_backend_config()
    return torch.device("cpu") if "gloo" in over else PartialState().device


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process looks as if it had been launched singly, to the Trainer above all."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    if "WORLD_SIZE" not in hidden:  # it is alone, and arguments made before hold accelerate's state
        yield
        return
    global _alone
    AcceleratorState._reset_state(reset_partial_state=True)
    _alone = True
    try:
        yield
    finally:
        _alone = False
        for name in _LAUNCHED:
            os.environ.pop(name, None)
        os.environ.update(hidden)
        AcceleratorState._reset_state(reset_partial_state=True)
