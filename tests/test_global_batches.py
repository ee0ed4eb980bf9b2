"""Steps that do not depend on how many processes take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback, TrainingArguments

from tiny import KINDS, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora import processes
from tsqlora.adaptation import Adaptation, adapt_briefly
from tsqlora.global_batches import SPARE, GlobalBatchTrainer, Shares, _Company
from tsqlora.lora_layers import lora_parameters
from tsqlora.losses import target_lengths


@given(
    order=st.permutations(range(17)).map(lambda o: o[: o[0]]),
    each=st.integers(1, 4),
    count=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_the_shares_are_together_the_batches_of_one_process(
    order: list[int], each: int, count: int, drop_last: bool
) -> None:
    shares = [list(Shares(order, each, i, count, drop_last)) for i in range(count)]  # type: ignore[arg-type]
    (one,) = [list(Shares(order, each * count, 0, 1, drop_last))]  # type: ignore[arg-type]
    together = [[i for own in step for i in own] for step in zip(*shares, strict=True)]
    assert together == one
    kept = len(order) - len(order) % (each * count) if drop_last else len(order)
    assert [i for step in together for i in step] == list(order[:kept])
    assert all(len(own) <= each for share in shares for own in share)
    assert len(Shares(order, each, 0, count, drop_last)) == len(one)  # type: ignore[arg-type]


def trainer_of(name: str, folder: Path, batch: int, accumulated: int) -> GlobalBatchTrainer:
    kind = KINDS[name]
    rows = Dataset.from_list(rows_of(tiny_batch(kind, samples=10))).remove_columns("id")
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    model = with_lora(tiny_model(name), kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    trainer = GlobalBatchTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)  # type: ignore[method-assign]
    return trainer


def step_of(trainer: GlobalBatchTrainer) -> tuple[float, list[torch.Tensor]]:
    """The loss that is reported for one step, and its gradients."""
    found: list[torch.Tensor] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, **named: Any) -> None:
            for parameter in lora_parameters(named["model"]):
                assert parameter.grad is not None
                found.append(parameter.grad.clone())

    trainer.add_callback(Keep())
    return trainer.train().training_loss, found


@pytest.mark.parametrize("name", ["bert", "bart", "t5", "llama"])
def test_accumulated_batches_are_one_batch(name: str, tmp_path: Path) -> None:
    loss, gradients = step_of(trainer_of(name, tmp_path, 10, 1))
    parts, accumulated = step_of(trainer_of(name, tmp_path, 4, 3))  # 4, 4 and 2 samples
    assert parts == pytest.approx(loss, rel=1e-5)
    for whole, summed in zip(gradients, accumulated, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-7)


def test_an_adaptation_begins_again_in_halves_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapted(most: int) -> list[torch.Tensor]:
        def training_step(
            trainer: GlobalBatchTrainer, model: Any, inputs: Any, *rest: Any
        ) -> torch.Tensor:
            if len(inputs["labels"]) > most:
                raise torch.OutOfMemoryError
            return step(trainer, model, inputs, *rest)

        monkeypatch.setattr(GlobalBatchTrainer, "training_step", training_step)
        trainer = trainer_of("bert", tmp_path, 8, 1)
        rows, folder = trainer.train_dataset, tmp_path / str(most)
        adapt_briefly(trainer.model, rows, collate, Adaptation(3, 1e-3, 8, 0), folder)
        return [parameter.detach() for parameter in lora_parameters(trainer.model)]

    step = GlobalBatchTrainer.training_step
    for whole, halves in zip(adapted(8), adapted(2), strict=True):
        torch.testing.assert_close(halves, whole, rtol=1e-3, atol=1e-4)


def test_a_process_without_samples_adds_nothing(tmp_path: Path) -> None:
    trainer = trainer_of("bert", tmp_path, 10, 1)
    batch = _Company(collate, trainer.train_dataset)([])
    assert SPARE in batch
    trainer.model.train()
    trainer._targets, trainer.current_gradient_accumulation_steps = 3.0, 1
    trainer.compute_loss(trainer.model, batch).backward()
    for parameter in lora_parameters(trainer.model):
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_what_counts_is_a_target_token_or_a_sample(tmp_path: Path) -> None:
    for name in ("bert", "llama"):
        trainer = trainer_of(name, tmp_path, 10, 1)
        batch = tiny_batch(KINDS[name])
        assert trainer._counted(batch) == int(target_lengths(KINDS[name], batch["labels"]).sum())
    assert processes.total(3.0) == 3.0
