"""Scripts of one's own around us: what is left as it was, found through wrappers, or refused."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import Trainer

import tsqlora as tsq
from test_adoption import BRIEF, arguments, bert, pool, sampler
from tiny import all_terms, collate, rows_of, tiny_batch, tiny_model
from tsqlora.adapter import require_early
from tsqlora.callback import STATE_FILE
from tsqlora.dynamic_rank import DynamicRank, RankSchedule
from tsqlora.errors import DataError, ModelError, TrainingError
from tsqlora.lora_layers import lora_modules, trainable_state


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """As in a process that has just begun."""

    def begin() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()

    begin()
    yield
    begin()


def scored(model: Any) -> tsq.QualityScores:
    return tsq.score_samples(model, pool(), collate, BRIEF, batch_size=8)


def accelerator() -> Accelerator:
    return Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3, cpu=True)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("first", [True, False], ids=["made before", "made after"])
def test_an_accelerator_keeps_its_precision_and_accumulation(first: bool) -> None:
    made = accelerator() if first else None
    variables = dict(os.environ)
    scored(tiny_model("bert"))
    assert dict(os.environ) == variables
    made = made or accelerator()
    assert (made.mixed_precision, made.gradient_accumulation_steps) == ("bf16", 3)
    loader: Any = DataLoader(pool(), batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    model, rows = made.prepare(bert(), loader)
    synchronised = []
    for _ in rows:
        with made.accumulate(model):
            synchronised.append(made.sync_gradients)
    assert synchronised == [False, False, True] * 2


@pytest.mark.parametrize("make", [bert, lambda: tiny_model("bert")], ids=["fresh", "none"])
def test_random_numbers_go_on_as_if_nothing_had_been_scored(make: Any) -> None:
    def numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    model = make()
    found = []
    for between in (lambda: None, lambda: scored(model)):
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        between()
        found.append(numbers())
    assert found[0] == found[1]


def test_a_compiled_model_is_started_planned_moved_and_exported_as_the_model_in_it(
    tmp_path: Path,
) -> None:
    def prepared(wrap: Any) -> tuple[dict[str, torch.Tensor], DynamicRank]:
        model = bert()
        layers = tsq.layer_sensitivity(model, pool(), collate, spectrum=4)
        plan = tsq.allocate_ranks(layers, mean_rank=3, min_rank=3, max_rank=3)
        wrapped = wrap(model)
        tsq.start_from_gradient(wrapped, layers)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        ranks = DynamicRank(wrapped, optimizer, 20, plan, sensitivity=layers)
        tsq.export_adapter(wrapped, tmp_path / wrap.__name__)
        return trainable_state(model), ranks

    def compiled(model: Any) -> Any:
        return torch.compile(model, backend="eager")

    def plain(model: Any) -> Any:
        return model

    (started, ranks), (expected, ranks_of_plain) = prepared(compiled), prepared(plain)
    assert all(torch.equal(started[name], expected[name]) for name in expected)
    assert ranks.rows.directions.keys() == ranks_of_plain.rows.directions.keys()
    assert ranks.rows.directions
    names = [(tmp_path / each / "adapter_model.safetensors") for each in ("compiled", "plain")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_directions_of_another_model_are_refused() -> None:
    layers = tsq.layer_sensitivity(tiny_model("llama"), causal(), collate, spectrum=2)
    with pytest.raises(ModelError, match="none of the adapter's modules"):
        tsq.start_from_gradient(bert(), layers)


def causal() -> Dataset:
    return Dataset.from_list(rows_of(tiny_batch("causal-lm")))


SCHEDULE = RankSchedule(window=2, move_share=0.5)


def test_ranks_move_in_a_model_that_model_init_makes_anew(tmp_path: Path) -> None:
    callback = tsq.DynamicRankCallback(schedule=SCHEDULE)
    trainer = Trainer(
        model_init=bert,
        args=arguments(tmp_path, learning_rate=1e-2),
        train_dataset=pool(),
        data_collator=collate,
        callbacks=[callback],
    )
    room = {module.name: module.rank for module in lora_modules(trainer.model)}
    trainer.train()
    assert callback.ranks is not None
    assert callback.ranks.history
    assert {module.name: module.rank for module in lora_modules(trainer.model)} == room


def resumable(folder: Path, seed: int) -> tuple[Trainer, tsq.DynamicRankCallback]:
    callback = tsq.DynamicRankCallback(schedule=SCHEDULE)
    settings = arguments(folder, learning_rate=5e-2, save_strategy="steps", save_steps=9, seed=seed)
    rows = pool().shuffle(seed=seed)
    return Trainer(bert(), settings, collate, rows, callbacks=[callback]), callback


def test_ranks_of_another_run_are_not_taken_for_those_of_the_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trainer, callback = resumable(tmp_path / name, seed=ord(name))
        trainer.train()
        assert callback.ranks is not None
        assert callback.ranks.history
    there = str(tmp_path / "a" / "checkpoint-9")
    state = tmp_path / "b" / "checkpoint-9" / STATE_FILE
    assert state.read_text() != (Path(there) / STATE_FILE).read_text()
    trainer, _ = resumable(tmp_path / "b", seed=ord("a"))
    with pytest.raises(TrainingError, match="other ranks than this state"):
        trainer.train(resume_from_checkpoint=there)


class OwnLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]


def test_a_trainer_that_never_asks_its_sampler_is_stopped_at_the_first_step(tmp_path: Path) -> None:
    trainer = OwnLoader(bert(), arguments(tmp_path), collate, pool())
    sampler().attach(trainer)
    before = trainable_state(trainer.model)
    with pytest.raises(TrainingError, match="QualitySampler has not drawn"):
        trainer.train()
    after = trainable_state(trainer.model)
    assert all(torch.equal(before[name], after[name].cpu()) for name in before)


def test_a_fresh_adapter_beside_one_that_has_learnt_is_adapted() -> None:
    model = bert(random=True)
    model.add_adapter("new", LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    model.set_adapter("new")
    brief = scored(model)
    as_it_is = tsq.score_samples(model, pool(), collate, all_terms(adapt_steps=0), batch_size=8)
    assert not np.allclose(brief.loss, as_it_is.loss, rtol=1e-4)


def reads(name: str) -> Any:
    """A collator that reads a column which the model does not take."""

    def made(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all(name in row for row in rows)
        return collate([{k: v for k, v in row.items() if k not in ("id", name)} for row in rows])

    return made


def test_a_collator_is_given_the_columns_that_it_needs() -> None:
    plain, rows = bert(random=True), pool()
    expected = scored(plain).loss
    weighted = rows.add_column("weight", [1.0] * len(rows))
    found = tsq.score_samples(plain, weighted, reads("weight"), BRIEF, batch_size=8)
    np.testing.assert_array_equal(found.loss, expected)
    with pytest.raises(DataError, match="The collator cannot take the first rows"):
        tsq.score_samples(plain, rows, reads("weight"), BRIEF, batch_size=8)


def test_rows_that_a_transform_makes_are_read_through_it() -> None:
    rows, tokens = pool(), pool()["input_ids"]
    named = rows.remove_columns([n for n in rows.column_names if n not in ("id", "labels")])

    def tokenised(batch: dict[str, Any]) -> dict[str, Any]:
        ids = [tokens[i] for i in batch["id"]]
        return {**batch, "input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]}

    named.set_transform(tokenised)
    model = bert(random=True)
    found = tsq.score_samples(model, named, reads("id"), BRIEF, batch_size=8)
    assert np.isfinite(found.loss).all()


def test_an_optimizer_with_empty_entries_has_not_stepped() -> None:
    model = bert()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {}
    require_early(model, optimizer)
    optimizer.state[parameter] = {"step": 1}
    with pytest.raises(TrainingError, match="optimizer has stepped"):
        require_early(model, optimizer)


def test_a_draw_is_kept_only_of_a_data_set_that_can_be_cut() -> None:
    scores = scored(bert(random=True))
    with pytest.raises(DataError, match=r"expected a datasets\.Dataset, not list"):
        tsq.select_samples([dict(row) for row in pool()], scores)  # type: ignore[arg-type]
