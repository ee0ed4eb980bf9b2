"""Plain LoRA on all data, as PEFT and the Trainer give it: what every claim is measured against."""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import LoraConfig
from transformers import Trainer, set_seed

from tsqlora.inputs import Inputs
from tsqlora.lora_layers import resolve_targets, wrap
from tsqlora.metrics import evaluate
from tsqlora.training import training_arguments


def train_plain_lora(inputs: Inputs, steps: int) -> dict[str, float]:
    """Uniform ranks, the mean of the plan's budget, every sample alike; metrics on test.

    The same model, seed, modules, scale, batches, rate and schedule as the configuration's, for
    `steps` optimizer steps. On validation where there is no test split.
    """
    config, task = inputs.config, inputs.task
    base = inputs.base_model()
    rank = max(1, round(config.ranks.mean_rank or 8))
    set_seed(config.seed)
    model = wrap(
        base,
        LoraConfig(
            r=rank,
            lora_alpha=config.adapter.scale * rank,  # type: ignore[arg-type]
            lora_dropout=config.adapter.dropout,
            target_modules=resolve_targets(base, task.kind, config.adapter.target_modules),
            modules_to_save=list(config.adapter.modules_to_save) or None,
            task_type=task.peft_task_type,
        ),
    )
    settings = {**config.training, "max_steps": steps, "save_strategy": "no"}
    with tempfile.TemporaryDirectory(prefix="tsqlora-") as folder:
        arguments = training_arguments(settings, Path(folder), config.seed)
        data = inputs.splits.train
        Trainer(model, arguments, train_dataset=data, data_collator=task.collate).train()
    split = list(inputs.splits.measured.values())[-1]
    return evaluate(task, model, split, config.metrics or task.default_metrics)
