"""Brief adaptation: steps on rows drawn alike, so that losses and gradients tell of the samples.

At a fresh classification head or B = 0 a sample's gradient is mostly noise. The final adapter
starts from the adapted one, so these steps are the first part of the training (docs/choices.md).
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments, set_seed

from tsqlora import processes
from tsqlora.artefacts import remove
from tsqlora.batches import Collator, model_columns
from tsqlora.checkpoints import last_checkpoint, train_from
from tsqlora.errors import TrainingError
from tsqlora.global_batches import GlobalBatchTrainer
from tsqlora.lora_layers import load_trainable_state, trainable_state
from tsqlora.losses import infer_kind
from tsqlora.memory import out_of_memory
from tsqlora.trials import try_out

logger = logging.getLogger("tsqlora")

FEW, MOST = 100, 500
"""Steps where the training's length is not known; steps after which no more is to be learnt of the
samples (benchmarks/LOG.md)."""
SAVES = 5
"""Checkpoints over an adaptation, of which the last is kept."""
_KEPT = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "weight_decay"),
    *("gradient_accumulation_steps", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("bf16", "fp16", "tf32", "use_cpu", "dataloader_num_workers", "disable_tqdm"),
    *("label_smoothing_factor", "max_grad_norm", "train_sampling_strategy"),
)
"""Keys of the training that hold for the adaptation too."""


def default_steps(training_steps: int) -> int:
    """As many steps on the whole pool as come after on drawn samples, at most `MOST`."""
    return min(training_steps, MOST)


@dataclass(frozen=True)
class Adaptation:
    """How long the adaptation is, and at which rate.

    The rate rises over `warmup` steps (None: a tenth), but never over all of them, and falls
    linearly to its part `ends_at` (1: it stays), where the training goes on. `settings` are further
    keys of `TrainingArguments`, those of the training.
    """

    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    ends_at: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    warmup: int | None = None

    @property
    def batch(self) -> int:
        """Samples an optimizer step."""
        return self.batch_size * int(self.settings.get("gradient_accumulation_steps", 1))

    def halved(self) -> Adaptation:
        """The same steps in batches of half the size, twice as many of them one after the other."""
        accumulated = 2 * int(self.settings.get("gradient_accumulation_steps", 1))
        settings = {**self.settings, "gradient_accumulation_steps": accumulated}
        return replace(self, batch_size=self.batch_size // 2, settings=settings)

    def arguments(self, folder: str | Path, saving: bool) -> TrainingArguments:
        """For a Trainer that writes into `folder` alone: checkpoints as the training does, if
        `saving`, where that goes by steps, else five over all steps.
        """
        save_steps = math.ceil(self.steps / SAVES)
        if self.settings.get("save_strategy") == "steps":
            save_steps = self.settings.get("save_steps", save_steps)
        rate: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup"}
        if self.ends_at < 1:
            end = {"lr_end": self.ends_at * self.learning_rate, "power": 1.0}
            rate = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": end}
        warmup = max(1, self.steps // 10) if self.warmup is None else self.warmup
        kept = {k: v for k, v in self.settings.items() if k in _KEPT}
        if processes.count() > 1 and not torch.accelerator.is_available():
            kept["use_cpu"] = True  # without which transformers sees one process
        return TrainingArguments(
            output_dir=folder,
            max_steps=self.steps,
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            warmup_steps=min(warmup, self.steps - 1),
            seed=self.seed,
            save_strategy="steps" if saving else "no",
            save_steps=save_steps,
            save_total_limit=1,
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # `model_columns` spares those that collators read
            **{"disable_tqdm": False, **kept, **rate},
        )


def adapt_briefly(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    adaptation: Adaptation,
    folder: Path | None = None,
) -> None:
    """Train what is trainable in `model` on `dataset`, drawn uniformly, in place.

    One pass a sample and step. With a `folder` it goes on from the last checkpoint there, if there
    is one, and leaves its own there. When memory runs out it begins again in smaller batches.

    Raises:
        ModelError: the model cannot take the samples.
        TrainingError: the parameters are no longer finite.
        KeyboardInterrupt: with a `folder`, after the checkpoint that Ctrl-C or SIGTERM asked for.
    """
    try_out(model, infer_kind(model), dataset, collator)
    if adaptation.steps <= 0:
        return
    before = trainable_state(model)
    while True:
        try:
            _adapt(model, dataset, collator, adaptation, folder)
            break
        except RuntimeError as error:
            if adaptation.batch_size % 2 or not out_of_memory(error):
                raise
        adaptation = adaptation.halved()
        logger.warning("Out of memory: the adaptation takes %d at once.", adaptation.batch_size)
        clear_device_cache(garbage_collection=True)
        load_trainable_state(model, before)
        for checkpoint in folder.glob("checkpoint-*") if folder else ():
            remove(checkpoint)
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        if folder is not None:
            remove(folder)  # nothing to go on from
        raise TrainingError(
            "The brief adaptation diverged: lower training.learning_rate or look for extreme "
            "targets."
        )


def _adapt(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    adaptation: Adaptation,
    folder: Path | None,
) -> None:
    with tempfile.TemporaryDirectory(prefix="tsqlora-") as temporary:
        saving = folder is not None and adaptation.settings.get("save_strategy") != "no"
        arguments = adaptation.arguments(folder or temporary, saving)
        set_seed(adaptation.seed)
        rows = model_columns(model, dataset, collator)
        trainer = GlobalBatchTrainer(
            "brief adaptation",
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
        )
        if folder is None:
            trainer.train()
        else:
            train_from(trainer, last_checkpoint(folder))
