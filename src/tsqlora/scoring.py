"""One pass over the pool: measure every sample into parts on disk, then score them all."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from tsqlora import processes
from tsqlora.artefacts import atomic_write_json, digest, read_json
from tsqlora.asking import Asking, asked, own_losses
from tsqlora.batches import (
    Collator,
    Pool,
    evaluating,
    passing,
)
from tsqlora.calibration import drawn_whole, measured_whole
from tsqlora.collected import kin, numbers, predictions
from tsqlora.columns import blocks_of, column, release
from tsqlora.config import QualityConfig, QualityWeights
from tsqlora.data import numbered
from tsqlora.errors import DataError
from tsqlora.fitting import fitting_batch_size
from tsqlora.losses import CLASSIFICATION, infer_kind
from tsqlora.measurements import Measurements
from tsqlora.measuring import Columns, Direction, Meter, Wanted
from tsqlora.null import FREE, NULL_SAMPLES, null_of_outputs
from tsqlora.parts import Measured, Parts, StoredSketches
from tsqlora.per_sample_grads import PROBED
from tsqlora.quality import QualityScores, quality_scores
from tsqlora.selection import drawn

PART = 16
"""Batches a part: what an interruption loses at most."""
MOST_SUMS = 64
"""Parts of a reference at most: each holds sums of gradients, and so is as large as the adapter."""
BATCH = "batch.json"
"""The batch size that was found."""
POOL, REFERENCE = "quality", "reference"
"""Folders of what is measured."""


@dataclass(frozen=True)
class Scorer:
    """How a pool is measured.

    Attributes:
        collator: turns rows into a batch with `labels`.
        quality: the `quality` section of the configuration.
        learning_rate: η of preset `paper`.
        batch_size: of the longest samples, how many come in a batch; of shorter ones more do, and
            fewer of all once memory has run out. None: found by trial (`fitting.py`).
        seed: of the draws and the null.
        bf16: whether forwards run under autocast to bfloat16, as the training's do.
    """

    collator: Collator
    quality: QualityConfig = field(default_factory=QualityConfig)
    learning_rate: float = 1e-3
    batch_size: int | None = None
    seed: int = 0
    bf16: bool = False

    @property
    def wanted(self) -> Wanted:
        """What is measured of the pool: the terms whose weight is not 0."""
        quality = self.quality
        return Wanted(
            tuple(f.name for f in fields(QualityWeights) if getattr(quality.weights, f.name)),
            self.learning_rate if quality.preset == "paper" else None,
            quality.lookahead,
            quality.depth,
            self.seed,
        )

    @property
    def wanted_of_reference(self) -> Wanted:
        """The losses, and the mean unit gradient if convergence is towards it."""
        wanted = self.wanted
        if "convergence" not in wanted.terms:
            return replace(wanted, terms=())
        return replace(wanted, terms=("convergence",), sums_units=True)

    def passes(
        self, kind: str, samples: int, trusted: int = 0, folder: Path | None = None
    ) -> float:
        """Passes it takes to score so many samples and a reference; a forward alone counts ½.

        Once they are measured into `folder`, with the pairs of texts that were asked for in it.
        """
        trusted = trusted if self.quality.preset == "default" else 0
        null = min(samples, NULL_SAMPLES) if self._asks(kind) else 0
        null = max(null, len(asked(folder)[0])) if folder else null
        halves = self.wanted.halves * samples + self.wanted_of_reference.halves * trusted
        if self.wanted.economical:
            more = replace(self.wanted, whole=True).halves - self.wanted.halves
            halves += more * measured_whole(samples)
        return 0.5 * (halves + null)

    def _asks(self, kind: str) -> bool:
        """Whether targets are asked for after others' inputs; preset paper judges none."""
        return kind not in FREE and self.quality.preset == "default"

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

        One forward of every sample, a backward and a forward after its own step if wanted; first
        those of the reference, so that the pool's gradients meet its mean one in the same pass;
        last texts after others' inputs (`asking.py`). Of several processes each takes its `share`,
        every so many-th part from the first on.

        Raises:
            DataError: there is no sample, or the batches hold no labels.
            ModelError: the model's kind or a layer's kind is not supported, or memory is too small.
        """
        if len(dataset) == 0:
            raise DataError("There is no sample to score: the data set is empty.")
        if reference is not None and len(reference) == 0:
            raise DataError("The reference is empty: give trusted samples, or none at all.")
        share = share or (processes.index(), processes.count())
        direction: Direction | None = None
        with evaluating(model), self.autocast(model):
            batch_size = self._found(model, dataset, folder, inputs, share)
            for what, rows in self._named(dataset, reference):
                wanted = self.wanted_of_reference if what == REFERENCE else self.wanted
                parts = Parts(folder / what, len(rows))
                key = digest(inputs, batch_size, self.bf16, len(dataset), asdict(wanted))
                if share[0] == 0:
                    parts.prepare(key)
                if share[1] > 1:
                    processes.wait()
                pool = Pool(model, rows, self.collator, batch_size)
                ways = [replace(wanted, whole=True), wanted] if wanted.economical else [wanted]
                meters = [Meter(model, infer_kind(model), way, direction) for way in ways]
                self._fill(parts, pool, meters, share)
                if wanted.sums_units:
                    if share[1] > 1:
                        processes.wait()  # until all parts are there
                    direction = parts.summed()
            if self._asks(kind := infer_kind(model)):
                how = kind, dataset, self.collator, batch_size, self.seed, share
                Asking(model, *how).ask(folder, key, lambda: own_losses(parts))

    def seconds_before(self, folder: Path) -> float:
        """The seconds that the processes took, side by side, for what is in `folder`."""
        measured = sum(Parts(part, 0).seconds for part in folder.glob("*") if part.is_dir())
        return measured / processes.count()

    def scores(
        self, model: nn.Module, dataset: Dataset, reference: Dataset | None, folder: Path
    ) -> QualityScores:
        """The scores from what was measured into `folder`."""
        scores = self._judged(model, dataset, reference, folder)
        selected = drawn(scores.probability, self.quality.fraction, self.seed)
        return replace(scores, selected=selected)

    def _judged(
        self, model: nn.Module, dataset: Dataset, reference: Dataset | None, folder: Path
    ) -> QualityScores:
        with self.autocast(model):
            *trusted, pool = (
                self.measurements(Parts(folder / what, len(rows)), model, rows, what == POOL)
                for what, rows in self._named(dataset, reference)
            )
        return quality_scores(pool, self.quality, *trusted)

    def autocast(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside, forwards are in the precision of the training's."""
        device = next(model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext()

    def _found(
        self, model: nn.Module, dataset: Dataset, folder: Path, inputs: str, share: tuple[int, int]
    ) -> int:
        """The batch size, the same in all processes and whenever scoring goes on."""
        if self.batch_size is not None:
            return self.batch_size
        note, key = folder / BATCH, digest(inputs, self.bf16, len(dataset), asdict(self.wanted))
        if share[0] == 0 and not (note.exists() and read_json(note).get("inputs") == key):
            most = replace(self.wanted, whole=self.wanted.economical)
            found = fitting_batch_size(model, dataset, self.collator, most)
            atomic_write_json(note, {"inputs": key, "batch_size": found})
        if share[1] > 1:
            processes.wait()
        return int(read_json(note)["batch_size"])

    def _batches(self, pool: Pool, meters: list[Meter]) -> list[tuple[Meter, np.ndarray]]:
        """All batches, each with its meter; of two meters the first is for those measured whole."""
        if len(meters) == 1:
            return [(meters[0], positions) for positions in pool.plan]
        whole = drawn_whole(len(pool.tokens), self.seed)
        rest = np.setdiff1d(np.arange(len(pool.tokens)), whole)
        return [
            (meter, positions)
            for meter, those in zip(meters, (whole, rest), strict=True)
            for positions in pool.planned(those)
        ]

    def _fill(self, parts: Parts, pool: Pool, meters: list[Meter], share: tuple[int, int]) -> None:
        planned, main = self._batches(pool, meters), meters[0]
        main.halving.halvings = parts.halvings
        size = PART
        if main.wanted.sums_units:  # each part leaves sums as large as the adapter
            size = max(PART, -(-len(planned) // MOST_SUMS))
        there, (first, every) = parts.there(), share
        numbered = [n for n in range(first, -(-len(planned) // size), every) if n not in there]
        if not numbered:
            return
        _, batch = next(pool.take(pool.plan[0][:PROBED]))
        main.prepare(batch)
        for other in meters[1:]:
            other.single, other.halving = main.single, main.halving
        chunks = {n: planned[size * n : size * (n + 1)] for n in numbered}
        ahead = [places for chunk in chunks.values() for _, places in chunk]
        with passing(pool.tokens, ahead, f"{parts.folder.name} scores", hidden=first > 0) as passed:
            began = time.perf_counter()
            for number, chunk in chunks.items():
                measured: list[Columns] = []
                for meter, positions in chunk:
                    for places, batch in pool.take(positions):
                        measured.append({"position": places, **meter.measure(batch)})
                    passed(positions)
                began, before = time.perf_counter(), began
                halvings, units = main.halving.halvings, main.take_units()
                parts.write(number, measured, halvings, units, began - before)
                release()

    def measurements(
        self, parts: Measured, model: nn.Module, rows: Dataset, null: bool
    ) -> Measurements:
        """What was measured, in the data set's order; wrong targets' losses only with `null`."""
        kind, names = infer_kind(model), parts.names
        whole = drawn_whole(len(rows), self.seed)
        columns = numbers(parts, _ids(rows), whole, self.wanted.first_order)
        found, owners, own = (np.zeros(0), np.zeros(0, dtype=np.int32)), None, np.zeros(0)
        if null and kind in FREE:
            found = null_of_outputs(parts, kind, self.seed)
        elif null and self._asks(kind):
            assert isinstance(parts, Parts)
            owners, losses = asked(parts.folder.parent)
            found, own = (losses, np.zeros(len(losses), np.int32)), own_losses(parts)[owners]
        group = parts.column("label") if kind == CLASSIFICATION else np.zeros(len(rows), np.int32)
        width = next(parts.blocks("output"))[1].shape[1] if kind == CLASSIFICATION else None
        return Measurements(
            ids=_ids(rows),
            **columns,
            sketch=StoredSketches(parts) if "sketch" in names else np.zeros((len(rows), 0)),
            alignment=parts.column("alignment") if "alignment" in names else None,
            length=parts.column("length"),
            group=group,
            null_loss=found[0],
            null_group=found[1],
            null_owner=owners,
            null_own=own,
            **predictions(parts, kind),
            classes=width,
            kin=kin(parts, kind),
        )

    def _named(self, dataset: Dataset, reference: Dataset | None) -> list[tuple[str, Dataset]]:
        """The reference, of which preset paper knows nothing, and the pool."""
        if reference is None or self.quality.preset == "paper":
            return [(POOL, dataset)]
        return [(REFERENCE, reference), (POOL, dataset)]


def _ids(dataset: Dataset) -> np.ndarray:
    found = numbered(dataset)
    if found is None:
        found = column(len(dataset), np.int64)
        for rows in blocks_of(len(dataset)):
            found[rows] = np.arange(rows.start, rows.stop)
    return found
