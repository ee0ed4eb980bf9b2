"""What the gradients of a few steps say of every component, added up on the device.

- importance of component j of module m: |⟨B_j, ∇B_j⟩|, the first-order loss change of removing it
  (as AdaLoRA's |w·g|, arXiv 2303.10512, for the component as a whole);
- demand of module m: the mean over its components of ‖∇B_j‖² / ‖A_j‖², an estimate of what the
  loss would gain in a fresh direction, since ∇B_j = s·∇W A_jᵀ.

Each step counts as shares of its own total, so that a loss scaler's changing factor has no part in
it; a step whose gradients are not finite, which a scaler skips, counts nothing. Nothing waits for
the device until the figures are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsqlora.errors import TrainingError
from tsqlora.lora_layers import LoraModule
from tsqlora.sharded import whole, whole_gradient


@dataclass(frozen=True)
class Observed:
    """Sums over `steps`: importance of every component (r), demand of every module."""

    steps: int
    importance: dict[str, Tensor]
    demand: dict[str, float]

    def alike(self, other: Observed) -> bool:
        """Whether another process saw the same, but for the rounding of unlike devices."""
        one, two = (
            torch.cat([*each.importance.values(), torch.tensor([*each.demand.values()])])
            for each in (self, other)
        )
        near = 1e-3 * float(one.abs().max())
        return self.steps == other.steps and torch.allclose(one, two, rtol=1e-3, atol=near)


class Observer:
    """Looks at the factors' gradients, step by step."""

    def __init__(self, modules: list[LoraModule]) -> None:
        self.modules = modules
        self.clear()

    def clear(self) -> None:
        """Forget all; also to be called when physical ranks have changed."""
        self._ranks = [module.rank for module in self.modules]
        device = self.modules[0].b.weight.device
        self._owner = torch.repeat_interleave(
            torch.arange(len(self._ranks)), torch.tensor(self._ranks)
        ).to(device)
        self._importance = torch.zeros(sum(self._ranks), device=device)
        self._demand = torch.zeros(len(self._ranks), device=device)
        self._steps = torch.zeros((), device=device)

    def add(self) -> None:
        """One step, after its backward."""
        importance, squares, lengths = self._of_components()
        alive = (lengths > 0).float()
        ratio = torch.where(lengths > 0, squares / lengths, 0)
        zeros = torch.zeros_like(self._demand)
        total = zeros.index_add(0, self._owner, ratio)
        demand = total / zeros.index_add(0, self._owner, alive).clamp(min=1)
        sums = importance.sum(), demand.sum()
        finite = sums[0].isfinite() & sums[1].isfinite()
        self._importance += torch.where(finite, _share(importance, sums[0]), 0)
        self._demand += torch.where(finite, _share(demand, sums[1]), 0)
        self._steps += finite

    def _of_components(self) -> tuple[Tensor, Tensor, Tensor]:
        """|⟨B_j, ∇B_j⟩|, ‖∇B_j‖² and ‖A_j‖² of all components, one after the other."""
        inner, squares, lengths = [], [], []
        for module in self.modules:
            a, b = (whole(f.weight.detach()).float() for f in (module.a, module.b))
            gradient = whole_gradient(module.b.weight)
            gradient = torch.zeros_like(b) if gradient is None else gradient.float()
            inner.append(torch.linalg.vecdot(b, gradient, dim=0))
            squares.append(torch.linalg.vecdot(gradient, gradient, dim=0))
            lengths.append(torch.linalg.vecdot(a, a))
        device = self._owner.device
        joined = [torch.cat([t.to(device) for t in each]) for each in (inner, squares, lengths)]
        return joined[0].abs(), joined[1], joined[2]

    def read(self) -> Observed:
        """What was seen.

        Raises:
            TrainingError: gradients were there, and all of them zero.
        """
        steps, demand = int(self._steps), self._demand.tolist()
        importance = self._importance.cpu().split(self._ranks)
        if steps and not any(demand) and not self._importance.any():
            raise TrainingError(
                "All gradients of LoRA factors are zero: call DynamicRank.step() after backward "
                "and before zero_grad, and see that the loss depends on the adapter."
            )
        names = [module.name for module in self.modules]
        return Observed(
            steps, dict(zip(names, importance, strict=True)), dict(zip(names, demand, strict=True))
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; float32 goes through a JSON number unchanged."""
        return {
            "steps": int(self._steps),
            "importance": self._importance.tolist(),
            "demand": self._demand.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken."""
        self._steps.fill_(state["steps"])
        self._importance.copy_(torch.tensor(state["importance"]))
        self._demand.copy_(torch.tensor(state["demand"]))


def _share(values: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, values / total, 0)
