"""Training of the planned adapter by `transformers.Trainer`, interruptible and resumable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from tsqlora import processes
from tsqlora.artefacts import remove
from tsqlora.checkpoints import train_from, whole_checkpoints
from tsqlora.errors import ConfigError, TrainingError
from tsqlora.global_batches import GlobalBatchTrainer
from tsqlora.reported import Reported
from tsqlora.selection import LengthGrouped, QualitySampler
from tsqlora.zero_settings import check_by_deepspeed, deepspeed_settings

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


class PoolTrainer(GlobalBatchTrainer):
    """A Trainer that takes its order from `sampler` and stops at a loss that is not finite."""

    def __init__(
        self, sampler: QualitySampler, reported: Reported | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.sampler, self.reported = sampler, reported or Reported()

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """As the Trainer's, to all that `report_to` names; what is `reported` beside the loss."""
        if "loss" in logs:
            logs = {**logs, **self.reported.beside(self.state.log_history)}
        super().log(logs, *rest, **named)

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
    if (zero := deepspeed_settings(settings)) is not None:
        merged["deepspeed"] = zero
    if processes.count() > 1 and not torch.accelerator.is_available():
        merged["use_cpu"] = True  # without which transformers sees one process
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
    if zero is not None:
        check_by_deepspeed(arguments.hf_deepspeed_config)
    if arguments.train_sampling_strategy not in ("random", GROUPED):
        raise ConfigError(
            "training.train_sampling_strategy: tsqlora draws the samples by their quality; use "
            f"{GROUPED} for fewer padded tokens, or leave it out."
        )
    if arguments.save_only_model:
        raise ConfigError(
            "training.save_only_model leaves out what --resume needs; for no checkpoints at all "
            "use save_strategy: 'no'."
        )
    if arguments.max_steps == 0:
        raise ConfigError("training.max_steps: 0 trains nothing; leave it out to go by epochs.")
    if arguments.resume_from_checkpoint:
        raise ConfigError("training.resume_from_checkpoint: `tsqlora train --resume` does that.")
    return arguments


def run_training(trainer: PoolTrainer, checkpoint: Path | None, events: Path) -> None:
    """Train, or go on from `checkpoint`; TensorBoard's events, where they are wanted, in `events`.

    Raises:
        TrainingError: the loss is not finite.
        ConfigError: a key of `training` needs a library that is not installed.
        RunError: a checkpoint cannot be written.
        KeyboardInterrupt: after the checkpoint that Ctrl-C or SIGTERM asked for.
    """
    if checkpoint is None and processes.is_main():
        remove(events)  # of a training that is not gone on with
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(events)
    try:
        train_from(trainer, checkpoint)
    except ImportError as error:
        raise ConfigError(f"training: {error}") from error


def _last_good(folder: str) -> str:
    whole, _ = whole_checkpoints(Path(folder))
    return (
        f"The last good checkpoint is {whole[-1]}." if whole else "No checkpoint was written yet."
    )
