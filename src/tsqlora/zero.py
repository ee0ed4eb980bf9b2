"""DeepSpeed's ZeRO, stages 1 and 2: parameters whole on every process, the rest in pieces.

The copies that the optimizer steps on, gradients and optimizer state lie in flat tensors, a stretch
a process. The engine takes the optimizer's step inside the backward call that accelerate makes, so
what is to happen before a step hangs on the step itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Piece:
    """What this process keeps of a tensor of `shape`: `local`, flat, from element `start` on."""

    local: Tensor
    start: int
    shape: torch.Size

    def is_floating_point(self) -> bool:
        """As a tensor's."""
        return self.local.is_floating_point()


def in_pieces(parameter: Tensor) -> bool:
    """Whether ZeRO keeps the parameter's fp32 copy, gradient and optimizer state."""
    return hasattr(parameter, "_hp_mapping")


def fp32_copy(parameter: Tensor) -> Piece | None:
    """The parameter's copy that the optimizer steps on; None where this process has none of it."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    return Piece(mapping.hp_fragment, mapping.lp_fragment_address.start, parameter.shape)


def pieces_of_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """What `optimizer`, torch's within ZeRO's, remembers of the parameter on this process."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return {}
    flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
    own, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
    return {
        key: Piece(value.narrow(0, own.start, own.numel), start, parameter.shape)
        if isinstance(value, Tensor) and value.shape == flat.shape
        else value
        for key, value in optimizer.state.get(flat, {}).items()
    }


def has_gradient(parameter: Tensor) -> bool:
    """Whether there is one, between backward and step, where this process can know."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return True
    try:
        mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
    except (ValueError, KeyError):
        return False
    return True


def whole_gradient(parameter: Tensor) -> Tensor:
    """All of the gradient, the mean over processes, on every one; all must call this."""
    return parameter.get_full_hp_grad()  # type: ignore[attr-defined]


def set_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Replace the gradient by `gradient`, which all processes have."""
    parameter.set_full_hp_grad(gradient)  # type: ignore[attr-defined]


def before_steps(optimizer: Any, function: Callable[[], None]) -> bool:
    """Have `function` called before every step that DeepSpeed's engine takes inside a backward.

    `optimizer` is what accelerate prepared. False, and nothing done, where it is not DeepSpeed's.
    """
    if type(optimizer).__name__ != "DeepSpeedOptimizerWrapper":
        return False
    inner = optimizer.optimizer
    if isinstance(inner, Optimizer):  # stage 0
        inner.register_step_pre_hook(lambda *_: function())
        return True
    step = inner.step

    def after_function(*inputs: Any, **named: Any) -> Any:
        function()
        return step(*inputs, **named)

    inner.step = after_function
    return True
