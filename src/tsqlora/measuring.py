"""Measure a batch: loss, gradient norm, own step, sketch of every sample. The engine's only caller.

What is measured of a sample does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from tsqlora.batches import Batch, forward_logits, forward_losses, singly
from tsqlora.hooks import SharedInput
from tsqlora.lookahead import first_order, one_step, second_order
from tsqlora.losses import (
    CAUSAL_LM,
    CLASSIFICATION,
    REGRESSION,
    last_turn_losses,
    sample_losses,
    target_lengths,
)
from tsqlora.memory import Halving, out_of_memory
from tsqlora.per_sample_grads import (
    Dots,
    Keep,
    Only,
    PerSampleGradients,
    Reducer,
    Sketch,
    SquaredNorms,
    separable,
)

logger = logging.get_logger("tsqlora")

Columns = dict[str, np.ndarray]
"""What is measured by name, a row a sample."""
Direction = Mapping[str, np.ndarray]
"""Σ g_i/‖g_i‖ over a reference, by factor: where its mean unit gradient points."""

Piece = tuple[Columns, dict[str, Tensor]]
"""The columns of some samples, and the sum of their unit gradients."""

LAST_TURN = "last_turn"
"""The column of losses over a chat's last turn alone."""
TINY = 1e-12
"""Gradients are taken to be no shorter."""
DISPLACEMENT = 0.5
"""‖η_i g_i‖ of the lookahead step in preset `default`: every sample moves the model as far."""


@dataclass(frozen=True)
class Wanted:
    """What is measured of every sample.

    Attributes:
        terms: of gradient_norm, loss_reduction and convergence; with none a forward alone gives the
            losses.
        learning_rate: η of the lookahead, or None for a step of unit displacement.
        lookahead: exact, first_order or second_order (`lookahead.py`).
        depth: below 1, gradients of the last layers only, that hold this share of the weights, and
            no lookahead (`calibration.py`).
        seed: of the sketches.
        sums_units: this is a reference, whose unit gradients are added up rather than sketched.
        whole: of a depth below 1, what calibrates it: gradients of all layers, and the lookahead,
            beside what the last layers alone give.
    """

    terms: tuple[str, ...] = ()
    learning_rate: float | None = None
    lookahead: str = "exact"
    depth: float = 1.0
    seed: int = 0
    sums_units: bool = False
    whole: bool = False

    @property
    def economical(self) -> bool:
        """Whether most samples are measured by their last layers alone."""
        return self.depth < 1 and bool(self.terms) and not self.sums_units

    @property
    def steps(self) -> bool:
        """Whether there is a further forward, after every sample's own step."""
        wanted = "loss_reduction" in self.terms and self.lookahead != "first_order"
        return wanted and (self.whole or not self.economical)

    @property
    def halves(self) -> float:
        """Half passes of a sample: forwards and backwards, as deep as they go."""
        return 1 + (1 if self.whole else self.depth) * (bool(self.terms) + self.steps)

    def first_order(self, norms: np.ndarray) -> np.ndarray:
        """η_i‖g_i‖² (N) of the step that the lookahead takes, for ‖g_i‖ (N)."""
        rate = self.learning_rate
        return DISPLACEMENT * norms if rate is None else rate * np.square(norms)


class Meter:
    """Measures batches under `model` as it stands.

    Columns of every sample: `loss`, `length` (target tokens); as they are `wanted`
    `gradient_norm`, `loss_reduction` and for convergence `alignment`, the cosine with a known
    `direction`, or `sketch` (k) where there is none; below depth 1 `last_norm`, the gradient
    norm of the last layers, of which alignment and sketch then are too, while `gradient_norm`
    and `loss_reduction` are NaN of what is not measured whole; of causal samples `last_turn`,
    the loss over it; of a class or number also `label` and `output` (C), the logits, from which
    the losses of other targets are had for nothing.

    Attributes:
        wanted: what is measured.
        halving: of batches, once memory has run out.
    """

    def __init__(
        self, model: nn.Module, kind: str, wanted: Wanted, direction: Direction | None = None
    ) -> None:
        self.model, self.kind, self.wanted = model, kind, wanted
        self.halving = Halving()
        self.norms, self.keep = SquaredNorms(), Keep()
        self.sketch: Sketch | None = None
        self.dots: Dots | None = None
        self.last = SquaredNorms() if wanted.whole else self.norms
        reducers: list[Reducer] = [self.norms]
        partial: list[Reducer] = [self.last] if wanted.whole else []
        if "convergence" in wanted.terms and not wanted.sums_units:
            if direction is None:
                self.sketch = Sketch(seed=wanted.seed)
            else:
                self.dots = Dots(_unit(direction, model))
            partial += [each for each in (self.sketch, self.dots) if each is not None]
        if wanted.whole:
            last = PerSampleGradients(model, depth=wanted.depth).weights.keys()
            partial = [Only(each, last) for each in partial]
        reducers += partial
        reducers += [self.keep] if wanted.steps or wanted.sums_units else []
        self.gradients = PerSampleGradients(
            model, *reducers, depth=1.0 if wanted.whole else wanted.depth
        )
        self.single: bool | None = None
        self._units: dict[str, Tensor] = {}

    def prepare(self, batch: Batch) -> None:
        """See in the first samples of a batch whether samples can be told apart in one."""
        if not self.wanted.terms:
            return
        try:
            self._decide(not separable(self.model, self.kind, batch))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.single = True  # there is room for no more than one

    def measure(self, batch: Batch) -> Columns:
        """The columns of a batch, in its order, in pieces where memory or the model wants it.

        Raises:
            ModelError: memory does not suffice for one sample, or the loss reaches no factor.
        """
        if not self.single:
            try:
                return self._joined(self.halving(self._measure, batch))
            except SharedInput:
                self._decide(True)
        return self._joined([self.halving(self._measure, one)[0] for one in singly(batch)])

    def take_units(self) -> dict[str, np.ndarray]:
        """Σ g_i/‖g_i‖ by factor of what was measured since the last call; {} unless wanted."""
        found = {name: tensor.cpu().numpy() for name, tensor in self._units.items()}
        self._units = {}
        return found

    def _joined(self, pieces: list[Piece]) -> Columns:
        """The pieces' columns; their sums are only added now, when none can be tried again."""
        for _, units in pieces:
            for name, share in units.items():
                self._units[name] = self._units[name] + share if name in self._units else share
        return {name: np.concatenate([piece[name] for piece, _ in pieces]) for name in pieces[0][0]}

    def _decide(self, single: bool) -> None:
        self.single = single
        if single:
            logger.warning(
                f"{type(self.model).__name__} has a layer in which a batch's samples cannot be "
                "told apart: scoring one sample at a time, which is exact but slower."
            )

    def _measure(self, batch: Batch) -> Piece:
        labels, units = batch["labels"], {}
        for reducer in (self.norms, self.last, self.sketch, self.dots):
            if reducer is not None:
                reducer.total = 0.0
        try:
            if self.wanted.terms:
                with self.gradients, torch.enable_grad():
                    logits = forward_logits(self.model, self.kind, batch)
                    losses = sample_losses(self.kind, logits, labels)
                    self.gradients.backward(losses)
                found = self._of_gradients(batch, losses.detach())
                if self.wanted.sums_units:
                    units = self.keep.weighted(1 / found["gradient_norm"].clamp(min=TINY))
            else:
                with torch.no_grad():
                    logits = forward_logits(self.model, self.kind, batch)
                    losses = sample_losses(self.kind, logits, labels)
                found = {}
        finally:
            self.keep.clear()
        found["loss"] = losses
        if self.kind == CAUSAL_LM:
            found[LAST_TURN] = last_turn_losses(logits.detach(), labels, losses.detach())
        found["length"] = target_lengths(self.kind, labels).clamp(min=1)
        if self.kind in (CLASSIFICATION, REGRESSION):
            found["label"], found["output"] = labels, logits.reshape(len(labels), -1)
        return {name: as_numpy(tensor) for name, tensor in found.items()}, units

    def _of_gradients(self, batch: Batch, losses: Tensor) -> dict[str, Tensor]:
        norms = torch.as_tensor(self.norms.total).sqrt()
        last = torch.as_tensor(self.last.total).sqrt()
        found = {"gradient_norm": norms}
        if self.sketch is not None:
            found["sketch"] = self.sketch.take()
        if self.dots is not None:
            found["alignment"] = torch.as_tensor(self.dots.total) / last.clamp(min=TINY)
        if self.wanted.economical:
            found["last_norm"] = last
        if self.wanted.economical and not self.wanted.whole:
            found["gradient_norm"] = torch.full_like(norms, torch.nan)
            if "loss_reduction" in self.wanted.terms:
                found["loss_reduction"] = found["gradient_norm"]
        elif "loss_reduction" in self.wanted.terms:
            found["loss_reduction"] = self._loss_reduction(batch, losses, norms)
        return found

    def _loss_reduction(self, batch: Batch, losses: Tensor, norms: Tensor) -> Tensor:
        if self.wanted.learning_rate is None:
            steps = DISPLACEMENT / norms.clamp(min=TINY)
        else:
            steps = torch.full_like(norms, self.wanted.learning_rate)
        if self.wanted.lookahead == "first_order":
            return first_order(norms.square(), steps)

        def forward() -> Tensor:
            return forward_losses(self.model, self.kind, batch)

        if self.wanted.lookahead == "second_order":
            squared = norms.square()
            return second_order(self.gradients, self.keep, losses, squared, steps, forward)
        with torch.no_grad(), one_step(self.gradients, self.keep, steps):
            return losses - forward()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """On the CPU, in 32 bits."""
    result = tensor.detach().cpu()
    return (result.float() if result.is_floating_point() else result.int()).numpy()


def _unit(direction: Direction, model: nn.Module) -> dict[str, Tensor]:
    """The direction as one vector of length 1 (0 stays 0), where the model is."""
    length = max(sum(float(np.square(values).sum()) for values in direction.values()) ** 0.5, TINY)
    like = next(model.parameters())
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return {
        name: torch.from_numpy(values / length).to(like.device, dtype)
        for name, values in direction.items()
    }
