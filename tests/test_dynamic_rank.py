"""Ranks that move: within the budget, without a jump in the function, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback, TrainingArguments

from test_adapter import planned_model
from tiny import KINDS, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.adapter import active, active_ranks, add_headroom
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


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["llama", "bert", "gpt2"]), st.integers(0, 2), st.integers(0, 99))
def test_what_one_module_may_not_take_goes_to_the_others(name: str, least: int, seed: int) -> None:
    """Targets lie between the lowest rank and what each has room for, and no more is left of the
    budget than a component of the cheapest that may still grow."""
    model, plan = planned_model(name)
    add_headroom(model.train(), 2)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    ranks = DynamicRank(model, optimizer, 12, plan, min_rank=least)
    modules, current = lora_modules(model), active_ranks(model)
    random = np.random.default_rng(seed)
    target = ranks._target(current, {m.name: random.exponential() ** 3 for m in modules})
    assert all(max(least, 1) <= target[m.name] <= m.rank for m in modules)
    left = ranks.budget - sum(target[m.name] * sum(m.shape) for m in modules)
    assert left >= 0
    assert all(left < sum(m.shape) for m in modules if target[m.name] < m.rank)


@settings(deadline=None, max_examples=8)
@given(
    st.sampled_from(["llama", "bert", "gpt2"]),
    st.integers(0, 3),
    st.tuples(st.floats(0.05, 0.4), st.floats(0.4, 0.9)),
    st.integers(1, 5),
    st.integers(1, 4),
    st.floats(0.05, 1),
)
def test_whatever_the_schedule_the_budget_holds_and_what_is_pruned_is_zero(
    name: str, room: int, span: tuple[float, float], moves: int, window: int, share: float
) -> None:
    model, plan = planned_model(name)
    add_headroom(model.train(), room)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.1)
    schedule = RankSchedule(*span, moves, window, share)
    ranks = DynamicRank(model, optimizer, 12, plan, schedule)
    expected = active_ranks(model)
    for seed in range(12):
        model(**tiny_batch(KINDS[name], seed=seed)).loss.backward()
        move = ranks.step()
        expected = move.ranks if move else expected
        optimizer.step()
        optimizer.zero_grad()
        assert active_ranks(model) == expected
        assert parameters_in_use(model) <= ranks.budget
        for module in lora_modules(model):
            assert not module.b.weight[:, ~active(module)].any()
    assert ranks.frozen


def test_in_8_bits_what_is_pruned_stays_exactly_zero_too() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, plan = planned_model("llama")
    add_headroom(model.train(), 2)
    optimizer = bitsandbytes.optim.AdamW8bit(
        lora_parameters(model), lr=1e-2, weight_decay=0.1, min_8bit_size=16
    )
    ranks = DynamicRank(model, optimizer, 30, plan, OFTEN)
    used = loop(model, ranks, optimizer, range(30))
    assert ranks.history
    assert max(used) <= ranks.budget
    assert active_ranks(model) == ranks.history[-1].ranks


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
    def run(folder: Path, stop: Path | None = None, **where: Any) -> Any:
        model, _ = planned_model("llama")
        callback = DynamicRankCallback(schedule=OFTEN, **where)
        trainer = trainer_of(model, folder, callback, save_strategy="steps", save_steps=9)
        trainer.train(resume_from_checkpoint=stop and str(stop))
        return model

    whole, stop = run(tmp_path / "one"), tmp_path / "one/checkpoint-9"
    with pytest.raises(TrainingError, match=r"DynamicRankCallback\(resume_from="):
        run(tmp_path / "two", stop)
    elsewhere = run(tmp_path / "three", stop, resume_from=stop)
    for resumed in (run(tmp_path / "one", stop), elsewhere):
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
    ranks = DynamicRank(model, optimizer, 10, schedule=RankSchedule(window=1))
    with pytest.raises(TrainingError, match="after backward"):
        ranks.step()
    model(**tiny_batch("causal-lm")).loss.backward()
    ranks.step()
    optimizer.zero_grad(set_to_none=True)
    with pytest.raises(TrainingError, match="after backward"):
        ranks.step()
    for parameter in lora_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    ranks.taken = ranks.moves_at[0] - 1
    with pytest.raises(TrainingError, match="gradients of LoRA factors are zero"):
        ranks.step()


def test_an_optimizer_that_is_not_understood_stops_at_its_second_step(tmp_path: Path) -> None:
    class Strange(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                self.state[p]["sketch"] = torch.zeros(7, 5)

    model, plan = planned_model("llama")
    optimizer = Strange(lora_parameters(model.train()), lr=1e-3)
    with pytest.raises(TrainingError, match=r"Strange keeps 'sketch'"):
        loop(model, DynamicRank(model, optimizer, 30, plan), optimizer, range(2))


def scaled_run(scales: list[float], poisoned: int | None = None) -> tuple[Any, DynamicRank]:
    """20 steps whose gradients a loss scaler had multiplied; it skips the `poisoned` step."""
    model, plan = planned_model("llama")
    add_headroom(model.train(), 2)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    ranks = DynamicRank(model, optimizer, 20, plan, OFTEN)
    for step, scale in enumerate(scales):
        (model(**tiny_batch("causal-lm", seed=step)).loss * scale).backward()
        if step == poisoned:
            for parameter in lora_parameters(model):
                parameter.grad[0, 0] = torch.inf  # type: ignore[index]
        ranks.step()
        for parameter in lora_parameters(model):
            parameter.grad /= scale
        if step != poisoned:
            optimizer.step()
        optimizer.zero_grad()
    return model, ranks


def test_a_changing_loss_scale_moves_no_other_ranks() -> None:
    plain, plain_ranks = scaled_run([1.0] * 20)
    scaled, scaled_ranks = scaled_run([2.0 ** (7 * step % 17) for step in range(20)])
    assert scaled_ranks.history == plain_ranks.history
    assert scaled_ranks.history
    for a, b in zip(lora_parameters(plain), lora_parameters(scaled), strict=True):
        assert torch.equal(a, b)


def test_a_step_with_infinite_gradients_is_not_looked_at() -> None:
    poisoned = OFTEN.steps(20)[0] - 1  # the step at which ranks first move
    model, ranks = scaled_run([1.0] * 20, poisoned)
    assert ranks.history[0].step == poisoned + 1  # by what the step before has shown
    assert all(bool(p.isfinite().all()) for p in lora_parameters(model))


def test_the_learning_rate_schedule_is_untouched(tmp_path: Path) -> None:
    def rates(folder: str, callback: Any) -> list[float]:
        model, _ = planned_model("llama")
        trainer = trainer_of(model, tmp_path / folder, callback, logging_steps=1, warmup_steps=3)
        trainer.train()
        return [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]

    moving = DynamicRankCallback(schedule=OFTEN)
    assert rates("a", moving) == rates("b", TrainerCallback())
    assert moving.ranks is not None
    assert moving.ranks.history


@pytest.mark.parametrize("stop", [9, 18])
def test_a_compacted_run_resumes_bit_for_bit(tmp_path: Path, stop: int) -> None:
    def run(resume: Path | None) -> Any:
        model, plan = planned_model("llama")
        callback = DynamicRankCallback(schedule=OFTEN, compact=True, resume_from=resume)
        trainer = trainer_of(model, tmp_path, callback, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        assert parameters_in_use(model) <= plan.parameters
        return model

    whole = run(None)
    resumed = run(tmp_path / f"checkpoint-{stop}")
    ranks = active_ranks(whole)
    assert {m.name: m.rank for m in lora_modules(whole)} == {n: max(r, 1) for n, r in ranks.items()}
    for a, b in zip(lora_parameters(whole), lora_parameters(resumed), strict=True):
        assert torch.equal(a, b)


def test_ranks_that_still_move_are_not_compacted_and_other_shapes_not_loaded() -> None:
    model, plan = planned_model("llama")
    add_headroom(model.train(), 2)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    ranks = DynamicRank(model, optimizer, 20, plan, OFTEN)
    loop(model, ranks, optimizer, range(8))
    with pytest.raises(TrainingError, match="Ranks move until step 16"):
        ranks.compact()
    state = ranks.state_dict()
    add_headroom(model, 1)
    with pytest.raises(TrainingError, match="other ranks than the model's"):
        DynamicRank(model, optimizer, 20, plan, OFTEN).load_state_dict(state)
