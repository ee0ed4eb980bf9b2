"""Plain LoRA, on rows of one's choice, in an order and with weights of one's choice."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice, starmap
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from evidence_cell import RANK, SCALE, Cell, Outcome
from evidence_data import write_cell
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, set_seed

from tsqlora.batches import Collator, subset
from tsqlora.finished import measure
from tsqlora.inputs import Inputs
from tsqlora.lora_layers import wrap
from tsqlora.losses import infer_kind, sample_losses
from tsqlora.selection import draw_size, length_grouped
from tsqlora.training import GROUPED, training_arguments
from tsqlora.two_parts import uniform_config


@dataclass
class Plain:
    """Plain LoRA training, with the places where rivals differ.

    Attributes:
        rows: which of the encoded pool is trained on; None for all.
        order: rounds of positions, endless, given the trainer; None for all of them shuffled.
        adapter: the PEFT model; None for uniform LoRA.
        weigh: weights of a batch's samples in the loss, given (positions, losses).
        callbacks: the Trainer's.
        extra_passes: what was spent before or beside the steps.
    """

    cell: Cell
    rank: int = RANK
    rows: Callable[[Dataset], Dataset] | None = None
    order: Callable[[IndexedTrainer], Iterator[np.ndarray]] | None = None
    adapter: Callable[[Inputs, int], PeftModel] | None = None
    weigh: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    callbacks: tuple[TrainerCallback, ...] = ()
    extra_passes: float = 0.0

    def run(self) -> Outcome:
        """Train, measure on validation and test."""
        started = time.perf_counter()
        config = self.cell.config(ranks={"mean_rank": self.rank}, adapter={"scale": SCALE})
        inputs = Inputs(config)
        pool = inputs.splits.train
        rows = self.rows(pool) if self.rows else pool
        rows = rows.add_column("position", list(range(len(rows))))
        set_seed(config.seed)
        model = (self.adapter or uniform)(inputs, self.rank)  # which may count extra passes
        steps = max(1, self.cell.steps - math.ceil(self.extra_passes / self.cell.task.batch))
        settings = {**config.training, "max_steps": steps}
        trainer = IndexedTrainer(
            model=model,
            args=training_arguments(settings, self.cell.folder / "plain", config.seed),
            train_dataset=rows,
            data_collator=indexed(inputs.task.collate),
            callbacks=list(self.callbacks),
        )
        trainer.order, trainer.weigh = self.order, self.weigh
        trainer.plain_collate = inputs.task.collate
        trainer.train()
        seconds = time.perf_counter() - started
        trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        found = {
            name: measure(config, inputs.task, model, split)
            for name, split in measured_splits(self.cell, inputs).items()
        }
        passes = steps * self.cell.task.batch + self.extra_passes
        return Outcome(found, passes, seconds, trained)


class IndexedTrainer(Trainer):
    """A Trainer that knows which samples a batch holds."""

    order: Callable[[IndexedTrainer], Iterator[np.ndarray]] | None = None
    weigh: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    plain_collate: Collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.order is None and self.args.train_sampling_strategy != GROUPED:
            return super()._get_train_sampler(train_dataset)
        return Endless(self, self.args.max_steps * self.args.train_batch_size)

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        positions = inputs.pop("position").cpu().numpy()
        if self.weigh is None:
            return super().compute_loss(model, inputs, *rest, **named)
        kind, labels = infer_kind(model), inputs["labels"]
        losses = sample_losses(kind, model(**inputs).logits, labels)
        weights = torch.as_tensor(self.weigh(positions, losses.detach().cpu().numpy())).to(losses)
        return (losses * weights).mean()


@dataclass
class Endless(Sampler[int]):
    """One long epoch of so many draws; rounds are made as they are asked for, and put in batches of
    like lengths where the Trainer would."""

    trainer: IndexedTrainer
    draws: int

    def __iter__(self) -> Iterator[int]:
        rounds = enumerate((self.trainer.order or shuffled)(self.trainer))
        yield from islice(chain.from_iterable(starmap(self._grouped, rounds)), self.draws)

    def _grouped(self, number: int, positions: np.ndarray) -> list[int]:
        args, rows = self.trainer.args, self.trainer.train_dataset
        drawn = positions.tolist()
        if args.train_sampling_strategy != GROUPED:
            return drawn
        lengths = [len(ids) for ids in rows.select(drawn)["input_ids"]]
        order = length_grouped(lengths, args.train_batch_size, args.seed + number)
        return [drawn[i] for i in order]

    def __len__(self) -> int:
        return self.draws


def measured_splits(cell: Cell, inputs: Inputs) -> dict[str, Dataset]:
    """Validation, test, and where the condition makes some rows rare those of test."""
    splits = dict(inputs.splits.measured)
    if cell.data.rare:
        splits["rare"] = splits["test"].select(cell.data.rare)
    return splits


def shuffled(trainer: IndexedTrainer) -> Iterator[np.ndarray]:
    """Every row once a round."""
    rng = np.random.default_rng(trainer.args.seed)
    while True:
        yield rng.permutation(len(trainer.train_dataset))


def indexed(collate: Callable[[list[dict[str, Any]]], Any]) -> Callable[..., Any]:
    """`collate` with the samples' `position` beside."""

    def both(features: list[dict[str, Any]]) -> Any:
        return {**collate(features), "position": torch.tensor([f["position"] for f in features])}

    return both


def uniform(inputs: Inputs, rank: int) -> PeftModel:
    """PEFT's LoRA of one rank everywhere."""
    base = inputs.base_model()
    return wrap(base, uniform_config(inputs.config, base))


def lora(cell: Cell) -> Outcome:
    """Plain LoRA on all data."""
    return Plain(cell).run()


def lora_r4(cell: Cell) -> Outcome:
    """Plain LoRA of half the rank."""
    return Plain(cell, RANK // 2).run()


def lora_random(cell: Cell) -> Outcome:
    """Plain LoRA on a random half, as many steps."""
    return Plain(cell, rows=lambda pool: subset(pool, draw_size(len(pool), 0.5), cell.seed)).run()


def oracle(cell: Cell) -> Outcome:
    """Plain LoRA on the rows that are neither wrong nor copies."""
    return Plain(cell, rows=lambda pool: pool.select(_sound(cell, pool))).run()


def informed(cell: Cell) -> Outcome:
    """Plain LoRA on as many of the sound rows as all rows' targets are `worth`, nothing wrong in
    them: what whoever made the most of the damaged ones could hope for."""
    return Plain(cell, rows=lambda pool: pool.select(_informed(cell, pool))).run()


def informed_trusted(cell: Cell) -> Outcome:
    """The same, with the trusted rows."""
    size = len(cell.data.train)

    def rows(pool: Dataset) -> Dataset:
        known = range(size, len(pool))
        return pool.select([*_informed(cell, pool.select(range(size))), *known])

    return Plain(and_trusted(cell), rows=rows).run()


def with_trusted(method: Callable[[Cell], Outcome]) -> Callable[[Cell], Outcome]:
    """The method on all data and the trusted rows, at the budget of the data alone."""
    return lambda cell: method(and_trusted(cell))


def and_trusted(cell: Cell) -> Cell:
    """The trusted rows are the last of train, rows like the others."""
    size = len(cell.data.train)
    known = [{"id": size + i, **row} for i, row in enumerate(cell.data.trusted)]
    data = replace(cell.data, train=[*cell.data.train, *known])
    folder = cell.folder / "with_trusted"
    write_cell(data, folder / "data")
    return replace(cell, data=data, folder=folder, epochs=Fraction(cell.budget, len(data.train)))


def worth(classes: int, wrong: float) -> float:
    """What a target tells that is wrong with probability ρ, of what a right one tells.

    1 − (H(ρ) + ρ ln(K − 1)) / ln K: the capacity of a symmetric channel over K classes (Cover and
    Thomas, Elements of Information Theory, §7.2), in units of ln K.
    """
    unsure = -sum(p * math.log(p) for p in (wrong, 1 - wrong) if p > 0)
    return 1 - (unsure + wrong * math.log(classes - 1)) / math.log(classes)


def _informed(cell: Cell, pool: Dataset) -> list[int]:
    sound, targets = _sound(cell, pool), {row[cell.task.target] for row in cell.data.train}
    share = worth(len(targets), len(cell.data.wrong) / len(pool))
    return sorted(random.Random(cell.seed).sample(sound, round(share * len(pool))))


def _sound(cell: Cell, pool: Dataset) -> list[int]:
    bad = cell.data.wrong | cell.data.copies
    return [position for position, number in enumerate(pool["id"]) if number not in bad]
