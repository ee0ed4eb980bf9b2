"""One call from Python: a model and a data set to quality scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from torch import nn

from tsqlora import processes
from tsqlora.adaptation import FEW, Adaptation, adapt_briefly
from tsqlora.batches import Collator, unwrapped
from tsqlora.config import QualityConfig
from tsqlora.factors import scored_layers
from tsqlora.lora_layers import (
    has_lora,
    is_fresh,
    load_trainable_state,
    temporary_adapter,
    trainable_state,
)
from tsqlora.losses import infer_kind
from tsqlora.quality import QualityScores
from tsqlora.scoring import Scorer
from tsqlora.trials import require_samples
from tsqlora.undisturbed import undisturbed

ADAPTED = 32
"""Samples a step of the brief adaptation where no batch size is given."""


def score_samples(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    quality: QualityConfig | None = None,
    reference: Dataset | None = None,
    learning_rate: float = 1e-3,
    batch_size: int | None = None,
    seed: int = 0,
    together: bool = False,
) -> QualityScores:
    """The quality of every row of `dataset` under `model` (TsqLoRA §3; formulas in `quality.py`).

    A model without adapters gets temporary ones, briefly adapted (`quality.adapt_steps` steps, 100
    where that is None) and removed after, its weights untouched. So is a fresh LoRA adapter (B = 0)
    adapted and put back after; one that has learnt is scored as it is. `reference` holds trusted
    samples. `ids` are the column `id` where it holds whole numbers, else the row numbers. Batches
    take as much memory as `batch_size` of the longest samples, by default as many as fit and pay,
    found by trial, and are halved when memory runs out. Under `torch.autocast` forwards run in its
    precision. What is measured waits in a temporary folder: little, but about 8 kB a sample where
    convergence has a weight and no `reference` is known.

    `together`: all processes of this launch call it at once, on one machine; each measures a share
    of the samples and all get the same scores.

    Raises:
        ModelError: the model's kind or a layer's kind is not supported.
        DataError: there is no row, or the batches hold no labels, or samples cannot be told apart.
        TrainingError: losses or gradients are not finite.
    """
    if together:
        processes.join()  # as nothing has done yet in a Trainer's script
    scorer = Scorer(collator, quality or QualityConfig(), learning_rate, batch_size, seed)
    model = unwrapped(model)
    require_samples(model, dataset, collator)
    steps = FEW if scorer.quality.adapt_steps is None else scorer.quality.adapt_steps
    each = max(1, (batch_size or ADAPTED) // processes.count())  # who trains it together
    adaptation = Adaptation(steps, learning_rate, each, seed)
    with _adapted(model, dataset, collator, adaptation) as adapted:
        if together and processes.count() > 1:
            return _together(scorer, adapted, dataset, reference)
        return scorer.score(adapted, dataset, reference)


@contextmanager
def _adapted(
    model: nn.Module, dataset: Dataset, collator: Collator, adaptation: Adaptation
) -> Iterator[nn.Module]:
    """`model` as it is to be scored; afterwards as it was before."""
    if has_lora(model) and not (scored_layers(model) and is_fresh(model)):
        yield model
        return
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(undisturbed())
        stack.callback(_back_to, model, device)
        if has_lora(model):
            stack.enter_context(_unchanged(model))
            adapted = model
        else:
            adapted = stack.enter_context(temporary_adapter(model, infer_kind(model)))
        adapt_briefly(adapted, dataset, collator, adaptation)
        yield adapted


def _together(
    scorer: Scorer, model: nn.Module, dataset: Dataset, reference: Dataset | None
) -> QualityScores:
    """`scorer.score` in all processes at once, each measuring a share; the same scores in all."""
    made = TemporaryDirectory(prefix="tsqlora-") if processes.is_main() else None
    folder = Path(processes.from_main(lambda: made.name if made else ""))
    try:
        processes.require_shared(folder)
        scorer.measure(model, dataset, reference, folder)
        processes.wait()  # until all parts are there
        return processes.from_main(lambda: scorer.scores(model, dataset, reference, folder))
    finally:
        if made is not None:
            made.cleanup()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, whatever is trainable may be trained; afterwards it is as it was, bit for bit."""
    state, training = trainable_state(model), model.training
    try:
        yield
    finally:
        load_trainable_state(model, state)
        model.zero_grad(set_to_none=True)
        model.train(training)


def _back_to(model: nn.Module, device: torch.device) -> None:
    """The adaptation's Trainer may have moved it to an accelerator."""
    if next(model.parameters()).device != device:
        model.to(device)
