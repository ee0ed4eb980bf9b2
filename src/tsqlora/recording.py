"""Per-sample gradients from a training's own forward and backward.

In a training step the loss is L = Σ w_i ℓ_i, w_i the sample's share of the step's labels or target
tokens, times what data-parallel averaging or loss scaling put on top. The backward of the modules
that hold A and B forms w_i ∇ℓ_i by sample, keeps its norm and sketch, and gives Σ_i w_i ∇ℓ_i as the
weight's gradient: what autograd would have formed, formed once, so that what comes after
(accumulation, clipping, data-parallel reduction) goes on as ever. Dropout stays on: what is
recorded is what trains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsqlora.errors import ModelError
from tsqlora.factors import LinearSite, outer, sites
from tsqlora.hooks import by_sample
from tsqlora.lora_layers import lora_modules
from tsqlora.losses import CAUSAL_LM, REGRESSION, sample_losses, target_lengths
from tsqlora.per_sample_grads import SHORT, Sketch

TOLERANCE = 0.01
"""Relative error that low precision may cause between a loss and its samples'."""
AT_ONCE = 2**17
"""Numbers that are reduced together."""
MOST_LAID = 256
"""Layouts that are kept: one for each few factors and size of batch."""


class Recorder:
    """Records every sample's factor gradients while a batch of a training goes forward and back.

    Use::

        recorder = Recorder(model)
        with recorder.recording():
            losses = sample_losses(kind, model(**batch).logits, batch["labels"])
            recorder.expect(len(losses))
            (weights * losses).sum().backward()
            norms, sketches = recorder.take(weights)

    Several forwards and backwards may follow each other inside, one `expect` and `take` each.

    Raises:
        ModelError: the model has no LoRA adapter, or adapts something else than linear modules.
    """

    def __init__(self, model: nn.Module, sketched: bool = True, seed: int = 0) -> None:
        held = sites(lora_modules(model))
        self.sites = [site for site in held if isinstance(site, LinearSite)]
        self._tally = _Tally(Sketch(SHORT, seed) if sketched else None)
        self._lengths: set[int] = set()
        self._calls: Counter[str] = Counter()
        self._sums: dict[str, Tensor] = {}
        self._samples: int | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, forwards with gradients are recorded, in training mode or not."""
        self._forget()
        for site in self.sites:
            site.module.forward = self._recorded(site)  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            for site in self.sites:
                del site.module.forward
            self._forget()

    def expect(self, samples: int) -> None:
        """The backward that comes next is that of so many samples."""
        self._samples = samples

    def take(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """‖∇ℓ_i‖ (N) and the sketches of ∇ℓ_i (N, k) after a backward of Σ w_i ℓ_i; 0 where w_i is.

        Raises:
            ModelError: the backward reached no LoRA factor.
        """
        for name, values in self._sums.items():  # of which some call had no part in the loss
            self._tally.add(name, values)
        found = self._tally.take()
        self._forget()
        if found is None:
            raise ModelError("The training's loss reaches no LoRA factor: is the adapter active?")
        norms, sketches = found
        inverse = torch.where(weights == 0, 0, 1 / weights).to(norms)
        return norms * inverse.abs(), None if sketches is None else sketches * inverse[:, None]

    def _forget(self) -> None:
        self._calls.clear()
        self._sums.clear()
        self._lengths.clear()
        self._samples = None
        self._tally.take()

    def _recorded(self, site: LinearSite) -> Callable[[Tensor], Tensor]:
        original, module = site.module.forward, site.module

        def sink(entered: Tensor, gradient: Tensor) -> Tensor:
            return self._consume(site.name, entered, gradient)

        def forward(entered: Tensor) -> Tensor:
            if self._samples is None:  # a forward of its own, not checkpointing's second one
                self._calls[site.name] += 1
                if entered.dim() == 3:
                    self._lengths.add(entered.shape[1])
            if not torch.is_grad_enabled():
                return original(entered)
            output = _Recorded.apply(entered, module.weight, sink)
            assert isinstance(output, Tensor)
            return output if module.bias is None else output + module.bias

        return forward

    def _consume(self, name: str, entered: Tensor, gradient: Tensor) -> Tensor:
        """Take in one call's (X, D); gives Σ_i D_iᵀ X_i."""
        assert self._samples is not None, "a backward without `expect`"
        inputs = by_sample(entered, self._samples, self._lengths).to(gradient.dtype)
        values = outer(by_sample(gradient, self._samples, self._lengths), inputs)
        before = self._sums.pop(name, None)
        total = values if before is None else before + values
        self._calls[name] -= 1
        if self._calls[name]:
            self._sums[name] = total
        else:
            self._tally.add(name, total)
        return values.sum(0)


class _Recorded(torch.autograd.Function):
    """y = x Wᵀ whose backward hands (x, ∂y) to the sink and takes W's gradient from it."""

    @staticmethod
    def forward(
        ctx: Any, entered: Tensor, weight: Tensor, sink: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(entered, weight)
        ctx.sink = sink
        return F.linear(entered, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        entered, weight = ctx.saved_tensors
        back = None
        if ctx.needs_input_grad[0]:
            back = (gradient @ weight.to(gradient.dtype)).to(entered.dtype)
        return back, ctx.sink(entered, gradient).to(weight.dtype), None


@dataclass(frozen=True)
class _Laid:
    """A row a sample (N, P) in which factors have a place each; the signs (P) of a sketch."""

    row: Tensor
    own: list[Tensor]
    signs: Tensor | None


class _Tally:
    """‖g_i‖ and `Sketch` of gradients that come factor by factor, reduced some `AT_ONCE`.

    The factors' numbers lie side by side, each factor after as many zeros as its start says and
    filled up with zeros to whole sketches, so that one product with the signs and one sum serve
    many factors.
    """

    def __init__(self, sketch: Sketch | None) -> None:
        self.sketch = sketch
        self._waiting: list[tuple[str, Tensor]] = []
        self._squares: Tensor | None = None
        self._total: Tensor | None = None
        self._laid: dict[tuple[object, ...], _Laid] = {}
        self._storage = torch.empty(0)

    def add(self, factor: str, values: Tensor) -> None:
        """`values` (N, rows, columns) of one factor."""
        self._waiting.append((factor, values))
        if sum(each.numel() for _, each in self._waiting) >= AT_ONCE:
            self._reduce()

    def take(self) -> tuple[Tensor, Tensor | None] | None:
        """Norms (N) and sketches (N, k) of what came since the last time; None if nothing did."""
        self._reduce()
        squares, total = self._squares, self._total
        self._squares = self._total = None
        return None if squares is None else (squares.sqrt(), total)

    def _reduce(self) -> None:
        if not self._waiting:
            return
        laid = self._laid_out()
        row = laid.row.zero_()
        for own, (_, values) in zip(laid.own, self._waiting, strict=True):
            own.copy_(values)
        squares = torch.linalg.vector_norm(row, dim=1).square()
        self._squares = squares if self._squares is None else self._squares + squares
        if self.sketch is not None:
            assert laid.signs is not None
            folded = row.mul_(laid.signs).unflatten(1, (-1, self.sketch.size)).sum(1)
            self._total = folded if self._total is None else self._total + folded
        self._waiting.clear()

    def _laid_out(self) -> _Laid:
        """Where those that wait go: the same for every batch, so it is kept, in one storage."""
        first = self._waiting[0][1]
        kept = torch.float64 if first.dtype == torch.float64 else torch.float32
        shapes = tuple((name, *values.shape[1:]) for name, values in self._waiting)
        key = (len(first), kept, first.device, shapes)
        if key not in self._laid:
            if len(self._laid) >= MOST_LAID:
                self._laid.clear()
            self._laid[key] = self._lay_out(first.new_empty(0, dtype=kept))
        return self._laid[key]

    def _lay_out(self, like: Tensor) -> _Laid:
        around = [self._zeros(name, values[0].numel()) for name, values in self._waiting]
        lengths = [v[0].numel() + sum(z) for (_, v), z in zip(self._waiting, around, strict=True)]
        samples = len(self._waiting[0][1])
        size = samples * sum(lengths)
        same = (self._storage.dtype, self._storage.device) == (like.dtype, like.device)
        if not same or len(self._storage) < size:
            self._storage = like.new_empty(size)
            self._laid.clear()
        row = self._storage[:size].view(samples, -1)
        own = [
            piece[:, before : piece.shape[1] - after].unflatten(1, values.shape[1:])
            for (_, values), (before, after), piece in zip(
                self._waiting, around, row.split(lengths, dim=1), strict=True
            )
        ]
        return _Laid(row, own, None if self.sketch is None else self._row_of_signs(like))

    def _zeros(self, factor: str, numbers: int) -> tuple[int, int]:
        """How many zeros stand before and after so many numbers of a factor."""
        if self.sketch is None:
            return 0, 0
        start = self.sketch.start(factor)
        return start, -(start + numbers) % self.sketch.size

    def _row_of_signs(self, like: Tensor) -> Tensor:
        assert self.sketch is not None
        pieces = []
        for name, values in self._waiting:
            signs = self.sketch.signs(name, values.shape[1], values.shape[2], like).flatten()
            before, after = self._zeros(name, len(signs))
            pieces += [signs.new_zeros(before), signs, signs.new_zeros(after)]
        return torch.cat(pieces)


def summed_loss(kind: str, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Σ over samples, or over all target tokens, of the loss that is trained, labels smoothed."""
    if smoothing == 0 or kind == REGRESSION:
        return (sample_losses(kind, logits, labels) * target_lengths(kind, labels)).sum()
    if kind == CAUSAL_LM:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(
        flat.float(), labels.reshape(-1), reduction="sum", label_smoothing=smoothing
    )


def sample_weights(lengths: Tensor, total: Tensor, loss: Tensor, targets: float) -> Tensor:
    """w_i = T_i / `targets` (N), the shares of ℓ_i in a loss L = Σ T_i ℓ_i / `targets`.

    T_i = `lengths`, `total` = Σ T_i ℓ_i, `loss` = L.

    Raises:
        ModelError: L is something else, so the samples' shares in it are not known.
    """
    mean, found = float(total) / targets, float(loss)
    if abs(mean - found) > TOLERANCE * max(abs(found), 1e-3):
        raise ModelError(
            f"The training loss ({found:.4g}) is not the mean of its samples' or tokens' losses "
            f"({mean:.4g}): something is added to it, such as a router's loss, so samples cannot "
            "be scored from it. Use quality.mode: upfront."
        )
    return lengths / targets
