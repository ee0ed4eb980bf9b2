"""Batches that are too large for memory, in smaller pieces."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from tsqlora.batches import Batch, split
from tsqlora.errors import ModelError

Result = TypeVar("Result")

logger = logging.getLogger("tsqlora")


class Halving:
    """Runs a function on batches whole, or in halves, quarters, ... once memory has run out.

    Attributes:
        halvings: how often each batch is halved. It never goes down again.
    """

    def __init__(self) -> None:
        self.halvings = 0

    def __call__(self, function: Callable[[Batch], Result], batch: Batch) -> list[Result]:
        """The results of the pieces in order.

        Raises:
            ModelError: memory does not suffice for one sample.
        """
        samples = len(batch["labels"])
        while True:
            try:
                return [function(piece) for piece in split(batch, min(2**self.halvings, samples))]
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            if 2**self.halvings >= samples:
                raise ModelError(
                    "Memory does not suffice for a single sample: lower data.max_length, use a "
                    "smaller model or ranks, or a larger machine."
                )
            self.halvings += 1
            clear_device_cache(garbage_collection=True)
            logger.warning(f"Out of memory: batches are split in {2**self.halvings} from now on.")


def out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch would help."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
