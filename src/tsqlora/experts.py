"""Per-sample gradients of PEFT's expert parameters (`target_parameters`), exact for any experts.

A mixture's experts see tokens out of their samples, and each implementation (eager, batched,
grouped) has its own way with the stacked weight W_e + s·B_e A_e. So the block, and nothing else of
the model, runs once for each sample, on that sample's own copy of the factors: what flows back into
copy i is ∇ℓ_i, and a copy that was moved gives the loss after the sample's own step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tsqlora.factors import Gradient
from tsqlora.hooks import SharedInput
from tsqlora.lora_layers import LoraModule

Copies = Callable[[str, nn.Parameter, int], Tensor]
"""A factor's name, the factor and N to its copies (N, rows, columns)."""


class _Copies(torch.autograd.Function):
    """N copies of one weight; the backward hands the gradient of every copy to the sink."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, weight: Tensor, samples: int, sink: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.sink = sink
        return weight.detach().expand(samples, *weight.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.sink(gradient)
        return None, None, None, None


class ExpertFactors:
    """The factors of one block of experts, for which PEFT nests a wrapper a parameter.

    Attributes:
        block: the outermost wrapper.
        keys: the name of each factor to that of its parameter in `block`.
    """

    def __init__(self, wrappers: Sequence[LoraModule]) -> None:
        self.block: nn.Module = wrappers[0].layer
        self.keys: dict[str, str] = {}
        for depth, wrapper in enumerate(wrappers):
            for factor in ("A", "B"):
                name = f"{_plain(wrapper.name)}.{wrapper.layer.parameter_name}.{factor}"
                self.keys[name] = f"{'base_layer.' * depth}lora_{factor}.{wrapper.adapter}.weight"
        self._anchor = torch.zeros((), requires_grad=True)
        self._sums: dict[str, Tensor] = {}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """A (r·experts, in) and B (out, r·experts) of every adapted parameter."""
        return {name: self.block.get_parameter(key) for name, key in self.keys.items()}

    @contextmanager
    def watched(self, samples: Callable[[], int]) -> Iterator[None]:
        """Inside, forwards of `samples()` samples collect gradients for `take`."""

        def copies(name: str, weight: nn.Parameter, count: int) -> Tensor:
            def sink(gradient: Tensor) -> None:
                before = self._sums.get(name)
                self._sums[name] = gradient if before is None else before + gradient

            copied = _Copies.apply(self._anchor, weight, count, sink)
            assert isinstance(copied, Tensor)
            return copied

        with self._singly(samples, copies):
            yield

    @contextmanager
    def moved(self, deltas: Mapping[str, Gradient]) -> Iterator[None]:
        """Inside, sample i sees each factor less its own delta_i."""
        count = max((len(deltas[name][1]) for name in self.keys if name in deltas), default=0)

        def copies(name: str, weight: nn.Parameter, samples: int) -> Tensor:
            spread = weight.detach().expand(samples, *weight.shape)
            return spread - deltas[name][1].to(spread) if name in deltas else spread

        with self._singly(lambda: count, copies):
            yield

    def take(self) -> Iterator[Gradient]:
        """The gradients collected, which are then forgotten."""
        found, self._sums = self._sums, {}
        for name, gradient in found.items():
            yield name, gradient, None

    @contextmanager
    def _singly(self, samples: Callable[[], int], copies: Copies) -> Iterator[None]:
        original, block, inside = self.block.forward, self.block, False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            count = samples()
            if inside or count == 0:
                return original(*args, **kwargs)
            own = {key: copies(n, block.get_parameter(key), count) for n, key in self.keys.items()}
            inside, parts = True, []
            try:
                for i in range(count):
                    taken = [_part(value, i, count) for value in args]
                    named = {key: _part(value, i, count) for key, value in kwargs.items()}
                    weights = {key: copy[i] for key, copy in own.items()}
                    parts.append(functional_call(block, weights, tuple(taken), named))
            finally:
                inside = False
            return torch.cat(parts)

        block.forward = forward
        try:
            yield
        finally:
            del block.forward


def _part(value: Any, i: int, samples: int) -> Any:
    """Sample i's share of an argument whose leading dimension is N or N·T."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if len(value) % samples:
        raise SharedInput(
            f"Experts saw an input of shape {tuple(value.shape)} in a batch of {samples} samples: "
            "its gradient cannot be told apart by sample."
        )
    return value.chunk(samples)[i]


def _plain(name: str) -> str:
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def expert_factors(layers: Sequence[LoraModule]) -> list[ExpertFactors]:
    """One for each block of experts among the adapted layers."""
    blocks: dict[str, list[LoraModule]] = {}
    for lora in layers:
        if type(lora.layer).__name__ == "ParamWrapper":
            blocks.setdefault(_plain(lora.name), []).append(lora)
    return [ExpertFactors(wrappers) for wrappers in blocks.values()]
