"""What a script of one's own meets: samplers that drop in, fresh adapters, mistakes made there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import tsqlora as tsq
from tiny import all_terms, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.adapter import active_ranks
from tsqlora.dynamic_rank import RankSchedule
from tsqlora.errors import ConfigError, DataError, ModelError, TrainingError
from tsqlora.lora_layers import lora_modules, trainable_state
from tsqlora.selection import draw, unscored

SAMPLES, FRACTION = 24, 0.5
BRIEF = all_terms(adapt_steps=3)


def pool(samples: int = SAMPLES) -> Dataset:
    return Dataset.from_list(rows_of(tiny_batch("classification", samples)))


def scores_of(samples: int = SAMPLES) -> tsq.QualityScores:
    uneven = np.random.default_rng(0).random(samples)
    return replace(unscored(np.arange(samples), 1.0, 0, ""), probability=uneven / uneven.sum())


def bert(random: bool = False) -> Any:
    return with_lora(tiny_model("bert"), "classification", random=random)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        **{"num_train_epochs": 3, "save_strategy": "no", **more},
    )


class Noting:
    """A collator that notes which rows it was given."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.seen += [row["id"] for row in rows]
        return collate(rows)


def draws(epoch: int) -> list[int]:
    return draw(scores_of().probability, FRACTION, 5, epoch).tolist()


def sampler() -> tsq.QualitySampler:
    return tsq.QualitySampler(scores_of(), FRACTION, seed=5)


def test_a_trainer_trains_on_each_epochs_own_draw(tmp_path: Path) -> None:
    noting = Noting()
    trainer = Trainer(
        bert(),
        arguments(tmp_path, remove_unused_columns=False),
        train_dataset=pool(),
        data_collator=noting,
    )
    sampler().attach(trainer)
    trainer.train()
    assert noting.seen == draws(0) + draws(1) + draws(2)
    assert trainer.state.global_step == 3 * SAMPLES * FRACTION / 4


def test_a_dataloader_redraws_epoch_by_epoch_without_being_told() -> None:
    loader = DataLoader(pool(), batch_size=4, sampler=sampler(), collate_fn=lambda rows: rows)  # type: ignore[arg-type]
    epochs = [[row["id"] for batch in loader for row in batch] for _ in range(2)]
    assert epochs == [draws(0), draws(1)]


def shuffled(trainer: Any) -> None:
    trainer.train_dataset = trainer.train_dataset.shuffle(seed=1)


def shortened(trainer: Any) -> None:
    trainer.train_dataset = trainer.train_dataset.select(range(5))


def packed(trainer: Any) -> None:
    trainer.args.packing = True


def streamed(trainer: Any) -> None:
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()


def grouped(trainer: Any) -> None:
    trainer.args.train_sampling_strategy = "group_by_length"


MISTAKES: dict[Callable[[Any], None], tuple[type[Exception], str]] = {
    shuffled: (DataError, "Row 0 of the data set has id .*, but the scores there are of sample 0"),
    shortened: (DataError, "5 rows but the scores are of 24 samples"),
    packed: (DataError, "set packing=False"),
    streamed: (DataError, "no length but the scores are of 24"),
    grouped: (ConfigError, "group_by_length orders the samples"),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_sampler_refuses_a_trainer_whose_rows_it_does_not_know(
    mistake: Callable[[Any], None], tmp_path: Path
) -> None:
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=pool(), data_collator=collate)
    mistake(trainer)
    kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        sampler().attach(trainer)


def test_a_fresh_adapter_is_adapted_for_scoring_and_comes_back_bit_for_bit() -> None:
    model, rows = bert(), pool()
    model.train()
    before = trainable_state(model)
    scores = tsq.score_samples(model, rows, collate, BRIEF, batch_size=8)
    after = trainable_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    as_it_is = tsq.score_samples(model, rows, collate, all_terms(adapt_steps=0), batch_size=8)
    assert not np.allclose(scores.loss, as_it_is.loss, rtol=1e-4)


def test_an_adapter_that_has_learnt_is_scored_as_it_is() -> None:
    model, rows = bert(random=True), pool()
    adapted = tsq.score_samples(model, rows, collate, BRIEF, batch_size=8)
    as_it_is = tsq.score_samples(model, rows, collate, all_terms(adapt_steps=0), batch_size=8)
    np.testing.assert_array_equal(adapted.loss, as_it_is.loss)


@pytest.mark.parametrize("ids", [[f"q{i}" for i in range(SAMPLES)], [None, *range(1, SAMPLES)]])
def test_ids_that_are_no_whole_numbers_are_row_numbers(ids: list[Any]) -> None:
    rows = pool().remove_columns("id").add_column("id", ids)
    scores = tsq.score_samples(bert(random=True), rows, collate, BRIEF, batch_size=8)
    np.testing.assert_array_equal(scores.ids, np.arange(SAMPLES))
    assert len(tsq.select_samples(rows, scores, FRACTION)) == SAMPLES * FRACTION


def test_scores_of_a_file_by_its_rows_fit_rows_with_numbers_of_their_own() -> None:
    own = pool().remove_columns("id").add_column("id", list(range(100, 100 + SAMPLES)))
    assert len(tsq.select_samples(own, scores_of(), FRACTION))
    moved = own.select([1, 0, *range(2, SAMPLES)])
    with pytest.raises(DataError, match="Row 0 of the data set has id 101"):
        tsq.select_samples(moved, replace(scores_of(), ids=np.array(own["id"])))


def padding_free(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """All rows one after the other, as TRL does it."""
    flat = {k: [v for row in rows for v in row[k]] for k in ("input_ids", "labels")}
    return {name: torch.tensor([values]) for name, values in flat.items()}


def test_rows_that_share_a_sequence_are_refused_at_once() -> None:
    rows = Dataset.from_list(rows_of(tiny_batch("causal-lm")))
    model = with_lora(tiny_model("llama"), "causal-lm", random=False)
    with pytest.raises(DataError, match=r"1 samples of 2 rows.*padding_free=False"):
        tsq.score_samples(model, rows, padding_free)
    packed_rows = rows.add_column("seq_lengths", [[2, 3]] * len(rows))
    with pytest.raises(DataError, match=r"packed.*packing=False"):
        tsq.score_samples(model, packed_rows, collate)


def test_texts_that_were_not_tokenised_are_refused_with_the_columns_that_are_there() -> None:
    rows = Dataset.from_dict({"text": ["a film"], "label": [0]})
    with pytest.raises(DataError, match=r"cannot take the first rows .*columns label"):
        tsq.score_samples(bert(), rows, collate)


def test_a_loop_of_ones_own_has_room_to_grow_and_the_budget_holds() -> None:
    model, batch = bert(), tiny_batch("classification", 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ranks = tsq.DynamicRank(
        model, optimizer, 20, schedule=RankSchedule(window=2, move_share=0.3), headroom=2
    )
    planned = dict(ranks.planned)
    assert set(planned.values()) == {3}
    for _ in range(20):
        model(**batch).loss.backward()
        ranks.step()
        optimizer.step()
        optimizer.zero_grad()
    ended = active_ranks(model)
    assert max(ended.values()) > 3, "some module has more than it was given"
    assert sum(ended[m.name] * sum(m.shape) for m in ranks.modules) <= ranks.budget


def test_room_to_grow_leaves_the_users_own_configuration_as_it_is(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")
    for _ in range(2):  # as in a search over settings
        model = get_peft_model(tiny_model("bert"), config)
        Trainer(model, arguments(tmp_path), callbacks=[tsq.DynamicRankCallback()])
        assert {m.rank for m in lora_modules(model)} == {5}
        assert model.peft_config["default"].r == 5
    assert (config.r, config.rank_pattern) == (3, {})


def test_headroom_that_comes_too_late_is_refused() -> None:
    model, batch = bert(), tiny_batch("classification")
    optimizer = torch.optim.AdamW(model.parameters())
    model(**batch).loss.backward()
    optimizer.step()
    with pytest.raises(TrainingError, match=r"too late to make room.*optimizer has stepped"):
        tsq.DynamicRank(model, optimizer, 20, headroom=2)


def test_a_plan_of_other_modules_than_the_adapters_is_refused(tmp_path: Path) -> None:
    model = bert()
    sensitivity = tsq.layer_sensitivity(
        tiny_model("bert"), pool(), collate, target_modules=["query", "value"]
    )
    plan = tsq.allocate_ranks(sensitivity, mean_rank=2)
    with pytest.raises(ModelError, match="The adapter is on modules that the plan does not know"):
        tsq.DynamicRank(model, torch.optim.AdamW(model.parameters()), 20, plan)
    with pytest.raises(ModelError, match=r"modules that the adapter is not on: .*value"):
        Trainer(
            with_lora(tiny_model("bert"), "classification", target_modules=["key"]),
            arguments(tmp_path),
            train_dataset=pool(),
            callbacks=[tsq.DynamicRankCallback(plan)],
        )
