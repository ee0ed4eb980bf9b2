"""Plain LoRA on all data, as PEFT and the Trainer give it: what every claim is measured against."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import set_seed

from tsqlora.finished import measure
from tsqlora.global_batches import GlobalBatchTrainer
from tsqlora.inputs import Inputs
from tsqlora.lora_layers import wrap
from tsqlora.training import training_arguments
from tsqlora.two_parts import uniform_config


def train_plain_lora(inputs: Inputs, steps: int) -> dict[str, float]:
    """Uniform ranks, the mean of the plan's budget, every sample alike; metrics on test.

    The same model, seed, modules, scale, batches, rate and schedule as the configuration's, for
    `steps` optimizer steps. On validation where there is no test split.
    """
    config, task = inputs.config, inputs.task
    base = inputs.base_model()
    set_seed(config.seed)
    model = wrap(base, uniform_config(config, base, config.adapter.dropout))
    settings = {**config.training, "deepspeed": None, "max_steps": steps, "save_strategy": "no"}
    with tempfile.TemporaryDirectory(prefix="tsqlora-") as folder:
        arguments = training_arguments(settings, Path(folder), config.seed)
        data = inputs.splits.train
        GlobalBatchTrainer(
            "plain LoRA",
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=task.collate,
        ).train()
    split = list(inputs.splits.measured.values())[-1]
    return measure(config, task, model, split)
