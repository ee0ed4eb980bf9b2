"""Per-sample gradients of the LoRA factors, from one forward and one backward of a whole batch.

For sample i with input X_i (T, in) of a factor's linear module and gradient D_i (T, out) at its
output, the gradient of that factor is D_iᵀ X_i (Goodfellow 2015, arXiv 1510.01799). For B the
input is X_i Aᵀ and D_i carries the scale s; for A the output gradient is s·D_i B: so
∇_B ℓ_i = s·D_iᵀ(X_i Aᵀ) and ∇_A ℓ_i = s·(D_i B)ᵀX_i. Both are small; they are formed in the
backward hook, handed to the reducers and dropped.

Exact when the loss is the sum over samples, no layer mixes samples and dropout is off.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from tsqlora.batches import Batch, forward_losses, singly
from tsqlora.errors import ModelError
from tsqlora.hooks import SampleTaps, SharedInput, by_sample
from tsqlora.lora_layers import LoraModule, lora_modules


class Reducer(Protocol):
    """Takes the gradients of one factor of every sample and keeps what it needs of them."""

    def add(self, factor: str, gradient: Tensor) -> None:
        """`gradient` (N, rows, columns) of the factor named "module.A" or "module.B"."""


class SquaredNorms:
    """Σ over factors of ‖∇ℓ_i‖²: `total` (N)."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def add(self, factor: str, gradient: Tensor) -> None:
        """Add one factor's share."""
        self.total = self.total + gradient.flatten(1).square().sum(1)


class Dots:
    """⟨∇ℓ_i, v⟩ with a reference gradient v given by factor name: `total` (N)."""

    def __init__(self, reference: Mapping[str, Tensor]) -> None:
        self.reference = reference
        self.total: Tensor | float = 0.0

    def add(self, factor: str, gradient: Tensor) -> None:
        """Add one factor's share."""
        reference = self.reference[factor].to(gradient)
        self.total = self.total + gradient.flatten(1) @ reference.flatten()


class Keep:
    """All gradients of the batch by factor name: `gradients[name]` (N, rows, columns)."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def add(self, factor: str, gradient: Tensor) -> None:
        """Keep one factor's gradients."""
        self.gradients[factor] = gradient


class Sketch:
    """A random projection of the whole gradient to `size` numbers that keeps inner products.

    Each factor's gradient G is projected as Lᵀ G R with random signs L (rows, a), R (columns, c),
    a·c = size, scaled by 1/√size, and the factors are added up: E⟨sketch g, sketch h⟩ = ⟨g, h⟩
    with standard error about ‖g‖‖h‖/√size (as in TRAK and LoGra, arXiv 2303.14186, 2405.13954).
    The signs depend on `seed` and the factor's name only, never on the order of the modules.
    """

    def __init__(self, size: int = 512, seed: int = 0, rows: int = 8) -> None:
        if size % rows:
            raise ValueError(f"size {size} is not a multiple of rows {rows}")
        self.size, self.seed, self.rows = size, seed, rows
        self.total: Tensor | float = 0.0
        self._signs: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, factor: str, gradient: Tensor) -> None:
        """Add one factor's projection."""
        left, right = self._projections(factor, gradient)
        self.total = self.total + (left.T @ (gradient @ right)).flatten(1)

    def take(self) -> Tensor:
        """The sketches (N, size) of the batch, and start afresh."""
        total, self.total = self.total, 0.0
        assert isinstance(total, Tensor), "no gradient was sketched"
        return total

    def _projections(self, factor: str, gradient: Tensor) -> tuple[Tensor, Tensor]:
        if factor not in self._signs:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{factor}".encode()))
            left = _signs(gradient.shape[1], self.rows, generator)
            right = _signs(gradient.shape[2], self.size // self.rows, generator) / self.size**0.5
            self._signs[factor] = (left.to(gradient), right.to(gradient))
        return self._signs[factor]


def _signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (rows, columns), generator=generator).float() * 2 - 1


class PerSampleGradients:
    """Hooks that send every sample's factor gradients to `reducers` while a batch goes backward.

    Use::

        norms = SquaredNorms()
        with PerSampleGradients(model, norms) as gradients:
            losses = sample_losses(kind, model(**batch).logits, batch["labels"])
            gradients.backward(losses)

    Attributes:
        lengths: the T of the inputs in the last batch that went backward.
    """

    def __init__(self, model: nn.Module, *reducers: Reducer) -> None:
        self.modules: list[LoraModule] = lora_modules(model)
        self.reducers = reducers
        self.lengths: set[int] = set()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._reached = False
        self._taps = SampleTaps(factors(self.modules), self._consume)

    def __enter__(self) -> PerSampleGradients:
        self._taps.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._taps.__exit__()

    def backward(self, losses: Tensor) -> None:
        """Backward of Σ ℓ_i for `losses` (N); the parameters' own `.grad` stay as they were.

        Raises:
            ModelError: the loss reaches no LoRA factor.
            SharedInput: a layer mixes samples; score such a model one sample at a time.
        """
        self.lengths, self._reached = set(self._taps.lengths), False
        self._taps.backward(losses, self._parameters)
        if not self._reached:
            raise ModelError(
                "The loss reaches no LoRA factor: is the adapter active and trainable?"
            )

    def _consume(self, factor: str, inputs: Tensor, gradients: Tensor) -> None:
        self._reached = True
        gradient = torch.bmm(gradients.transpose(1, 2), inputs)
        for reducer in self.reducers:
            reducer.add(factor, gradient)


PROBED = 3
"""Samples of the first batch whose gradients are also taken alone."""
AGREEMENT = 0.25
"""Relative error that low precision may cause; gradients of other samples differ by 1 and more."""


def separable(model: nn.Module, kind: str, batch: Batch) -> bool:
    """Whether the samples' gradients, taken from one batch, are those that each has alone.

    Not so where a layer runs once for the whole batch, mixes samples or holds them in another
    dimension than the first, which a shape alone does not tell when two dimensions are equal.
    """
    if len(batch["labels"]) == 1:
        return True
    few = {name: tensor[:PROBED] for name, tensor in batch.items()}
    try:
        together = _gradients(model, kind, few)
    except SharedInput:
        return False
    for i, sample in enumerate(singly(few)):
        alone = _gradients(model, kind, sample)
        pairs = [(together[name][i], alone[name][0]) for name in alone if name in together]
        error = sum(float((got - true).square().sum()) for got, true in pairs)
        if error > AGREEMENT**2 * sum(float(g.square().sum()) for g in alone.values()):
            return False
    return True


def _gradients(model: nn.Module, kind: str, batch: Batch) -> dict[str, Tensor]:
    keep = Keep()
    with PerSampleGradients(model, keep) as gradients, torch.enable_grad():
        gradients.backward(forward_losses(model, kind, batch))
    return keep.gradients


def factors(modules: Sequence[LoraModule]) -> dict[str, nn.Linear]:
    """The linear module of every factor, named "module.A" and "module.B"."""
    return {f"{m.name}.{f}": linear for m in modules for f, linear in (("A", m.a), ("B", m.b))}


@contextmanager
def one_step(
    gradients: PerSampleGradients, kept: Mapping[str, Tensor], steps: Tensor
) -> Iterator[None]:
    """Inside, every sample i sees the model at θ − steps_i·∇ℓ_i: its own step, for a whole batch.

    `kept` are the gradients of the batch by factor, `steps` (N). Each factor's module then
    computes X_i (W − steps_i G_i)ᵀ, so one forward gives every sample's loss after its own step.
    """
    handles = []
    for factor, linear in factors(gradients.modules).items():
        if factor in kept:
            delta = (steps.view(-1, 1, 1) * kept[factor]).transpose(1, 2)
            handles.append(linear.register_forward_hook(_subtract(delta, gradients.lengths)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _subtract(delta: Tensor, lengths: set[int]) -> Callable[..., Tensor]:
    def hook(_: nn.Module, entered: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = by_sample(entered[0], len(delta), lengths)
        return output - torch.bmm(inputs, delta.to(inputs.dtype)).reshape(output.shape)

    return hook
