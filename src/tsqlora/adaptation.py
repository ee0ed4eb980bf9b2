"""Brief adaptation: steps on the whole pool, so that losses and gradients tell of the samples.

At a fresh classification head or B = 0 a sample's gradient is mostly noise. The final adapter
starts from the adapted one, so these steps are the first part of the training (docs/choices.md).
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from tsqlora.batches import Collator, try_out
from tsqlora.errors import TrainingError
from tsqlora.losses import infer_kind

FEW, MOST = 100, 500
"""Steps where the training's length is not known; steps after which no more is to be learnt of the
samples (benchmarks/LOG.md)."""


def default_steps(training_steps: int) -> int:
    """As many steps on the whole pool as come after on drawn samples, at most `MOST`."""
    return min(training_steps, MOST)


def adapt_briefly(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train what is trainable in `model` for `steps` steps on `dataset`, in place.

    AdamW, constant rate after a warm-up of a tenth, drawn uniformly. One pass a sample and step.

    Raises:
        ModelError: the model cannot take the samples.
        TrainingError: the parameters are no longer finite.
    """
    try_out(model, infer_kind(model), dataset, collator)
    if steps <= 0:
        return
    with tempfile.TemporaryDirectory(prefix="tsqlora-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=max(1, steps // 10),
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        set_seed(seed)
        Trainer(model, arguments, train_dataset=dataset, data_collator=collator).train()
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        raise TrainingError(
            "The brief adaptation diverged: lower training.learning_rate or look for extreme "
            "targets."
        )
