"""A finished run: its model, metrics on any data, and its adapter in other forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import set_seed

from tsqlora import processes
from tsqlora.adapter import load_adapter
from tsqlora.artefacts import (
    atomic_folder,
    atomic_write_json,
    atomic_write_text,
    os_errors,
    read_json,
    remove_temporaries,
)
from tsqlora.config import RunConfig
from tsqlora.data import load_dataset
from tsqlora.errors import RunError
from tsqlora.export import export_adapter
from tsqlora.metrics import evaluate
from tsqlora.model_card import dropped_line, model_card
from tsqlora.run_folder import RunFolder
from tsqlora.sharded import is_sharded
from tsqlora.tasks import Task, make_task
from tsqlora.training import DEFAULTS


@dataclass(frozen=True)
class FinishedRun:
    """A trained run; its training data is not needed.

    Raises:
        RunError: there is no adapter yet.
    """

    config: RunConfig
    folder: RunFolder

    def __post_init__(self) -> None:
        if not self.folder.adapter.exists():
            raise RunError(
                f"{self.folder.path} holds no trained adapter yet: finish it by "
                f"`tsqlora train {self.folder.config} --resume`."
            )

    @classmethod
    def open(cls, folder: str | Path) -> FinishedRun:
        """The run in `folder`."""
        found = RunFolder.open(folder)
        return cls(found.load_config(), found)

    @cached_property
    def task(self) -> Task:
        """The task, with the labels that training found."""
        return make_task(self.config, None, labels=read_json(self.folder.task)["labels"])

    def model(self) -> PeftModel:
        """The base model under the adapter."""
        set_seed(self.config.seed)
        return load_adapter(self.task.load_model(), self.folder.adapter)

    def evaluate(self, splits: Mapping[str, Dataset]) -> dict[str, dict[str, float]]:
        """Metrics on encoded data sets, by name."""
        model = self.model()
        return {name: measure(self.config, self.task, model, rows) for name, rows in splits.items()}

    def evaluate_on(self, source: str) -> dict[str, float]:
        """Metrics on another data set; nothing is written."""
        rows = self.task.encode(load_dataset(source, "--data"), "--data")
        return self.evaluate({source: rows})[source]

    def export(self, format: str, out: Path) -> Path:
        """The adapter as `compact`, `padded` or `merged` in a new folder.

        Raises:
            RunError: `out` is not empty.
        """
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise RunError(f"{out} is there already and not empty: name a new folder by --out.")
        remove_temporaries(out.parent, of=out.name)
        with os_errors(out), atomic_folder(out) as folder:
            export_adapter(self.model(), folder, format)
            self.task.save_tokenizers(folder)
            if format != "merged":
                dropped = dropped_line(self.folder.scores)
                card = model_card(self.config, self.task, dropped, padded=format == "padded")
                atomic_write_text(folder / "README.md", card)
        return out


def finish(config: RunConfig, folder: RunFolder, task: Task, model: PeftModel) -> None:
    """Leave the trained adapter, and what `FinishedRun` needs beside it. In all processes."""
    if processes.is_main():
        atomic_write_json(folder.task, {"version": 1, **task.describe()})
        with atomic_folder(folder.adapter) as made:
            export_adapter(model, made)
            task.save_tokenizers(made)
            card = model_card(config, task, dropped_line(folder.scores))
            atomic_write_text(made / "README.md", card)
    elif is_sharded(model):  # its shards are wanted
        with TemporaryDirectory() as unused:
            export_adapter(model, unused)


def measure(config: RunConfig, task: Task, model: nn.Module, rows: Dataset) -> dict[str, float]:
    """The configured metrics of any model on encoded rows, where a training would have the model:
    on the accelerator, if there is one and `training.use_cpu` does not forbid it; by default as
    many rows at once as it takes."""
    if torch.accelerator.is_available() and not config.training.get("use_cpu"):
        model.to(torch.accelerator.current_accelerator())
    settings = {**DEFAULTS, **config.training}
    at_once = settings.get("per_device_eval_batch_size", settings["per_device_train_batch_size"])
    return evaluate(task, model, rows, config.metrics or task.default_metrics, int(at_once))
