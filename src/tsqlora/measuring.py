"""Measure a batch: loss, gradient norm, own step, sketch of every sample. The engine's only caller.

What is measured of a sample does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from tsqlora.batches import Batch, forward_logits, forward_losses, singly
from tsqlora.hooks import SharedInput
from tsqlora.lookahead import one_step
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


class Meter:
    """Measures batches under `model` as it stands.

    Columns of every sample: `loss`, `length` (target tokens); `gradient_norm`, `sketch` (k) and
    `loss_reduction` as `measures` names them; of a class or number also `label` and `output` (C),
    the logits, from which the losses of other targets are had for nothing.

    Attributes:
        measures: the terms wanted; with none of them a forward alone gives the losses.
        learning_rate: η of the lookahead, or None for a step of unit displacement.
        halving: of batches, once memory has run out.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        measures: Set[str],
        learning_rate: float | None = None,
        seed: int = 0,
        depth: float = 1.0,
    ) -> None:
        self.model, self.kind, self.measures = model, kind, measures
        self.learning_rate, self.halving = learning_rate, Halving()
        self.norms, self.sketch, self.keep = SquaredNorms(), Sketch(seed=seed), Keep()
        reducers: list[Reducer] = [self.norms]
        reducers += [self.sketch] if "convergence" in measures else []
        reducers += [self.keep] if "loss_reduction" in measures else []
        self.gradients = PerSampleGradients(model, *reducers, depth=depth)
        self.single: bool | None = None

    def prepare(self, batch: Batch) -> None:
        """See in the first samples of a batch whether samples can be told apart in one."""
        if not self.measures:
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
            if self.measures:
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
        if "convergence" in self.measures:
            found["sketch"] = self.sketch.take()
        if "loss_reduction" in self.measures:
            found["loss_reduction"] = losses - self._after_own_step(batch, norms)
        return found

    def _after_own_step(self, batch: Batch, norms: Tensor) -> Tensor:
        if self.learning_rate is None:
            steps = DISPLACEMENT / norms.clamp(min=1e-12)
        else:
            steps = torch.full_like(norms, self.learning_rate)
        with torch.no_grad(), one_step(self.gradients, self.keep, steps):
            return forward_losses(self.model, self.kind, batch)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """On the CPU, floats in single precision."""
    result = tensor.detach().cpu()
    return result.float().numpy() if result.is_floating_point() else result.numpy()


def _joined(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
