"""One pass over the pool: measure every sample, then score it. The only caller of the engine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.utils import logging

from tsqlora.adaptation import FEW, Adaptation, adapt_briefly
from tsqlora.batches import (
    Batch,
    Collator,
    batches,
    forward_logits,
    forward_losses,
    require_samples,
    singly,
    subset,
)
from tsqlora.config import QualityConfig
from tsqlora.errors import DataError, TrainingError
from tsqlora.hooks import SharedInput
from tsqlora.lookahead import one_step
from tsqlora.lora_layers import has_lora, temporary_adapter
from tsqlora.losses import (
    CLASSIFICATION,
    REGRESSION,
    infer_kind,
    sample_losses,
    target_lengths,
)
from tsqlora.mismatch import mismatched_pairs
from tsqlora.per_sample_grads import (
    Keep,
    PerSampleGradients,
    Reducer,
    Sketch,
    SquaredNorms,
    separable,
)
from tsqlora.quality import Measurements, QualityScores, quality_scores
from tsqlora.selection import draw

logger = logging.get_logger("tsqlora")

DISPLACEMENT = 0.5
"""‖η_i g_i‖ of the lookahead step in preset `default`: every sample moves the model as far."""
NULL_SAMPLES = 500
"""Mismatched pairs that make the null where it takes passes of its own (generation)."""


@dataclass(frozen=True)
class Scorer:
    """How a pool is measured.

    Attributes:
        collator: turns rows into a batch with `labels`.
        quality: the `quality` section of the configuration.
        learning_rate: η of preset `paper`.
        batch_size: samples a batch.
        seed: of the draws and the null.
        depth: below 1, the economical mode: gradients of the last layers only, that hold this share
            of the adapted weights; the backward ends there, and the lookahead begins there.
    """

    collator: Collator
    quality: QualityConfig = field(default_factory=QualityConfig)
    learning_rate: float = 1e-3
    batch_size: int = 32
    seed: int = 0
    depth: float = 1.0

    @property
    def measures(self) -> frozenset[str]:
        """The terms whose weight is not 0; with none of them a forward alone gives the losses."""
        weights = self.quality.weights
        return frozenset(f.name for f in fields(weights) if getattr(weights, f.name) != 0)

    def passes(self, kind: str, samples: int) -> float:
        """Passes it takes to score so many samples; a forward alone counts ½."""
        halves = 1 + self.depth * (bool(self.measures) + ("loss_reduction" in self.measures))
        null = 0 if kind in (CLASSIFICATION, REGRESSION) else min(samples, NULL_SAMPLES)
        return 0.5 * (halves * samples + null)

    def score(
        self, model: nn.Module, dataset: Dataset, reference: Dataset | None = None
    ) -> QualityScores:
        """Quality scores under `model` as it is: adapted already, LoRA factors active."""
        pool = self.measure(model, dataset, "quality scores")
        trusted = None
        if reference is not None:
            trusted = self.measure(model, reference, "reference scores", null=False)
        scores = quality_scores(pool, self.quality, trusted)
        selected = np.zeros(len(scores.ids), dtype=bool)
        selected[draw(scores.probability, self.quality.fraction, self.seed)] = True
        return replace(scores, selected=selected)

    def measure(
        self, model: nn.Module, dataset: Dataset, what: str, null: bool = True
    ) -> Measurements:
        """One forward of every sample, a backward and a forward after its own step if wanted."""
        if len(dataset) == 0:
            raise DataError("There is no sample to score: the data set is empty.")
        training = model.training
        model.eval()
        try:
            sheet = _Sheet(self, model, infer_kind(model), len(dataset))
            for positions, batch in batches(model, dataset, self.collator, self.batch_size, what):
                sheet.add(positions, batch)
            if null and sheet.kind not in (CLASSIFICATION, REGRESSION):
                sheet.add_mismatched(dataset)
        finally:
            model.train(training)
        measured = sheet.measurements(_ids(dataset))
        columns = [measured.loss, *([measured.gradient_norm] if self.measures else [])]
        _require_finite(measured.ids, columns, what)
        return measured


class _Sheet:
    """The columns being filled while batches pass."""

    def __init__(self, scorer: Scorer, model: nn.Module, kind: str, samples: int) -> None:
        self.scorer, self.model, self.kind = scorer, model, kind
        self.lookahead = "loss_reduction" in scorer.measures
        self.sketch = Sketch(seed=scorer.seed) if "convergence" in scorer.measures else None
        self.norms, self.keep = SquaredNorms(), Keep()
        reducers: list[Reducer] = [self.norms]
        reducers += [self.sketch] if self.sketch else []
        reducers += [self.keep] if self.lookahead else []
        self.gradients = PerSampleGradients(model, *reducers, depth=scorer.depth)
        self.random = np.random.default_rng(scorer.seed)
        self.single: bool | None = None
        names = ("loss", "gradient_norm", "loss_reduction")
        self.columns = {name: np.full(samples, np.nan) for name in names}
        size = self.sketch.size if self.sketch else 0
        self.sketches = np.zeros((samples, size), dtype=np.float32)
        self.length = np.ones(samples, dtype=np.int64)
        self.group = np.zeros(samples, dtype=np.int64)
        classes = samples if kind == CLASSIFICATION else 0
        self.confidence, self.agrees = np.zeros(classes), np.zeros(classes, dtype=bool)
        self.classes: int | None = None
        self.null_loss: list[np.ndarray] = []
        self.null_group: list[np.ndarray] = []

    def add(self, positions: np.ndarray, batch: Batch) -> None:
        """Measure one batch, one sample at a time where a layer mixes samples."""
        if self.single is None and self.scorer.measures:
            self._decide(not separable(self.model, self.kind, batch))
        if not self.single:
            try:
                self._add(positions, batch)
                return
            except SharedInput:
                self._decide(True)
                self._reset()
        for i, sample in enumerate(singly(batch)):
            self._add(positions[i : i + 1], sample)

    def _decide(self, single: bool) -> None:
        self.single = single
        if single:
            logger.warning(
                f"{type(self.model).__name__} has a layer in which a batch's samples cannot be "
                "told apart: scoring one sample at a time, which is exact but slower."
            )

    def _add(self, positions: np.ndarray, batch: Batch) -> None:
        labels = batch["labels"]
        if self.scorer.measures:
            with self.gradients, torch.enable_grad():
                logits = forward_logits(self.model, self.kind, batch)
                losses = sample_losses(self.kind, logits, labels)
                self.gradients.backward(losses)
            self._add_gradients(positions, batch, losses.detach())
        else:
            with torch.no_grad():
                logits = forward_logits(self.model, self.kind, batch)
                losses = sample_losses(self.kind, logits, labels)
        self._put("loss", positions, losses)
        self.length[positions] = _numpy(target_lengths(self.kind, labels).clamp(min=1))
        self._add_classes(positions, logits.detach(), labels)
        self._reset()

    def _add_gradients(self, positions: np.ndarray, batch: Batch, losses: Tensor) -> None:
        norms = torch.as_tensor(self.norms.total).sqrt()
        self._put("gradient_norm", positions, norms)
        if self.sketch:
            self.sketches[positions] = _numpy(self.sketch.take())
        if self.lookahead:
            stepped = self._after_own_step(batch, norms)
            self._put("loss_reduction", positions, losses - stepped)

    def _after_own_step(self, batch: Batch, norms: Tensor) -> Tensor:
        steps = torch.full_like(norms, self.scorer.learning_rate)
        if self.scorer.quality.preset != "paper":
            steps = DISPLACEMENT / norms.clamp(min=1e-12)
        with torch.no_grad(), one_step(self.gradients, self.keep, steps):
            return forward_losses(self.model, self.kind, batch)

    def _add_classes(self, positions: np.ndarray, logits: Tensor, labels: Tensor) -> None:
        """The group of each sample, and the null of classes and numbers, free from the logits."""
        if self.kind == CLASSIFICATION:
            self.group[positions] = _numpy(labels)
            self.classes = logits.shape[-1]
            best = logits.float().topk(2)
            self.confidence[positions] = _numpy(best.values[:, 0] - best.values[:, 1])
            self.agrees[positions] = _numpy(best.indices[:, 0] == labels)
        if self.kind not in (CLASSIFICATION, REGRESSION):
            return
        partners = _others(_numpy(labels), self.random)
        if len(partners):
            kept = torch.as_tensor(partners[:, 0]), torch.as_tensor(partners[:, 1])
            wrong = labels[kept[1].to(labels.device)]
            losses = sample_losses(self.kind, logits[kept[0].to(logits.device)], wrong)
            self.null_loss.append(_numpy(losses))
            self.null_group.append(
                _numpy(wrong)
                if self.kind == CLASSIFICATION
                else np.zeros(len(wrong), dtype=np.int64)
            )

    def add_mismatched(self, dataset: Dataset) -> None:
        """The null of generation: losses of inputs paired with other samples' targets."""
        rows = subset(dataset, NULL_SAMPLES, self.scorer.seed)
        wrong = mismatched_pairs(rows, self.kind)
        if wrong is None:
            return
        losses = np.zeros(len(wrong))
        passing = batches(
            self.model, wrong, self.scorer.collator, self.scorer.batch_size, "permutation null"
        )
        with torch.no_grad():
            for positions, batch in passing:
                losses[positions] = _numpy(forward_losses(self.model, self.kind, batch))
        self.null_loss.append(losses)
        self.null_group.append(np.zeros(len(losses), dtype=np.int64))

    def measurements(self, ids: np.ndarray) -> Measurements:
        """What was measured, in the data set's order."""
        return Measurements(
            ids=ids,
            **self.columns,
            sketch=self.sketches,
            length=self.length,
            group=self.group,
            null_loss=np.concatenate(self.null_loss or [np.zeros(0)]),
            null_group=np.concatenate(self.null_group or [np.zeros(0, dtype=np.int64)]),
            confidence=self.confidence,
            agrees=self.agrees,
            classes=self.classes,
        )

    def _put(self, column: str, positions: np.ndarray, values: Tensor) -> None:
        self.columns[column][positions] = _numpy(values)

    def _reset(self) -> None:
        self.norms.total = 0.0
        if self.sketch:
            self.sketch.total = 0.0
        self.keep.clear()


def score_samples(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    quality: QualityConfig | None = None,
    reference: Dataset | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    depth: float = 1.0,
) -> QualityScores:
    """The quality of every row of `dataset` under `model` (TsqLoRA §3; formulas in `quality.py`).

    A model without adapters gets temporary ones, briefly adapted (`quality.adapt_steps` steps, 100
    where that is None) and removed after, its weights untouched; a model with LoRA adapters is
    scored as it is. `reference` holds trusted samples. `ids` are the column `id` where there is
    one, else the row numbers. `depth` below 1 is the economical mode: see `Scorer`.

    Raises:
        ModelError: the model's kind or a layer's kind is not supported.
        DataError: there is no row, or the batches hold no labels.
        TrainingError: losses or gradients are not finite.
    """
    scorer = Scorer(collator, quality or QualityConfig(), learning_rate, batch_size, seed, depth)
    require_samples(model, dataset, collator)
    with ExitStack() as stack:
        adapted = model
        if not has_lora(model):
            adapted = stack.enter_context(temporary_adapter(model, infer_kind(model)))
            steps = scorer.quality.adapt_steps
            steps = FEW if steps is None else steps
            adaptation = Adaptation(steps, learning_rate, batch_size, seed)
            adapt_briefly(adapted, dataset, collator, adaptation)
        return scorer.score(adapted, dataset, reference)


def _require_finite(ids: np.ndarray, columns: list[np.ndarray], what: str) -> None:
    bad = ~np.all([np.isfinite(column) for column in columns], axis=0)
    if bad.any():
        named = ", ".join(str(number) for number in ids[bad][:5])
        raise TrainingError(
            f"{what}: loss or gradient of {bad.sum()} of {len(bad)} samples is not finite (rows "
            f"{named}{', ...' if bad.sum() > 5 else ''}): lower training.learning_rate, or mend "
            "these rows."
        )


def _others(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Pairs (i, j) of a batch, a random j with another label for every i that has one."""
    differs = labels[:, None] != labels[None, :]
    order = np.where(differs, random.random(differs.shape), -1.0)
    partners = order.argmax(1)
    kept = differs.any(1)
    return np.stack([np.arange(len(labels)), partners], 1)[kept]


def _ids(dataset: Dataset) -> np.ndarray:
    if "id" in dataset.column_names:
        return np.asarray(dataset["id"])
    return np.arange(len(dataset))


def _numpy(tensor: Tensor) -> np.ndarray:
    result = tensor.detach().cpu()
    return result.float().numpy() if result.is_floating_point() else result.numpy()
