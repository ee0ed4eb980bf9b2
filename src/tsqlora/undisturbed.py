"""What a Trainer of ours does to the process around it, undone: random numbers, accelerate."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from tsqlora import processes


@contextmanager
def undisturbed() -> Iterator[None]:
    """Afterwards random numbers go on as if nothing had been, and accelerate knows what it knew.

    A Trainer seeds its process and sets precision and accumulation for all of it, so that an
    `Accelerator` made before would train in other batches, and one made after could not be. In
    several processes only its accumulation is put back, as it may know of them by the Trainer.
    """
    states = [state._shared_state for state in (GradientState, AcceleratorState, PartialState)]
    kept = [dict(state) for state in states]
    variables = {name: os.environ[name] for name in _accelerates()}
    numbers, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(legacy)
        for name in _accelerates() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
        alone = processes.count() == 1  # else the Trainer's tells accelerate of them, on CPUs
        for state, before in zip(states if alone else states[:1], kept, strict=False):
            if before or state is not PartialState._shared_state:
                state.clear()
                state.update(before)


def _accelerates() -> set[str]:
    return {name for name in os.environ if name.startswith("ACCELERATE_")}
