"""Where fresh components look: rows of A along the mean gradient of their module.

With E_i ∇W ℓ_i = G = Σ_j σ_j u_j v_jᵀ (out, in) and s the scale, a component of row v_j and column
0 gets the gradient ∇B_j = s G v_j = s σ_j u_j: no r rows of length 1 at right angles have larger
ones in all. B stays 0, so that the base is what it was (LoRA-GA, arXiv 2407.05000, which begins
both factors, has to change it).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Container, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tsqlora import processes
from tsqlora.adapter import active
from tsqlora.errors import ConfigError, ModelError, TrainingError
from tsqlora.lora_layers import LoraModule, lora_modules
from tsqlora.sensitivity import LayerSensitivity
from tsqlora.sharded import is_sharded, whole

HELD = 0.5
"""A direction is there already when rows hold more than this part of its square."""


def start_from_gradient(model: nn.Module, sensitivity: LayerSensitivity) -> None:
    """Begin an adapter along the directions that `layer_sensitivity(..., spectrum=k)` found.

    Every component that has learnt nothing yet (B = 0) gets for its row of A, of length 1, the
    module's next right singular vector, in falling order of singular values. From rows that have
    learnt they are projected off, and left out where these hold more than half of their square.
    Components beyond the directions, and modules without any (a gradient that is zero or not
    finite), keep the row that PEFT drew. The function of the model does not change.

    To be called before the optimizer's first step, and before the model is wrapped for processes.

    Raises:
        ConfigError: no directions were measured.
        ModelError: the model has no LoRA adapter, or one of other shapes than were measured.
        TrainingError: the model is wrapped or in shards already.
    """
    modules = lora_modules(model)
    _check(modules, sensitivity)
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if wrapped or is_sharded(model):
        raise TrainingError(
            "It is too late to start from the gradient, as the model is wrapped for processes: "
            "call start_from_gradient before accelerator.prepare(model) and the Trainer."
        )
    if not any(module.name in sensitivity.directions for module in modules):
        raise ModelError(
            "The sensitivity holds directions of none of the adapter's modules: measure it on this "
            "model."
        )
    for module in modules:
        if module.name not in sensitivity.directions:
            continue
        a, b = module.a.weight, module.b.weight.detach()
        learnt = (b != 0).any(0)
        fresh = (active(module) & ~learnt).nonzero().flatten().tolist()
        directions = torch.as_tensor(sensitivity.directions[module.name])
        found = new_directions(a.detach()[learnt], directions)
        with torch.no_grad():
            for component, (_, row) in zip(fresh, found, strict=False):
                a[component] = row.to(a)


def _check(modules: Sequence[LoraModule], sensitivity: LayerSensitivity) -> None:
    if not sensitivity.directions:
        raise ConfigError(
            "The sensitivity holds no directions of the mean gradient: measure it by "
            "layer_sensitivity(..., spectrum=max_rank)."
        )
    for module in modules:
        there = sensitivity.shapes.get(module.name, module.shape)
        if there != module.shape:
            raise ModelError(
                f"{module.name} is {module.shape} here, and {there} where its sensitivity was "
                "measured: measure it on this model."
            )


def new_directions(
    rows: Tensor, directions: Tensor, given: Container[int] = ()
) -> Iterator[tuple[int, Tensor]]:
    """(number, row) of every direction not `given` that neither `rows` nor rows before it hold.

    `rows` (n, in), `directions` (k, in) of length 1. Each row is what is left of its direction at
    right angles to them all, brought to length 1.
    """
    _, sizes, basis = torch.linalg.svd(rows.double().cpu(), full_matrices=False)
    basis = basis[sizes > 1e-6 * sizes[:1]]
    for number, direction in enumerate(directions.double()):
        rest = direction - (basis @ direction) @ basis
        size = float(rest.norm())
        if number in given or size**2 < 1 - HELD:
            continue
        basis = torch.cat([basis, rest[None] / size])
        yield number, basis[-1].float()


class FreshRows:
    """Rows for components that grow: the module's next direction, else as PEFT draws A.

    Attributes:
        given: by module the numbers of the directions that a component had, now or before.
    """

    def __init__(
        self, modules: Sequence[LoraModule], sensitivity: LayerSensitivity | None, seed: int
    ) -> None:
        self.seed = seed
        self.directions: dict[str, Tensor] = {}
        if sensitivity is not None:
            _check(modules, sensitivity)
            names = [m.name for m in modules if m.name in sensitivity.directions]
            self.directions = {n: torch.as_tensor(sensitivity.directions[n]) for n in names}
        self.given: dict[str, list[int]] = {}
        for module in modules:
            if (known := self.directions.get(module.name)) is not None:
                new = {number for number, _ in new_directions(_rows(module), known)}
                self.given[module.name] = [n for n in range(len(known)) if n not in new]

    def take(self, module: LoraModule, component: int, step: int) -> Tensor:
        """A row (in) for the component, the same in all processes, which must all call this."""
        if (known := self.directions.get(module.name)) is not None:
            rows, given = _rows(module), self.given[module.name]
            found = processes.from_main(lambda: next(new_directions(rows, known, given), None))
            if found is not None:
                given.append(found[0])
                return found[1]
        width = module.shape[1]
        text = f"{self.seed}/{step}/{module.name}/{component}"
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        bound = 1 / math.sqrt(width)  # Kaiming, a = √5
        return torch.empty(width).uniform_(-bound, bound, generator=generator)


def _rows(module: LoraModule) -> Tensor:
    """Of the components that are active (n, in)."""
    return whole(module.a.weight.detach())[active(module)]
