"""Rivals: methods that choose samples by their loss, and PEFT's that choose ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from evidence_cell import Cell, Outcome
from evidence_plain import IndexedTrainer, Plain
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tsqlora.batches import Collator, batches, evaluating, forward_losses
from tsqlora.inputs import Inputs
from tsqlora.lora_layers import wrap
from tsqlora.losses import infer_kind
from tsqlora.two_parts import uniform_config

ADALORA_EXTRA = 1.5
"""AdaLoRA starts at this multiple of its final rank, as in its paper (12 for 8)."""
INFOBATCH_PRUNED, INFOBATCH_LAST = 0.5, 0.125
"""InfoBatch (arXiv 2303.04947): share pruned of those below the mean loss, last part unpruned."""
SMALL_LOSS_START = 1 / 3
"""The part of the steps after which the small-loss filter looks at the losses."""


# Rivals that choose samples by their loss


def small_loss(cell: Cell) -> Outcome:
    """After a third of the steps only the small-loss samples, as many as are sound: told how many.

    The trick of co-teaching (arXiv 1804.06872) in one model, with the true share known to it.
    """
    keep = len(cell.data.train) - len(cell.data.wrong)
    first = round(SMALL_LOSS_START * cell.budget)

    def order(trainer: IndexedTrainer) -> Iterator[np.ndarray]:
        rng, drawn = np.random.default_rng(cell.seed), 0
        while drawn < first:
            yield (chosen := rng.permutation(len(cell.data.train))[: first - drawn])
            drawn += len(chosen)
        kept = np.argsort(_losses(trainer, trainer.plain_collate), kind="stable")[:keep]
        while True:
            yield rng.permutation(kept)

    return Plain(cell, order=order, extra_passes=len(cell.data.train) / 2).run()


def infobatch(cell: Cell) -> Outcome:
    """InfoBatch (arXiv 2303.04947): each epoch half of those below the mean loss are left out, the
    rest of those weigh double; the last eighth of the draws takes all."""
    size = len(cell.data.train)
    seen, weights = np.full(size, np.inf), np.ones(size)

    def order(_: IndexedTrainer) -> Iterator[np.ndarray]:
        rng, drawn = np.random.default_rng(cell.seed), 0
        while True:
            known = seen[np.isfinite(seen)]
            easy = seen < (known.mean() if len(known) else 0.0)
            if drawn >= (1 - INFOBATCH_LAST) * cell.budget:
                easy[:] = False
            left_out = easy & (rng.random(size) < INFOBATCH_PRUNED)
            weights[:] = np.where(easy, 1 / (1 - INFOBATCH_PRUNED), 1.0)
            chosen = rng.permutation(np.flatnonzero(~left_out))
            drawn += len(chosen)
            yield chosen

    def weigh(positions: np.ndarray, losses: np.ndarray) -> np.ndarray:
        seen[positions] = losses
        return weights[positions]

    return Plain(cell, order=order, weigh=weigh).run()


def _losses(trainer: IndexedTrainer, collate: Collator) -> np.ndarray:
    model, rows = trainer.model, trainer.train_dataset
    found = np.zeros(len(rows))
    with evaluating(model), torch.no_grad():
        for positions, batch in batches(model, rows, collate, 64, "small loss"):
            found[positions] = forward_losses(model, infer_kind(model), batch).cpu().numpy()
    return found


# Rivals that choose ranks


def adalora(cell: Cell) -> Outcome:
    """PEFT's AdaLoRA, called after every step, its scale that of the others."""
    return Plain(cell, adapter=_adalora(cell), callbacks=(Allocate(),)).run()


def _adalora(cell: Cell) -> Callable[[Inputs, int], PeftModel]:
    def adapter(inputs: Inputs, rank: int) -> PeftModel:
        base = inputs.base_model()
        plain = uniform_config(inputs.config, base)
        first = round(ADALORA_EXTRA * rank)
        config = AdaLoraConfig(
            init_r=first,
            target_r=rank,
            lora_alpha=inputs.config.scale * first,  # PEFT divides by the first rank
            target_modules=plain.target_modules,
            modules_to_save=plain.modules_to_save,
            task_type=plain.task_type,
            tinit=cell.steps // 10,
            tfinal=cell.steps // 3,
            deltaT=max(1, cell.steps // 100),
            total_step=cell.steps,
        )
        return wrap(base, config)

    return adapter


class Allocate(TrainerCallback):
    """What a Trainer does not do for AdaLoRA by itself."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


def eva(cell: Cell) -> Outcome:
    """PEFT's EVA (arXiv 2410.07170): ranks and A by the variance of what enters each module."""
    plain = Plain(cell)
    plain.adapter = _eva(plain)
    return plain.run()


def _eva(plain: Plain) -> Callable[[Inputs, int], PeftModel]:
    """The forward passes that its start takes count in `plain`, half a pass each."""

    def adapter(inputs: Inputs, rank: int) -> PeftModel:
        base = inputs.base_model()
        uniform = uniform_config(inputs.config, base)
        config = LoraConfig(
            r=rank,
            lora_alpha=uniform.lora_alpha,
            target_modules=uniform.target_modules,
            modules_to_save=uniform.modules_to_save,
            task_type=uniform.task_type,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=2.0),
        )
        model = wrap(base, config)
        if torch.cuda.is_available():
            model.to("cuda")
        columns = [c for c in inputs.splits.train.column_names if c != "id"]
        rows = inputs.splits.train.select_columns(columns)

        def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {name: t.to(model.device) for name, t in inputs.task.collate(features).items()}

        size = plain.cell.task.batch
        loader = DataLoader(rows, size, shuffle=True, collate_fn=collate, drop_last=True)

        def forward(model: Any, batch: Any) -> None:
            plain.extra_passes += len(batch["labels"]) / 2
            model(**batch)

        initialize_lora_eva_weights(
            model, loader, forward_fn=forward, prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=real_tokens, show_progress_bar=False,
        )  # fmt: skip
        return model

    return adapter


def real_tokens(entered: Any, batch: Any, name: str) -> torch.Tensor:
    """What enters a layer at positions that are not padding, of source or target by the shape."""
    entered = entered if isinstance(entered, torch.Tensor) else entered[0]
    if entered.dim() < 3:
        return entered.contiguous()
    for mask in (batch["attention_mask"].bool(), batch["labels"] != -100):
        if mask.shape == entered.shape[:2]:
            return entered[mask]
    return entered.flatten(0, 1)
