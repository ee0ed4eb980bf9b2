"""Ranks that move: within the budget, without a jump in the function, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from test_adapter import planned_model
from tiny import collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.adapter import active_ranks, add_headroom
from tsqlora.callback import DynamicRankCallback
from tsqlora.dynamic_rank import DynamicRank, RankSchedule
from tsqlora.errors import ModelError, TrainingError
from tsqlora.lora_layers import lora_modules, lora_parameters

OFTEN = RankSchedule(start=0.1, end=0.8, moves=6, window=2, move_share=0.3)


def parameters_in_use(model: Any) -> int:
    ranks = active_ranks(model)
    return sum(ranks[m.name] * sum(m.shape) for m in lora_modules(model))


def loop(model: Any, ranks: DynamicRank, optimizer: Any, steps: range) -> list[int]:
    used = []
    for seed in steps:
        model(**tiny_batch("causal-lm", seed=seed)).loss.backward()
        ranks.step()
        optimizer.step()
        optimizer.zero_grad()
        used.append(parameters_in_use(model))
    return used


def test_ranks_move_and_the_budget_holds_at_every_step() -> None:
    model, plan = planned_model("llama")
    model.train()
    add_headroom(model, 2)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    ranks = DynamicRank(model, optimizer, 30, plan, OFTEN)
    before = active_ranks(model)
    used = loop(model, ranks, optimizer, range(30))
    assert ranks.history
    assert active_ranks(model) != before
    assert max(used) <= ranks.budget == plan.parameters
    for move in ranks.history:
        assert sum(move.pruned.values()) > 0
        assert sum(move.grown.values()) > 0
    assert ranks.history[-1].ranks == active_ranks(model)


def test_state_saved_and_loaded_goes_on_exactly() -> None:
    def start() -> tuple[Any, DynamicRank, Any]:
        model, plan = planned_model("llama")
        model.train()
        add_headroom(model, 2)
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
        return model, DynamicRank(model, optimizer, 30, plan, OFTEN), optimizer

    model, ranks, optimizer = start()
    loop(model, ranks, optimizer, range(30))
    first, first_ranks, first_optimizer = start()
    loop(first, first_ranks, first_optimizer, range(13))
    second, second_ranks, second_optimizer = start()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second_ranks.load_state_dict(json.loads(json.dumps(first_ranks.state_dict())))
    loop(second, second_ranks, second_optimizer, range(13, 30))
    assert second_ranks.history == ranks.history
    assert all(
        torch.equal(a, b)
        for a, b in zip(lora_parameters(model), lora_parameters(second), strict=True)
    )


def trainer_of(model: Any, folder: Path, callback: Any, **more: Any) -> Trainer:
    rows = Dataset.from_list(rows_of(tiny_batch("causal-lm", samples=16)))
    arguments = TrainingArguments(
        str(folder),
        max_steps=20,
        per_device_train_batch_size=4,
        report_to="none",
        learning_rate=1e-2,
        save_strategy=more.pop("save_strategy", "no"),
        disable_tqdm=True,
        **more,
    )
    rows = rows.remove_columns("id")
    return Trainer(
        model, arguments, train_dataset=rows, data_collator=collate, callbacks=[callback]
    )


def test_the_callback_moves_ranks_in_a_plain_trainer(tmp_path: Path) -> None:
    model, plan = planned_model("llama")
    callback = DynamicRankCallback(schedule=OFTEN)
    trainer_of(model, tmp_path, callback).train()
    assert callback.ranks is not None
    assert callback.ranks.history
    assert callback.ranks.budget == plan.parameters


def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None) -> Any:
        model, _ = planned_model("llama")
        callback = DynamicRankCallback(schedule=OFTEN)
        trainer = trainer_of(model, folder, callback, save_strategy="steps", save_steps=9)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}") if stop else None)
        return model

    whole = run(tmp_path)
    resumed = run(tmp_path, stop=9)
    assert active_ranks(whole) == active_ranks(resumed)
    for a, b in zip(lora_parameters(whole), lora_parameters(resumed), strict=True):
        assert torch.equal(a, b)


def test_nothing_silently_does_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no active LoRA adapter"):
        trainer_of(tiny_model("llama"), tmp_path, DynamicRankCallback())
    model = with_lora(tiny_model("llama"), "causal-lm")
    late = trainer_of(model, tmp_path, DynamicRankCallback())
    late.add_callback(DynamicRankCallback())
    with pytest.raises(TrainingError, match="too late"):
        late.train()
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(TrainingError, match="does not train the LoRA factors"):
        DynamicRank(model, other, 10)
    optimizer = torch.optim.AdamW(lora_parameters(model))
    with pytest.raises(TrainingError, match="total_steps = 0"):
        DynamicRank(model, optimizer, 0)
    ranks = DynamicRank(model, optimizer, 10, schedule=RankSchedule(window=10))
    optimizer.zero_grad()
    with pytest.raises(TrainingError, match="after backward"):
        ranks.step()
