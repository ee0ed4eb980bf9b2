"""One pass over the pool: measure every sample into parts on disk, then score them all."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from tsqlora import processes
from tsqlora.adaptation import FEW, Adaptation, adapt_briefly
from tsqlora.artefacts import digest
from tsqlora.batches import (
    Collator,
    Pool,
    evaluating,
    forward_losses,
    progress,
    require_samples,
    subset,
)
from tsqlora.config import QualityConfig, QualityWeights
from tsqlora.errors import DataError, TrainingError
from tsqlora.lora_layers import has_lora, temporary_adapter
from tsqlora.losses import CLASSIFICATION, REGRESSION, infer_kind, sample_losses
from tsqlora.measuring import Columns, Meter, Wanted, as_numpy
from tsqlora.memory import Halving
from tsqlora.mismatch import mismatched_pairs
from tsqlora.parts import Parts, StoredSketches
from tsqlora.per_sample_grads import PROBED
from tsqlora.quality import Measurements, QualityScores, quality_scores
from tsqlora.selection import draw

NULL_SAMPLES = 500
"""Mismatched pairs that make the null where it takes passes of its own (generation)."""
FINITE = ("loss", "gradient_norm")
"""What has to be finite of every sample."""
PART = 16
"""Batches a part: what an interruption loses at most."""

Null = tuple[np.ndarray, np.ndarray]
"""Losses of wrong targets (M), and the class that each names (M)."""


@dataclass(frozen=True)
class Scorer:
    """How a pool is measured.

    Attributes:
        collator: turns rows into a batch with `labels`.
        quality: the `quality` section of the configuration.
        learning_rate: η of preset `paper`.
        batch_size: of the longest samples, how many come in a batch; of shorter ones more do, and
            fewer of all once memory has run out.
        seed: of the draws and the null.
    """

    collator: Collator
    quality: QualityConfig = field(default_factory=QualityConfig)
    learning_rate: float = 1e-3
    batch_size: int = 32
    seed: int = 0

    @property
    def wanted(self) -> Wanted:
        """What is measured: the terms whose weight is not 0."""
        quality = self.quality
        return Wanted(
            tuple(f.name for f in fields(QualityWeights) if getattr(quality.weights, f.name)),
            self.learning_rate if quality.preset == "paper" else None,
            quality.lookahead,
            quality.depth,
            self.seed,
        )

    def passes(self, kind: str, samples: int) -> float:
        """Passes it takes to score so many samples; a forward alone counts ½."""
        null = 0 if kind in (CLASSIFICATION, REGRESSION) else min(samples, NULL_SAMPLES)
        return 0.5 * (self.wanted.halves * samples + null)

    def score(
        self, model: nn.Module, dataset: Dataset, reference: Dataset | None = None
    ) -> QualityScores:
        """Quality scores under `model` as it is: adapted already, LoRA factors active."""
        with TemporaryDirectory(prefix="tsqlora-") as folder:
            self.measure(model, dataset, reference, Path(folder), share=(0, 1))
            return self.scores(model, dataset, reference, Path(folder))

    def measure(
        self,
        model: nn.Module,
        dataset: Dataset,
        reference: Dataset | None,
        folder: Path,
        inputs: str = "",
        share: tuple[int, int] | None = None,
    ) -> None:
        """Measure the samples into `folder`, or go on doing so if its parts are of these `inputs`.

        One forward of every sample, a backward and a forward after its own step if wanted. Of
        several processes each takes its `share`, every so many-th part from the first on.

        Raises:
            DataError: there is no sample, or the batches hold no labels.
            ModelError: the model's kind or a layer's kind is not supported, or memory is too small.
        """
        if len(dataset) == 0:
            raise DataError("There is no sample to score: the data set is empty.")
        share = share or (processes.index(), processes.count())
        key = digest(inputs, self.batch_size, len(dataset), asdict(self.wanted))
        with evaluating(model):
            for what, rows in _named(dataset, reference):
                parts = Parts(folder / what, len(rows))
                if share[0] == 0:
                    parts.prepare(key)
                if share[1] > 1:
                    processes.wait()
                self._fill(parts, model, rows, f"{what} scores", share)

    def scores(
        self, model: nn.Module, dataset: Dataset, reference: Dataset | None, folder: Path
    ) -> QualityScores:
        """The scores from what was measured into `folder`."""
        pool, *trusted = (
            self._measurements(Parts(folder / what, len(rows)), model, rows, what == "quality")
            for what, rows in _named(dataset, reference)
        )
        scores = quality_scores(pool, self.quality, *trusted)
        selected = np.zeros(len(scores.ids), dtype=bool)
        selected[draw(scores.probability, self.quality.fraction, self.seed)] = True
        return replace(scores, selected=selected)

    def _fill(
        self, parts: Parts, model: nn.Module, rows: Dataset, what: str, share: tuple[int, int]
    ) -> None:
        pool = Pool(model, rows, self.collator, self.batch_size)
        meter = Meter(model, infer_kind(model), self.wanted)
        meter.halving.halvings = parts.halvings
        there, (first, every) = parts.there(), share
        numbers = [n for n in range(first, -(-len(pool.plan) // PART), every) if n not in there]
        if not numbers:
            return
        _, batch = next(pool.take(pool.plan[0][:PROBED]))
        meter.prepare(batch)
        chunks = {n: pool.plan[PART * n : PART * (n + 1)] for n in numbers}
        ahead = np.concatenate([np.concatenate(chunk) for chunk in chunks.values()])
        with progress(pool.tokens, ahead, what, hidden=first > 0) as passed:
            for number, chunk in chunks.items():
                measured: list[Columns] = []
                for positions in chunk:
                    for places, batch in pool.take(positions):
                        measured.append({"position": places, **meter.measure(batch)})
                    passed(positions)
                columns = {k: np.concatenate([m[k] for m in measured]) for k in measured[0]}
                parts.write(number, columns, meter.halving.halvings)

    def _measurements(
        self, parts: Parts, model: nn.Module, rows: Dataset, null: bool
    ) -> Measurements:
        """What was measured, in the data set's order; wrong targets' losses only with `null`."""
        kind, names = infer_kind(model), parts.names
        columns = {
            name: parts.column(name) if name in names else np.full(len(rows), np.nan)
            for name in ("loss", "gradient_norm", "loss_reduction")
        }
        _require_finite(_ids(rows), [c for n, c in columns.items() if n in FINITE and n in names])
        nothing = np.zeros(0), np.zeros(0, dtype=np.int64)
        found = self._null(parts, kind, model, rows) if null else nothing
        group = parts.column("label") if kind == CLASSIFICATION else np.zeros(len(rows))
        width = next(parts.blocks("output"))[1].shape[1] if kind == CLASSIFICATION else None
        return Measurements(
            ids=_ids(rows),
            **columns,
            sketch=StoredSketches(parts) if "sketch" in names else np.zeros((len(rows), 0)),
            length=parts.column("length").astype(np.int64),
            group=group.astype(np.int64),
            null_loss=found[0],
            null_group=found[1],
            **_predictions(parts, group) if kind == CLASSIFICATION else {},
            classes=width,
        )

    def _null(self, parts: Parts, kind: str, model: nn.Module, rows: Dataset) -> Null:
        if kind not in (CLASSIFICATION, REGRESSION):
            losses = self._mismatched(model, kind, rows)
            return losses, np.zeros(len(losses), dtype=np.int64)
        labels = parts.column("label")
        partners = others(labels, np.random.default_rng(self.seed))
        losses = np.full(len(labels), np.nan)
        for positions, outputs in parts.blocks("output"):
            wrong = torch.from_numpy(labels[partners[positions]])
            wrong = wrong.long() if kind == CLASSIFICATION else wrong.float()
            losses[positions] = as_numpy(sample_losses(kind, torch.tensor(outputs), wrong))
        real = labels[partners] != labels
        group = labels[partners][real].astype(np.int64)
        return losses[real], group if kind == CLASSIFICATION else np.zeros_like(group)

    def _mismatched(self, model: nn.Module, kind: str, dataset: Dataset) -> np.ndarray:
        """The null of generation: losses of inputs paired with other samples' targets."""
        wrong = mismatched_pairs(subset(dataset, NULL_SAMPLES, self.seed), kind)
        if wrong is None:
            return np.zeros(0)
        losses = np.zeros(len(wrong))
        pool = Pool(model, wrong, self.collator, self.batch_size)
        halving = Halving()
        with evaluating(model), torch.no_grad():
            for planned in pool.plan:
                for positions, batch in pool.take(planned):
                    found = halving(lambda piece: forward_losses(model, kind, piece), batch)
                    losses[positions] = np.concatenate([as_numpy(each) for each in found])
        return losses


def score_samples(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    quality: QualityConfig | None = None,
    reference: Dataset | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> QualityScores:
    """The quality of every row of `dataset` under `model` (TsqLoRA §3; formulas in `quality.py`).

    A model without adapters gets temporary ones, briefly adapted (`quality.adapt_steps` steps, 100
    where that is None) and removed after, its weights untouched; a model with LoRA adapters is
    scored as it is. `reference` holds trusted samples. `ids` are the column `id` where there is
    one, else the row numbers. Batches take as much memory as `batch_size` of the longest samples,
    and are halved when memory runs out. What is measured waits in a temporary folder, about 2 kB a
    sample.

    Raises:
        ModelError: the model's kind or a layer's kind is not supported.
        DataError: there is no row, or the batches hold no labels.
        TrainingError: losses or gradients are not finite.
    """
    scorer = Scorer(collator, quality or QualityConfig(), learning_rate, batch_size, seed)
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


def _predictions(parts: Parts, labels: np.ndarray) -> dict[str, np.ndarray]:
    """How sure the model is of its first class, and whether the label is that class (N each)."""
    confidence, agrees = np.zeros(len(labels)), np.zeros(len(labels), dtype=bool)
    for positions, outputs in parts.blocks("output"):
        best = torch.tensor(outputs).topk(2)
        confidence[positions] = (best.values[:, 0] - best.values[:, 1]).numpy()
        agrees[positions] = best.indices[:, 0].numpy() == labels[positions]
    return {"confidence": confidence, "agrees": agrees}


def _require_finite(ids: np.ndarray, columns: list[np.ndarray]) -> None:
    bad = ~np.all([np.isfinite(column) for column in columns], axis=0)
    if bad.any():
        named = ", ".join(str(number) for number in ids[bad][:5])
        raise TrainingError(
            f"Loss or gradient of {bad.sum()} of {len(bad)} samples is not finite (rows "
            f"{named}{', ...' if bad.sum() > 5 else ''}): lower training.learning_rate, or mend "
            "these rows."
        )


def others(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each of N samples another one, drawn among those of another label; itself if none is."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    first, last = (
        np.searchsorted(ordered, labels, "left"),
        np.searchsorted(ordered, labels, "right"),
    )
    different = len(labels) - (last - first)
    place = (random.random(len(labels)) * different).astype(np.int64)
    place += np.where(place >= first, last - first, 0)
    return np.where(
        different > 0, order[np.minimum(place, len(labels) - 1)], np.arange(len(labels))
    )


def _named(dataset: Dataset, reference: Dataset | None) -> list[tuple[str, Dataset]]:
    trusted = [] if reference is None else [("reference", reference)]
    return [("quality", dataset), *trusted]


def _ids(dataset: Dataset) -> np.ndarray:
    if "id" in dataset.column_names:
        return np.asarray(dataset["id"])
    return np.arange(len(dataset))
