"""What a configuration names: its data sets, encoded for its task, and the untouched model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from tsqlora import __version__, processes
from tsqlora.artefacts import digest
from tsqlora.batches import subset
from tsqlora.config import RunConfig
from tsqlora.data import dataset_fingerprint, load_dataset, split_validation
from tsqlora.encoded import on_disk
from tsqlora.errors import ConfigError
from tsqlora.initial import InitialAdapter
from tsqlora.labels import label_notes
from tsqlora.losses import CLASSIFICATION
from tsqlora.tasks import Task, make_task
from tsqlora.trusted import joined

logger = logging.getLogger("tsqlora")

NEEDS: dict[str, list[str]] = {
    "adaptation": [
        "model",
        "tokenizer",
        "target_tokenizer",
        "quantization",
        "task",
        "data",
        "adapter.target_modules",
        "adapter.modules_to_save",
        "adapter.scale",
        "adapter.dropout",
        "adapter.init",
        "training",
        "seed",
        "quality.adapt_steps",
        "quality.fraction",
        "quality.mode",
    ],
    "scores": ["quality"],
    "sensitivity": ["ranks.sensitivity", "ranks.rule", "ranks.max_rank", "adapter.start"],
    "plan": ["ranks"],
    "training": [],
    "evaluation": ["metrics"],
}
"""What each stage depends on beside the stage before it."""
ENCODING = ["model", "tokenizer", "target_tokenizer", "task", "data"]
"""What the encoded samples depend on beside the rows."""


@dataclass(frozen=True)
class Splits:
    """Encoded data: the pool, and what there is of the others.

    The last `trusted` rows of the pool are those of `quality.reference`, where they are trained on.
    """

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None
    reference: Dataset | None = None
    trusted: int = 0

    @property
    def measured(self) -> dict[str, Dataset]:
        """The splits that metrics are taken on."""
        found = {"validation": self.validation, "test": self.test}
        return {name: rows for name, rows in found.items() if rows is not None}


class Inputs:
    """Loads each part when it is first asked for, and once.

    With a `folder` the encoded pool lies there on disk rather than in memory.

    Attributes:
        together: how many processes the training is for, which its batches depend on.
    """

    def __init__(self, config: RunConfig, folder: Path | None = None) -> None:
        self.config, self.folder, self.together = config, folder, 1

    @cached_property
    def raw(self) -> dict[str, Dataset]:
        """The data sets as loaded, by split."""
        data, reference = self.config.data, self.config.quality.reference
        splits = {"train": load_dataset(data.train, "data.train")}
        if isinstance(data.validation, str | tuple):
            splits["validation"] = load_dataset(data.validation, "data.validation")
        elif data.validation is not None:
            classes = data.target if self.config.task == CLASSIFICATION else None
            train, share = splits["train"], data.validation
            parts = split_validation(train, share, self.config.seed, classes)
            splits["train"], splits["validation"] = parts
        if data.max_train_samples is not None:
            splits["train"] = subset(splits["train"], data.max_train_samples, self.config.seed)
        if data.test is not None:
            splits["test"] = load_dataset(data.test, "data.test")
        if reference == "validation" and "validation" not in splits:
            raise ConfigError("quality.reference = validation needs data.validation to be given.")
        if reference is not None:
            trusted = splits.get("validation") if reference == "validation" else None
            splits["reference"] = trusted or load_dataset(reference, "quality.reference")
        return splits

    @cached_property
    def task(self) -> Task:
        """The task, its labels taken from the training data."""
        train = self.raw["train"]
        task = make_task(self.config, train)
        if task.kind == CLASSIFICATION and processes.is_main():
            target = str(self.config.data.target)
            for note in label_notes(train, task.columns(), target, task.labels):
                logger.warning(note)
        return task

    @cached_property
    def splits(self) -> Splits:
        """Everything encoded, so that every bad row is found before anything long starts."""
        where = {"train": "data.train", "validation": "data.validation", "test": "data.test"}
        found = {
            name: self._encode(name, rows, where.get(name, "quality.reference"))
            for name, rows in self.raw.items()
        }
        if self.config.quality.mode != "online" or "reference" not in found:
            return Splits(**found)
        trusted = found.pop("reference")
        found["train"] = joined(found["train"], trusted)
        return Splits(**found, trusted=len(trusted))

    def load(self) -> None:
        """Read and encode all data."""
        self.splits  # noqa: B018

    def _encode(self, name: str, rows: Dataset, where: str) -> Dataset:
        if name != "train" or self.folder is None:
            return self.task.encode(rows, where)
        keys = [_dig(self.config.to_dict(), key) for key in ENCODING]
        inputs = digest(__version__, keys, self.task.labels, self.fingerprints[name])
        return on_disk(self.task.encoded(rows, where), self.folder / f"{name}.arrow", inputs)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A digest of the rows of each split, and of the adapter to go on from."""
        found = {name: dataset_fingerprint(rows) for name, rows in self.raw.items()}
        if self.config.adapter.init is not None:
            found["adapter.init"] = InitialAdapter.read(self.config.adapter.init).digest()
        return found

    def base_model(self) -> PreTrainedModel:
        """The untouched model, the same every time (a fresh head is seeded)."""
        set_seed(self.config.seed)
        return self.task.load_model()

    def digest(self, stage: str) -> str:
        """Of everything that `stage` depends on: its keys, and the stages and data before it.

        Test rows are of the evaluation alone.
        """
        stages, plain, rows = list(NEEDS), self.config.to_dict(), {**self.fingerprints}
        before, test = stages.index(stage), rows.pop("test", None)
        upstream: Any = self.digest(stages[before - 1]) if before else rows
        if not before and self.together > 1:
            upstream = [upstream, self.together]
        if test is not None and stage == "evaluation":
            upstream = [upstream, test]
        return digest(stage, [_dig(plain, key) for key in NEEDS[stage]], upstream)


def _dig(mapping: Any, key: str) -> Any:
    for part in key.split("."):
        mapping = mapping[part]
    return mapping
