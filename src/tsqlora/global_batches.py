"""A Trainer whose steps do not depend on how many processes take them.

The batches of one process are shared out, without overlap or repetition, and every step minimises
the mean over the targets of all its samples: target tokens, or labels, whatever the number of
processes, of accumulated batches, or of samples that are left for the last step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import IntervalStrategy

from tsqlora import processes
from tsqlora.columns import column, in_python
from tsqlora.errors import ConfigError, TrainingError
from tsqlora.losses import SEQ2SEQ, infer_kind, target_lengths
from tsqlora.step_progress import StepProgress

SPARE = "tsqlora_spare"
"""In a batch that only keeps a process company which has no sample of its own."""

Rows = list[dict[str, Any]]


class Shares(Sampler[list[int]]):
    """What one of several processes takes of each batch that `sampler` gives them all together.

    A batch has `each` samples for every process; the last one is shared out as evenly as it can
    be, so some may get nothing of it. Together the shares are the sampler's order.
    """

    def __init__(
        self, sampler: Sampler[int], each: int, index: int, count: int, drop_last: bool = False
    ) -> None:
        self.sampler, self.each, self.drop_last = sampler, each, drop_last
        self.index, self.count = index, count

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for position in self.sampler:
            batch.append(position)
            if len(batch) == self.each * self.count:
                yield self._own(batch)
                batch = []
        if batch and not self.drop_last:
            yield self._own(batch)

    def __len__(self) -> int:
        samples, together = len(self.sampler), self.each * self.count  # type: ignore[arg-type]
        return samples // together if self.drop_last else -(-samples // together)

    def _own(self, batch: list[int]) -> list[int]:
        start, stop = (len(batch) * i // self.count for i in (self.index, self.index + 1))
        return batch[start:stop]


class RandomOrder(Sampler[int]):
    """All positions in a random order of each epoch's own, the one that accelerate gives them."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed, self.epoch = samples, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch's order the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.from_numpy(column(self.samples, np.int64))
        return in_python(torch.randperm(self.samples, generator=generator, out=order).numpy())

    def __len__(self) -> int:
        return self.samples


class GlobalBatchTrainer(Trainer):
    """A Trainer for models of the four kinds, with a map-style data set and batches with `labels`.

    transformers leaves it to each model to divide its loss by the targets of the whole step, which
    those with a loss of their own (BERT's, BART's, T5's) do not do: their loss comes out as many
    times too large as there are processes and accumulated batches.
    """

    def __init__(self, doing: str = "training", **settings: Any) -> None:
        super().__init__(**settings)
        for own in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(own)
        self.progress = StepProgress(doing)
        self.add_callback(self.progress)
        self.add_callback(_LastStep())
        self.model_accepts_loss_kwargs = False  # no model divides by itself
        self.kind = infer_kind(self.model)
        self._targets = 1.0

    def train(self, *args: Any, **named: Any) -> Any:
        """As the Trainer's; no bar is left by an error."""
        try:
            return super().train(*args, **named)
        finally:
            self.progress.close()

    def create_accelerator_and_postprocess(self) -> None:
        """Shards (FSDP2) on a CPU too where `fsdp` asks for it, and block by block.

        Raises:
            ConfigError: FSDP1 or ZeRO-3, whose parameters cannot be read and set in place.
        """
        if self.args.fsdp:
            processes.shard_on_cpu()
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:  # accelerate says so to all that comes after
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return
        if plugin.fsdp_version != 2:
            raise ConfigError(
                "training.fsdp: FSDP2 alone is supported; leave out `version`, or set it to 2 "
                "(accelerate: fsdp_version: 2)."
            )
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = _blocks(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's, but for one whose order of a large pool is not of Python's integers."""
        found = super()._get_train_sampler(train_dataset)
        if not isinstance(found, RandomSampler):
            return found
        seed = self.args.data_seed
        return RandomOrder(len(found), torch.initial_seed() if seed is None else seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of this process.

        Raises:
            TrainingError: transformers takes this for another number of processes than there are.
        """
        if processes.count() != self.args.world_size:
            raise TrainingError(
                f"{processes.count()} processes were launched, but transformers trains in "
                f"{self.args.world_size}: where there is no accelerator set use_cpu."
            )
        if processes.count() == 1:
            return super().get_train_dataloader()
        sampler = self._get_train_sampler(self.train_dataset)
        each, args = self._train_batch_size, self.args
        shares = Shares(
            sampler, each, processes.index(), processes.count(), args.dataloader_drop_last
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=shares,
            collate_fn=_Company(self.data_collator, self.train_dataset),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The batches of one step; counts the targets that all processes have in it.

        None once all steps are taken: resumed there, the Trainer would take one too many.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._targets = processes.total(sum(self._counted(batch) for batch in batches))
        return batches, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's mean over the batch; in training as a share of the mean over the step.

        Where labels are smoothed transformers keeps them from the model, which would then take a
        seq2seq's source for its target.
        """
        if self.label_smoother is not None and self.kind == SEQ2SEQ:
            shifted = self.model.prepare_decoder_input_ids_from_labels  # type: ignore[union-attr]
            inputs["decoder_input_ids"] = shifted(labels=inputs["labels"])  # type: ignore[operator]
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        share = self._counted(inputs) / max(self._targets, 1.0)
        inputs.pop(SPARE, None)
        # what the Trainer divides by, and DDP by averaging gradients over the processes
        share *= self.current_gradient_accumulation_steps * processes.count()
        found = super().compute_loss(model, inputs, return_outputs)
        if share == 1:
            return found
        return (found[0] * share, found[1]) if return_outputs else found * share

    def _counted(self, batch: dict[str, Any]) -> float:
        """The targets of a batch."""
        if SPARE in batch:
            return 0.0
        return float(target_lengths(self.kind, batch["labels"]).sum())


class _LastStep(TrainerCallback):
    """The last loss is logged whatever its number: what is not logged is of one process only."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for it."""
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True


def _blocks(model: nn.Module) -> list[str]:
    """The classes of a model's blocks, which are sharded one by one.

    Not those around the input embeddings, as transformers counts BERT's: accelerate shards the
    embeddings by themselves, and nothing can be sharded twice.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    around = {type(m).__name__ for m in model.modules() if embeddings in m.modules()}
    there = {type(m).__name__ for m in model.modules()} - around
    return sorted(there & set(getattr(model, "_no_split_modules", None) or ()))


class _Company:
    """A collator that gives a process without samples the first row, marked, to stay in step."""

    def __init__(self, collator: Callable[[Rows], Any], dataset: Dataset) -> None:
        self.collator, self.dataset = collator, dataset

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        if rows:
            return dict(self.collator(rows))
        return {**self.collator([self.dataset[0]]), SPARE: torch.ones(1)}
