"""See what enters a module and the gradient at what leaves it, without changing either."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tsqlora.errors import ModelError

Consume = Callable[[str, Tensor, Tensor], None]
"""Receives a module's name, its inputs X (N, T, in) and gradients D (N, T, out) at its output.

Where a module takes token ids, X is (N, T, 1) and holds integers.
"""


class SharedInput(ModelError):
    """A module ran once for the whole batch, so its gradient cannot be told apart by sample."""


class _Tap(torch.autograd.Function):
    """Identity on the output; its backward hands (input, output gradient) to the sink.

    The input is kept by `save_for_backward`, so gradient checkpointing and saved-tensor hooks
    treat it like any other activation: no memory beyond what autograd keeps for the module itself.
    The anchor requires a gradient, so the backward reaches the tap though no parameter asks for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        entered: Tensor,
        sink: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(entered)
        ctx.sink = sink
        return output.detach()  # no view, which a model could not change in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (entered,) = ctx.saved_tensors
        ctx.sink(entered, gradient)
        return gradient, None, None, None


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, autograd forms no gradient of `parameters`: taps alone say how far a backward goes.

    Forming DᵀX by sample then replaces autograd's own sum over samples instead of adding to it.
    """
    held = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def by_sample(tensor: Tensor, samples: int, lengths: set[int]) -> Tensor:
    """View (…, width) as (N, T, width).

    Modules inside a mixture of experts see all tokens in one row of length N·T; `lengths` are the
    T seen elsewhere in the same forward, which tells such rows from tokens that were picked out.

    Raises:
        SharedInput: the leading dimension is neither N nor N·T.
    """
    width, leading = tensor.shape[-1], tensor.shape[0] if tensor.dim() > 1 else 1
    if samples == 1:
        return tensor.reshape(1, -1, width)
    if leading == samples and tensor.dim() > 1:
        return tensor.reshape(samples, math.prod(tensor.shape[1:-1]), width)
    if tensor.dim() == 2 and any(leading == samples * length for length in lengths):
        return tensor.reshape(samples, leading // samples, width)
    raise SharedInput(
        f"A module saw an input of shape {tuple(tensor.shape)} in a batch of {samples} samples: "
        "its gradient cannot be told apart by sample."
    )


class SampleTaps:
    """Watches `modules` while a batch goes forward and `backward` takes its losses back.

    Each module's (X, D) go to `consume` as soon as its gradient is complete, and are dropped. A
    module called several times (shared layers, tied weights) is consumed once, its calls side by
    side along T, so that X and D give its whole gradient; one never called is never consumed.

    Attributes:
        lengths: the T of the inputs seen in the last forward.
    """

    def __init__(self, modules: Mapping[str, nn.Module], consume: Consume) -> None:
        self.modules, self.consume = modules, consume
        self.lengths: set[int] = set()
        self._calls: Counter[str] = Counter()
        self._pending: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._samples: int | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> SampleTaps:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward(self, losses: Tensor) -> None:
        """Backward of Σ ℓ_i for `losses` (N).

        Raises:
            SharedInput: a layer mixes samples; take such a model one sample at a time.
        """
        try:
            self.expect(len(losses))
            with torch.autocast(losses.device.type, enabled=False):
                losses.sum().backward()
            self.finish()
        finally:
            self.forget()

    def expect(self, samples: int) -> None:
        """Whatever backward comes next is that of so many samples."""
        self._samples = samples

    def finish(self) -> None:
        """After the backward: consume modules of which some call had no part in the loss."""
        for name in list(self._pending):
            self._complete(name)

    def forget(self) -> None:
        """Drop what a forward left, so that the next one starts clean."""
        self._calls.clear()
        self._pending.clear()
        self.lengths.clear()
        self._samples = None

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def sink(entered: Tensor, gradient: Tensor) -> None:
            assert self._samples is not None
            inputs = by_sample(entered, self._samples, self.lengths)
            self._pending[name].append((inputs, by_sample(gradient, self._samples, self.lengths)))
            if self._calls[name] == len(self._pending[name]):
                self._complete(name)

        def hook(_: nn.Module, entered: tuple[Tensor, ...], output: Tensor) -> Tensor:
            given = entered[0].detach()
            given = given if given.is_floating_point() else given.unsqueeze(-1)
            if self._samples is None:  # a forward of its own, not checkpointing's second one
                self._calls[name] += 1
                if given.dim() == 3:
                    self.lengths.add(given.shape[1])
            if not torch.is_grad_enabled():
                return output
            tapped = _Tap.apply(output, self._anchor, given, sink)
            assert isinstance(tapped, Tensor)
            return tapped

        return hook

    def _complete(self, name: str) -> None:
        calls = self._pending.pop(name)
        inputs = calls[0][0] if len(calls) == 1 else torch.cat([x for x, _ in calls], 1)
        gradients = calls[0][1] if len(calls) == 1 else torch.cat([d for _, d in calls], 1)
        if inputs.is_floating_point():
            inputs = inputs.to(gradients.dtype)
        self.consume(name, inputs, gradients)
