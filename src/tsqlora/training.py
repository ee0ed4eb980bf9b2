"""Training of the planned adapter by `transformers.Trainer`, interruptible and resumable."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from tsqlora import processes
from tsqlora.artefacts import os_errors
from tsqlora.errors import ConfigError, TrainingError
from tsqlora.global_batches import GlobalBatchTrainer
from tsqlora.selection import LengthGrouped, QualitySampler

logger = logging.getLogger("tsqlora")

DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "report_to": "none",
    "disable_tqdm": False,  # which else hangs on the verbosity of transformers
}
GROUPED = "group_by_length"
COMPLETE = "complete"
"""Marker written last into a checkpoint: one without it was cut off while being written."""


class PoolTrainer(GlobalBatchTrainer):
    """A Trainer that takes its order from `sampler` and stops at a loss that is not finite."""

    def __init__(self, sampler: QualitySampler, **settings: Any) -> None:
        super().__init__(**settings)
        self.sampler = sampler

    def passes(self) -> float:
        """Sample passes that the whole training takes."""
        return training_passes(self.args, len(self.sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        if self.args.train_sampling_strategy != GROUPED:
            return self.sampler
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped(self.sampler, lengths, batch * processes.count())

    def training_step(
        self, model: nn.Module, inputs: Any, *rest: Any, **named: Any
    ) -> torch.Tensor:
        """One step; raises TrainingError before the optimizer could take in a NaN."""
        loss = super().training_step(model, inputs, *rest, **named)
        if not math.isfinite(float(loss)):
            raise TrainingError(
                f"The training loss became {float(loss)} at step {self.state.global_step + 1}: "
                "lower training.learning_rate or look for extreme targets. "
                + _last_good(self.args.output_dir or ".")
            )
        return loss


def training_passes(arguments: TrainingArguments, samples: int) -> float:
    """Sample passes of a training by `arguments` that draws so many samples an epoch."""
    if arguments.max_steps > 0:
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
        return float(arguments.max_steps * batch * arguments.world_size)
    return samples * arguments.num_train_epochs


def training_arguments(settings: Mapping[str, Any], output: Path, seed: int) -> TrainingArguments:
    """`TrainingArguments` from the `training:` section, with our defaults below it.

    Raises:
        ConfigError: transformers refuses a value, or one would be without effect.
    """
    merged = {**DEFAULTS, **settings}
    try:
        arguments = TrainingArguments(
            output_dir=str(output),
            seed=seed,
            remove_unused_columns=False,
            label_names=["labels"],
            **merged,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {error}") from error
    if arguments.train_sampling_strategy not in ("random", GROUPED):
        raise ConfigError(
            "training.train_sampling_strategy: tsqlora draws the samples by their quality; use "
            f"{GROUPED} for fewer padded tokens, or leave it out."
        )
    if arguments.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise ConfigError(
            f"training.metric_for_best_model: {arguments.metric_for_best_model} is not measured "
            "while training; use eval_loss, or leave it out."
        )
    return arguments


def resumable_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint; half-written ones are removed with a warning."""
    while (last := get_last_checkpoint(str(folder)) if folder.is_dir() else None) is not None:
        if (Path(last) / COMPLETE).exists():
            return last
        logger.warning("%s is not complete or not finite: removed.", last)
        shutil.rmtree(last)
    return None


def run_training(trainer: PoolTrainer, resume: bool) -> None:
    """Train, or go on from the last complete checkpoint. Ctrl-C saves a checkpoint first.

    Raises:
        TrainingError: the loss is not finite.
        ConfigError: a key of `training` needs a library that is not installed.
        RunError: a checkpoint cannot be written.
        KeyboardInterrupt: after the checkpoint that Ctrl-C asked for.
    """
    folder = Path(trainer.args.output_dir or ".")
    checkpoint = resumable_checkpoint(folder) if resume else None
    if checkpoint is None and folder.exists():
        shutil.rmtree(folder)
    interrupted = InterruptCallback()
    trainer.add_callback(interrupted)
    trainer.add_callback(CompleteCallback())
    with interrupted.listening(), os_errors(folder):
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except ImportError as error:
            raise ConfigError(f"training: {error}") from error
    if interrupted.requested:
        raise KeyboardInterrupt


class InterruptCallback(TrainerCallback):
    """The first Ctrl-C saves a checkpoint after the running step and stops; the second at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT inside (in the main thread; elsewhere signals cannot be caught)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("Interrupted: saving a checkpoint after this step; again: stop at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer to save and stop."""
        if self.requested:
            control.should_save = control.should_training_stop = True


class CompleteCallback(TrainerCallback):
    """Marks a checkpoint when everything in it is written, and finite."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last callback of a save."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        parameters = [p for p in kwargs["model"].parameters() if p.requires_grad]
        finite = all(bool(p.isfinite().all()) for p in parameters)
        if state.is_world_process_zero and folder.is_dir() and finite:
            (folder / COMPLETE).touch()


def _last_good(folder: str) -> str:
    last = resumable_checkpoint(Path(folder))
    return f"The last good checkpoint is {last}." if last else "No checkpoint was written yet."
