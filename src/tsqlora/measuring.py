"""Measure a batch: loss, gradient norm, own step, sketch of every sample. The engine's only caller.

What is measured of a sample does not depend on the batch it is in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from tsqlora.batches import Batch, forward_logits, forward_losses, singly
from tsqlora.hooks import SharedInput
from tsqlora.lookahead import first_order, one_step, second_order
from tsqlora.losses import CLASSIFICATION, REGRESSION, sample_losses, target_lengths
from tsqlora.memory import Halving, out_of_memory
from tsqlora.per_sample_grads import (
    Keep,
    PerSampleGradients,
    Reducer,
    Sketch,
    SquaredNorms,
    separable,
)

logger = logging.get_logger("tsqlora")

Columns = dict[str, np.ndarray]
"""What is measured by name, a row a sample."""

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
        depth: below 1, gradients of the last layers only, that hold this share of the weights.
        seed: of the sketches.
    """

    terms: tuple[str, ...] = ()
    learning_rate: float | None = None
    lookahead: str = "exact"
    depth: float = 1.0
    seed: int = 0

    @property
    def keeps(self) -> bool:
        """Whether every sample's gradients are wanted once more after the backward."""
        return "loss_reduction" in self.terms and self.lookahead != "first_order"

    @property
    def halves(self) -> float:
        """Half passes of a sample: forwards and backwards, as deep as they go."""
        return 1 + self.depth * (bool(self.terms) + self.keeps)


class Meter:
    """Measures batches under `model` as it stands.

    Columns of every sample: `loss`, `length` (target tokens); `gradient_norm`, `sketch` (k) and
    `loss_reduction` as they are `wanted`; of a class or number also `label` and `output` (C), the
    logits, from which the losses of other targets are had for nothing.

    Attributes:
        wanted: what is measured.
        halving: of batches, once memory has run out.
    """

    def __init__(self, model: nn.Module, kind: str, wanted: Wanted) -> None:
        self.model, self.kind, self.wanted = model, kind, wanted
        self.halving = Halving()
        self.norms, self.sketch, self.keep = SquaredNorms(), Sketch(seed=wanted.seed), Keep()
        reducers: list[Reducer] = [self.norms]
        reducers += [self.sketch] if "convergence" in wanted.terms else []
        reducers += [self.keep] if wanted.keeps else []
        self.gradients = PerSampleGradients(model, *reducers, depth=wanted.depth)
        self.single: bool | None = None

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
                return _joined(self.halving(self._measure, batch))
            except SharedInput:
                self._decide(True)
        parts = [self.halving(self._measure, sample)[0] for sample in singly(batch)]
        return _joined(parts)

    def _decide(self, single: bool) -> None:
        self.single = single
        if single:
            logger.warning(
                f"{type(self.model).__name__} has a layer in which a batch's samples cannot be "
                "told apart: scoring one sample at a time, which is exact but slower."
            )

    def _measure(self, batch: Batch) -> Columns:
        labels = batch["labels"]
        self.norms.total = self.sketch.total = 0.0
        try:
            if self.wanted.terms:
                with self.gradients, torch.enable_grad():
                    logits = forward_logits(self.model, self.kind, batch)
                    losses = sample_losses(self.kind, logits, labels)
                    self.gradients.backward(losses)
                found = self._of_gradients(batch, losses.detach())
            else:
                with torch.no_grad():
                    logits = forward_logits(self.model, self.kind, batch)
                    losses = sample_losses(self.kind, logits, labels)
                found = {}
        finally:
            self.keep.clear()
        found["loss"] = losses
        found["length"] = target_lengths(self.kind, labels).clamp(min=1)
        if self.kind in (CLASSIFICATION, REGRESSION):
            found["label"], found["output"] = labels, logits.reshape(len(labels), -1)
        return {name: as_numpy(tensor) for name, tensor in found.items()}

    def _of_gradients(self, batch: Batch, losses: Tensor) -> dict[str, Tensor]:
        norms = torch.as_tensor(self.norms.total).sqrt()
        found = {"gradient_norm": norms}
        if "convergence" in self.wanted.terms:
            found["sketch"] = self.sketch.take()
        if "loss_reduction" in self.wanted.terms:
            found["loss_reduction"] = self._loss_reduction(batch, losses, norms)
        return found

    def _loss_reduction(self, batch: Batch, losses: Tensor, norms: Tensor) -> Tensor:
        if self.wanted.learning_rate is None:
            steps = DISPLACEMENT / norms.clamp(min=1e-12)
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
    """On the CPU, floats in single precision."""
    result = tensor.detach().cpu()
    return result.float().numpy() if result.is_floating_point() else result.numpy()


def _joined(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
