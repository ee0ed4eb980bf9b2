"""Mistakes that only the model or the Trainer can show, found before anything long starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer

from tsqlora import processes
from tsqlora.allocation import check_ranks
from tsqlora.batches import Collator, Pool, evaluating
from tsqlora.config import METRICS, QualityWeights, RunConfig
from tsqlora.errors import ConfigError, ModelError
from tsqlora.inputs import Splits
from tsqlora.lora_layers import lora_modules
from tsqlora.losses import CLASSIFICATION, REGRESSION, target_lengths
from tsqlora.online_training import refuse_shards
from tsqlora.per_sample_grads import PROBED, separable
from tsqlora.quantized import Quantization
from tsqlora.recording import Recorder, sample_weights, summed_loss
from tsqlora.selection import draw_size
from tsqlora.starting import initial_adapter
from tsqlora.training import training_arguments
from tsqlora.trials import try_out
from tsqlora.zero_settings import deepspeed_settings


def check_config(config: RunConfig) -> None:
    """Check what needs neither data nor model.

    Raises:
        ConfigError: what is asked for cannot be had here.
        ModelError: the adapter to go on from cannot be read.
    """
    if (quantization := Quantization.of(config)) is not None:
        quantization.check()
    initial_adapter(config)
    if deepspeed_settings(config.training) is None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise ConfigError(
                "DeepSpeed's configuration belongs into training.deepspeed: start by torchrun, or "
                "by accelerate without --use_deepspeed (docs/parallel.md)."
            )
    elif processes.count() == 1:
        raise ConfigError(
            "training.deepspeed shards over several processes, and there is one: start more, "
            "`torchrun --nproc_per_node 2 -m tsqlora ...`, or leave it out."
        )
    if config.ranks.dynamic:
        _check_movable(config)
    if config.ranks.compact:
        _check_compactable(config)
    _check_best_metric(config)


def _check_best_metric(config: RunConfig) -> None:
    """What a Trainer measures as it trains: the loss, and what costs no more (`in_training`)."""
    asked, measured = config.training.get("metric_for_best_model"), ["loss"]
    if config.task in (CLASSIFICATION, REGRESSION):
        measured += config.metrics or METRICS[config.task]
    if asked is not None and str(asked).removeprefix("eval_") not in measured:
        raise ConfigError(
            f"training.metric_for_best_model: {asked} is not measured while training; use one of "
            f"{', '.join(measured)}, or leave it out."
        )


def _check_movable(config: RunConfig) -> None:
    if (optimizer := str(config.training.get("optim", ""))).startswith("schedule_free"):
        raise ConfigError(
            f"training.optim: {optimizer} keeps a second copy of the weights, which would draw "
            "ranks back that moved: use another, such as adamw_torch, or ranks.dynamic: false."
        )


def _check_compactable(config: RunConfig) -> None:
    if processes.count() > 1:
        raise ConfigError("ranks.compact is for a single process: leave it out.")
    if config.training.get("load_best_model_at_end"):
        raise ConfigError(
            "training.load_best_model_at_end would load a checkpoint of other shapes after "
            "ranks.compact: leave out one of the two."
        )
    if "8bit" in str(optimizer := config.training.get("optim", "")):
        raise ConfigError(
            f"training.optim: {optimizer} keeps its state in 8 bits, which ranks.compact cannot "
            "cut: leave out one of the two."
        )


def check_recordable(model: PeftModel, kind: str, dataset: Dataset, collator: Collator) -> None:
    """Check on the longest samples that a training can tell them apart (quality.mode: online).

    Raises:
        ModelError: it cannot, or the model cannot take them at all.
    """
    try_out(model, kind, dataset, collator)
    Recorder(model)
    longest = Pool(model, dataset, collator, PROBED)
    _, batch = next(longest.take(longest.plan[0][:PROBED]))
    with evaluating(model):
        if not separable(model, kind, batch):
            raise ModelError(
                f"{type(model.get_base_model()).__name__} has a layer in which a batch's samples "
                "cannot be told apart, so a training cannot score them: use quality.mode: upfront."
            )
        with torch.no_grad():
            found, lengths = model(**batch), target_lengths(kind, batch["labels"])
            total = summed_loss(kind, found.logits, batch["labels"])
            sample_weights(lengths, total, found.loss, float(lengths.sum()))


def check_run(config: RunConfig, model: PeftModel, splits: Splits, collator: Collator) -> None:
    """Check `ranks` against the adapted modules, and `training` by making a Trainer of it.

    With quality.mode: online also that the training can measure the terms that it is asked for.

    Raises:
        ConfigError: ranks that a module cannot take, a budget that is too small, or what the
            libraries refuse of `training`.
        ModelError: weights that are not finite.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ModelError(f"model: {config.model} holds NaN or infinity in {name}; mend it.")
    ranks = config.ranks
    shapes = {module.name: module.shape for module in lora_modules(model)}
    check_ranks(shapes, ranks.mean_rank, ranks.parameters, ranks.min_rank, ranks.max_rank)
    with tempfile.TemporaryDirectory(prefix="tsqlora-") as folder:
        settings = {**config.training, "deepspeed": None}  # its engine is for all processes
        arguments = training_arguments(settings, Path(folder), config.seed)
        drawn = draw_size(len(splits.train), config.quality.fraction)
        if arguments.dataloader_drop_last and drawn < arguments.train_batch_size:
            raise ConfigError(
                f"training.dataloader_drop_last drops all: {drawn} samples an epoch fill no batch "
                f"of {arguments.train_batch_size}. Leave it out or lower the batch size."
            )
        try:
            trainer = Trainer(
                model, arguments, train_dataset=splits.train, eval_dataset=splits.validation
            )
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
        except Exception as error:  # whatever the libraries behind a key raise, the user mends it
            raise ConfigError(f"training: {error}") from error
    if config.quality.mode == "online":
        sharded = trainer.is_fsdp_enabled, bool(config.training.get("deepspeed"))
        refuse_shards(arguments, *sharded)
        if config.quality.weights != QualityWeights():
            check_recordable(model, config.task, splits.train, collator)
