"""One training in two parts: first steps on the whole pool, the others on what is drawn by quality.

Where some rows are trusted the first steps begin with a half of those (`trusted.py`). The learning
rate rises and falls over both as over one training by the configuration, and rises once more where
the second part begins with a new optimizer; in between, samples and layers are measured.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, TrainingArguments

from tsqlora import processes
from tsqlora.adaptation import Adaptation, default_steps
from tsqlora.batches import Collator
from tsqlora.config import RunConfig
from tsqlora.lora_layers import PEFT_TASK_TYPES
from tsqlora.losses import CLASSIFICATION, REGRESSION
from tsqlora.scoring import Scorer
from tsqlora.selection import draw_size
from tsqlora.targets import resolve_targets
from tsqlora.training import DEFAULTS, training_arguments, training_passes

HEAD_SHARE = 0.1
"""Of the steps that come after, before layers are measured under a new head: through one that knows
nothing |W ⊙ ∇W| tells of the layers' sizes alone (benchmarks/LOG.md)."""


def first_steps(config: RunConfig, samples: int, together: int = 1) -> Adaptation:
    """The adaptation, for a pool of so many samples and a training in `together` processes.

    By default it has as many steps as what comes after, at most 500, before scores upfront; else a
    tenth as many where a new head has to learn first, and no step in generation. The rate rises as
    it would at the start of one training of so many steps in all, and falls linearly to the share
    of the steps that are left, unless the training's stays constant. One process takes the batches
    of all.
    """
    settings = {**DEFAULTS, **config.training, "deepspeed": None}
    with processes.alone(), tempfile.TemporaryDirectory(prefix="tsqlora-") as folder:
        arguments = training_arguments(settings, Path(folder), config.seed)
    drawn = draw_size(samples, config.quality.fraction)
    at_once = arguments.per_device_train_batch_size * together
    batch = at_once * arguments.gradient_accumulation_steps
    after = arguments.max_steps
    if after <= 0:
        after = math.ceil(training_passes(arguments, drawn) / batch)
    given = config.quality.adapt_steps
    steps = _by_default(config, after) if given is None else given
    constant = str(settings["lr_scheduler_type"]).startswith("constant")
    return Adaptation(
        steps,
        float(settings["learning_rate"]),
        at_once,
        config.seed,
        1.0 if constant else after / max(1, steps + after),
        config.training,
        arguments.get_warmup_steps(steps + after),
    )


def _by_default(config: RunConfig, after: int) -> int:
    if config.quality.mode == "upfront":
        return default_steps(after)
    fresh = config.task in (CLASSIFICATION, REGRESSION) and config.adapter.init is None
    return default_steps(round(HEAD_SHARE * after)) if fresh else 0


def last_arguments(config: RunConfig, first: Adaptation, folder: Path) -> TrainingArguments:
    """The second part's `TrainingArguments`: the rate goes on from where the first ended."""
    settings: dict[str, Any] = {
        **config.training,
        "learning_rate": first.ends_at * first.learning_rate,
    }
    return training_arguments(settings, folder, config.seed)


def scorer_of(config: RunConfig, collator: Collator, first: Adaptation, batch_size: int) -> Scorer:
    """How samples are measured between the two: at the first's rate, in its precision."""
    wanted = config.quality.batch_size or batch_size
    return Scorer(
        collator,
        config.quality,
        first.learning_rate,
        None if wanted == "auto" else int(wanted),
        config.seed,
        bool(config.training.get("bf16")),
    )


def uniform_config(config: RunConfig, base: PreTrainedModel, dropout: float = 0.0) -> LoraConfig:
    """The mean rank in every module: the first part's adapter, and plain LoRA's."""
    adapter, rank = config.adapter, max(1, round(config.ranks.mean_rank or 8))
    return LoraConfig(
        r=rank,
        lora_alpha=config.scale * rank,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=resolve_targets(base, config.task, adapter.target_modules),
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type=PEFT_TASK_TYPES[config.task],
    )
