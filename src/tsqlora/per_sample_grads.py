"""Per-sample gradients of the LoRA factors, from one forward and one backward of a whole batch.

For sample i with input X_i (T, in) of a factor's linear module and gradient D_i (T, out) at its
output, the gradient of that factor is D_iᵀ X_i (Goodfellow 2015, arXiv 1510.01799). For B the
input is X_i Aᵀ and D_i carries the scale s; for A the output gradient is s·D_i B: so
∇_B ℓ_i = s·D_iᵀ(X_i Aᵀ) and ∇_A ℓ_i = s·(D_i B)ᵀX_i. Both are small; they are formed in the
backward hook, handed to the reducers and dropped.

Exact when the loss is the sum over samples, no layer mixes samples and dropout is off. g is the
gradient of A and B alone: heads and other `modules_to_save`, and LoRA's biases, have no part in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tsqlora.batches import Batch, first, forward_losses, singly
from tsqlora.errors import ModelError
from tsqlora.experts import expert_factors
from tsqlora.factors import Columns, Gradient, last_layers, scored_layers, sites
from tsqlora.hooks import SampleTaps, SharedInput, frozen


class Reducer(Protocol):
    """Takes the gradients of one factor of every sample and keeps what it needs of them."""

    def add(self, factor: str, gradient: Tensor, columns: Columns | None = None) -> None:
        """`gradient` (N, rows, columns) of the factor named "module.A" or "module.B".

        Where `columns` are given, it holds only those of the factor's gradient, the rest are 0.
        """


class SquaredNorms:
    """Σ over factors of ‖∇ℓ_i‖²: `total` (N)."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def add(self, factor: str, gradient: Tensor, columns: Columns | None = None) -> None:
        """Add one factor's share."""
        self.total = self.total + torch.linalg.vector_norm(gradient.flatten(1), dim=1).square()


class Dots:
    """⟨∇ℓ_i, v⟩ with a reference gradient v given by factor name, 0 in the others: `total` (N)."""

    def __init__(self, reference: Mapping[str, Tensor]) -> None:
        self.reference = reference
        self.total: Tensor | float = 0.0

    def add(self, factor: str, gradient: Tensor, columns: Columns | None = None) -> None:
        """Add one factor's share."""
        if factor not in self.reference:
            return
        reference = self.reference[factor].to(gradient)
        reference = reference if columns is None else reference[:, columns.ids]
        self.total = self.total + gradient.flatten(1) @ reference.flatten()


class Only:
    """Hands on to `reducer` what it is given of `factors`, and nothing else."""

    def __init__(self, reducer: Reducer, factors: Collection[str]) -> None:
        self.reducer, self.factors = reducer, factors

    def add(self, factor: str, gradient: Tensor, columns: Columns | None = None) -> None:
        """Hand one factor on."""
        if factor in self.factors:
            self.reducer.add(factor, gradient, columns)


class Keep:
    """All gradients of the batch by factor name: `gradients[name]` (N, rows, columns).

    `columns[name]` are those that an embedding's A has there; other factors are whole.
    """

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.columns: dict[str, Columns] = {}

    def add(self, factor: str, gradient: Tensor, columns: Columns | None = None) -> None:
        """Keep one factor's gradients."""
        self.gradients[factor] = gradient
        if columns is not None:
            self.columns[factor] = columns

    def whole(self, factor: str, weight: Tensor) -> Tensor:
        """The gradients (N, *weight.shape) with all columns; 0 where the factor had none."""
        if factor not in self.gradients:
            samples = len(next(iter(self.gradients.values())))
            return weight.new_zeros(samples, *weight.shape)
        if factor not in self.columns:
            return self.gradients[factor]
        found = self.gradients[factor]
        zeros = found.new_zeros(len(found), *weight.shape)
        return zeros.index_copy(2, self.columns[factor].ids, found)

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        """Σ_i weights_i ∇ℓ_i of each factor, for `weights` (N), whole."""
        with torch.autocast(weights.device.type, enabled=False):
            sums = {
                factor: torch.tensordot(weights.to(found), found, 1)
                for factor, found in self.gradients.items()
            }
        for factor, (ids, width) in self.columns.items():
            zeros = sums[factor].new_zeros(len(sums[factor]), width)
            sums[factor] = zeros.index_copy(1, ids, sums[factor])
        return sums

    def clear(self) -> None:
        """Drop them."""
        self.gradients.clear()
        self.columns.clear()


SHORT = 509
"""Numbers in a sketch that stays in memory, where a `Sketch` of its own size goes to disk."""


PIECES = 4
"""Lengths of a sketch up to which a factor is added to it piece by piece."""


class Sketch:
    """A random projection of the whole gradient to `size` numbers that keeps inner products.

    Number k is the sum of all entries p of all factors with (start + p) mod size = k, under random
    signs, so E⟨sketch g, sketch h⟩ = ⟨g, h⟩ with standard error about ‖g‖‖h‖/√size (a count sketch:
    Charikar et al. 2002; on gradients as in TRAK, arXiv 2303.14186). One multiplication and one
    addition an entry. `size` is best a prime: then entries of one column do not meet. Each factor
    has a random start, as those shorter than `size` would meet on its first numbers. Signs and
    start depend on `seed` and the factor's name only, never on the order of the modules.
    """

    def __init__(self, size: int = 2039, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.total: Tensor | float = 0.0
        self._signs: dict[str, Tensor] = {}

    def add(self, factor: str, gradient: Tensor, columns: Columns | None = None) -> None:
        """Add one factor's projection."""
        samples, rows, width = gradient.shape
        signs = self.signs(factor, rows, width if columns is None else columns.width, gradient)
        start = self.start(factor)
        if columns is None and signs.numel() <= PIECES * self.size:
            self._add_pieces(gradient.flatten(1), signs.flatten(), start)
            return
        if columns is None:
            share = self._folded((gradient * signs).flatten(1)).roll(start, 1)
        else:
            first = torch.arange(rows, device=gradient.device).unsqueeze(1) * columns.width
            numbers = (start + first + columns.ids).flatten() % self.size
            signed = (gradient * signs[:, columns.ids]).flatten(1)
            share = gradient.new_zeros(samples, self.size).index_add_(1, numbers, signed)
        self.total = self.total + share

    def take(self) -> Tensor:
        """The sketches (N, size) of the batch, and start afresh."""
        total, self.total = self.total, 0.0
        assert isinstance(total, Tensor), "no gradient was sketched"
        return total

    def _add_pieces(self, gradient: Tensor, signs: Tensor, start: int) -> None:
        """Piece by piece between the sketch's ends: for few of them, cheaper than to fold."""
        if not isinstance(self.total, Tensor):
            self.total = gradient.new_zeros(len(gradient), self.size)
        dtype = torch.promote_types(self.total.dtype, gradient.dtype)
        self.total, gradient, first = self.total.to(dtype), gradient.to(dtype), 0
        while first < len(signs):
            numbers = min(self.size - start, len(signs) - first)
            own = slice(first, first + numbers)
            self.total[:, start : start + numbers].addcmul_(gradient[:, own], signs[own])
            first, start = first + numbers, 0

    def _folded(self, signed: Tensor) -> Tensor:
        whole = signed.shape[1] // self.size * self.size
        share = signed[:, :whole].unflatten(1, (-1, self.size)).sum(1)
        share[:, : signed.shape[1] - whole] += signed[:, whole:]
        return share

    def start(self, factor: str) -> int:
        """The number that the factor's first entry goes to."""
        return zlib.crc32(f"{self.seed}/{factor}/start".encode()) % self.size

    def signs(self, factor: str, rows: int, width: int, like: Tensor) -> Tensor:
        """The factor's random signs (rows, width), of the type of `like`."""
        signs = self._signs.get(factor)
        if signs is None or signs.shape != (rows, width):  # ranks may have moved
            seed = zlib.crc32(f"{self.seed}/{factor}".encode())
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (rows, width), generator=generator) * 2 - 1
            signs = self._signs[factor] = signs.to(like)
        return signs


class PerSampleGradients:
    """Hooks that send every sample's factor gradients to `reducers` while a batch goes backward.

    Use::

        norms = SquaredNorms()
        with PerSampleGradients(model, norms) as gradients:
            losses = sample_losses(kind, model(**batch).logits, batch["labels"])
            gradients.backward(losses)

    Inside, no parameter requires a gradient, so every `.grad` stays as it was, and the backward
    ends at the lowest layer watched: with `depth` below 1, only the last adapted layers that hold
    that share of the adapted weights are watched, and g is the gradient of their factors alone.

    Attributes:
        lengths: the T of the inputs in the last batch that went backward.
        partial: whether not all adapted layers are watched.
    """

    def __init__(self, model: nn.Module, *reducers: Reducer, depth: float = 1.0) -> None:
        layers = last_layers(scored_layers(model), depth)
        self.model, self.reducers = model, reducers
        self.sites = {site.name: site for site in sites(layers)}
        self.experts = expert_factors(layers)
        self.lengths: set[int] = set()
        self._samples = 0
        self._reached, self.partial = False, depth < 1
        self._parameters = list(model.parameters())
        self._taps = SampleTaps({n: s.module for n, s in self.sites.items()}, self._consume)
        self._stack = ExitStack()

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Every factor that is watched, by name."""
        found: dict[str, nn.Parameter] = {}
        for site in self.sites.values():
            found |= site.weights
        for experts in self.experts:
            found |= experts.weights
        return found

    def __enter__(self) -> PerSampleGradients:
        self._stack.enter_context(frozen(self._parameters))
        self._stack.enter_context(self._taps)
        if self.experts:
            handle = self.model.register_forward_pre_hook(self._count, with_kwargs=True)
            self._stack.callback(handle.remove)
        for experts in self.experts:
            self._stack.enter_context(experts.watched(lambda: self._samples))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def backward(self, losses: Tensor) -> None:
        """Backward of Σ ℓ_i for `losses` (N).

        Raises:
            ModelError: the loss reaches no LoRA factor.
            SharedInput: a layer mixes samples; score such a model one sample at a time.
        """
        self.lengths, self._reached = set(self._taps.lengths), False
        try:
            if self.experts and self._samples != len(losses):
                raise SharedInput(f"{len(losses)} samples came to the model as {self._samples}.")
            if losses.requires_grad:
                self._taps.backward(losses)
        finally:
            self._taps.forget()
            expert_gradients = [gradient for each in self.experts for gradient in each.take()]
        for gradient in expert_gradients:
            self._reduce(gradient)
        if not self._reached:
            raise ModelError(
                "The loss reaches none of the last layers' LoRA factors: set quality.depth to 1."
                if self.partial
                else "The loss reaches no LoRA factor: does the forward call their modules?"
            )

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
        self._samples = len(tensors[0])

    def _consume(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        for gradient in self.sites[name].gradients(inputs, gradients):
            self._reduce(gradient)

    def _reduce(self, gradient: Gradient) -> None:
        self._reached = True
        factor, values, columns = gradient
        values = values if values.dtype == torch.float64 else values.float()
        for reducer in self.reducers:
            reducer.add(factor, values, columns)


PROBED = 3
"""Samples of the first batch whose gradients are also taken alone."""
AGREEMENT = 0.25
"""Relative error that low precision may cause; gradients of other samples differ by 1 and more."""


def separable(model: nn.Module, kind: str, batch: Batch) -> bool:
    """Whether the samples' gradients, taken from one batch, are those that each has alone.

    Not so where a layer runs once for the whole batch, mixes samples or holds them in another
    dimension than the first, which a shape alone does not tell when two dimensions are equal.
    """
    if len(batch["labels"]) <= 1:
        return True
    few = first(batch, PROBED)
    try:
        together = _gradients(model, kind, few)
    except SharedInput:
        return False
    for i, sample in enumerate(singly(few)):
        alone = _gradients(model, kind, sample)
        pairs = [(together[name][i], alone[name][0]) for name in alone]
        error = sum(float((got - true).square().sum()) for got, true in pairs)
        if error > AGREEMENT**2 * sum(float(g.square().sum()) for g in alone.values()):
            return False
    return True


def _gradients(model: nn.Module, kind: str, batch: Batch) -> dict[str, Tensor]:
    keep = Keep()
    with PerSampleGradients(model, keep) as gradients, torch.enable_grad():
        gradients.backward(forward_losses(model, kind, batch))
    return {name: keep.whole(name, weight) for name, weight in gradients.weights.items()}
