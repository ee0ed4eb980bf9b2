"""A Trainer that scores its samples as it trains on them, and draws the next epoch by that."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import processes
from tsqlora.artefacts import atomic_file
from tsqlora.cost import scored_inside
from tsqlora.early_learning import VISITS, beliefs, early_loss
from tsqlora.errors import ConfigError, TrainingError
from tsqlora.global_batches import SPARE
from tsqlora.judging import Judge
from tsqlora.losses import CLASSIFICATION, sample_losses, target_lengths
from tsqlora.measuring import as_numpy
from tsqlora.null import FREE
from tsqlora.online import OnlineScorer, first_of
from tsqlora.progress import tell
from tsqlora.quality import QualityScores
from tsqlora.recording import Recorder, sample_weights, summed_loss
from tsqlora.reported import of_samples
from tsqlora.run_folder import RunFolder
from tsqlora.scoring import Scorer
from tsqlora.selection import QualitySampler
from tsqlora.training import PoolTrainer
from tsqlora.visits import POSITION, Visits

STATE_FILE = "online.safetensors"
BELIEF = "belief"
REPORTED = "reported/"


@dataclass
class _Batch:
    """What a training forward has left; the backward completes `weights` where they are wanted."""

    columns: dict[str, Tensor]
    weights: Tensor

    def scaled(self, gradient: Tensor) -> None:
        """A hook on the loss: what accumulation and loss scaling multiply it by."""
        self.weights = self.weights * gradient


class OnlineTrainer(PoolTrainer):
    """Records every sample it trains on; `sampler` draws the first epoch, and is led from then on.

    What is drawn depends on (seed, epoch, what was recorded) alone, and what was recorded goes with
    every checkpoint. `training_step` gives parameters the gradients that they have anyway.

    Raises:
        ConfigError: FSDP, DeepSpeed, or several GPUs in one process.
    """

    def __init__(
        self, sampler: QualitySampler, scorer: Scorer, trusted: int = 0, **settings: Any
    ) -> None:
        rows: Dataset = settings["train_dataset"]
        settings["train_dataset"] = rows.add_column(POSITION, np.arange(len(rows)))
        settings["data_collator"] = _WithPositions(settings["data_collator"])
        super().__init__(sampler, **settings)
        refuse_shards(self.args, self.is_fsdp_enabled, self.is_deepspeed_enabled)
        batch_size = scorer.batch_size or self.args.per_device_train_batch_size
        scorer = replace(scorer, batch_size=batch_size)
        self.visits = Visits(len(rows))
        self.scoring = OnlineScorer(scorer, rows, self.kind, trusted)
        self.recorder: Recorder | None = None
        if scorer.wanted.terms:
            sketched = "convergence" in scorer.wanted.terms
            self.recorder = Recorder(self.model, sketched, scorer.seed)
        self.sampler.inclusion = self._inclusion()
        self.drawn_for, self.seconds = 0, 0.0
        self._batch: _Batch | None = None
        self.add_callback(_OnlineCallback(self))

    def scores(self) -> QualityScores:
        """The scores as of now; the same in all processes."""
        began = time.perf_counter()
        self.visits.settle()
        model: nn.Module = self.model
        scores = processes.from_main(lambda: self.scoring.scores(self.visits, model))
        self.seconds += time.perf_counter() - began
        return scores

    def redraw(self, epoch: int) -> None:
        """Draw `epoch` by the scores as of now."""
        scores = self.scores()
        self.sampler.probability, self.sampler.inclusion = scores.probability, self._inclusion()
        self.drawn_for, self.reported.samples = epoch, of_samples(scores, len(self.sampler))

    def close_window(self) -> None:
        """Judge the targets visited since the last time."""
        began = time.perf_counter()
        self.visits.settle()
        self.scoring.close_window(self.visits, self.model)
        self.seconds += time.perf_counter() - began

    @property
    def visited(self) -> int:
        """Visits of all processes so far."""
        each = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return self.state.global_step * each * processes.count()

    def _inclusion(self) -> np.ndarray | None:
        return None if self.recorder else self.scoring.inclusion()

    def online_state(self) -> dict[str, np.ndarray]:
        """What a resumed training needs."""
        numbers = {"drawn_for": self.drawn_for, "seconds": self.seconds}
        inclusion = self.sampler.inclusion
        return {
            **self.visits.state(),
            **self.scoring.state(),
            "probability": self.sampler.probability,
            "inclusion": np.zeros(0) if inclusion is None else inclusion,
            **{name: np.asarray([value], dtype=np.float64) for name, value in numbers.items()},
        }

    def load_online_state(self, state: dict[str, np.ndarray]) -> None:
        """Put `online_state` back."""
        self.visits.load(state)
        self.scoring.load(state)
        self.sampler.probability = state["probability"]
        self.sampler.inclusion = state["inclusion"] if len(state["inclusion"]) else None
        self.drawn_for, self.seconds = int(state["drawn_for"][0]), float(state["seconds"][0])

    def training_step(
        self, model: nn.Module, inputs: Any, *rest: Any, **named: Any
    ) -> torch.Tensor:
        """One forward and backward, recorded."""
        self._batch = None
        recorder = self.recorder
        with recorder.recording() if recorder else nullcontext():
            loss = super().training_step(model, inputs, *rest, **named)
            if self._batch is not None:
                found = dict(self._batch.columns)
                if recorder:
                    norms, sketches = recorder.take(self._batch.weights)
                    found |= {"gradient_norm": norms}
                    found |= {} if sketches is None else {"sketch": sketches}
                columns = {name: as_numpy(values) for name, values in found.items()}
                self.visits.add(self.sampler.epoch, columns)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss as ever; in training the samples' own ones are noted from the same logits."""
        positions = inputs.pop(POSITION, None)
        if positions is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        labels, spare = inputs["labels"], SPARE in inputs
        loss, outputs = super().compute_loss(model, inputs, True)
        if self.recorder:
            self.recorder.expect(len(labels))
        if not spare:
            logits = outputs["logits"]
            losses = sample_losses(self.kind, logits.detach(), labels)
            credit = self._credited(positions, logits, losses)
            columns = self._columns(positions, labels, losses, logits.detach())
            if self._believes:
                believed = beliefs(self._believed(positions, logits), logits)
                columns[BELIEF] = believed
                held = early_loss(believed, logits).sum() / self._averaged_over
                loss = loss + (held - held.detach())  # for its gradient; what is logged stays
            self._batch = _Batch(columns, credit)
            if self.recorder:
                shares = self._weights(labels, losses, logits.detach(), loss.detach())
                self._batch.weights = credit * shares
                loss.register_hook(self._batch.scaled)
        return (loss, outputs) if return_outputs else loss

    @property
    def _believes(self) -> bool:
        """Whether samples are held to what was believed of them early."""
        asked = self.scoring.scorer.quality.early_learning
        epochs: int = self.state.num_train_epochs
        return asked and self.kind == CLASSIFICATION and not self.recorder and epochs > VISITS

    def _believed(self, positions: Tensor, logits: Tensor) -> Tensor:
        """t_i (n, C) of the epochs before."""
        found = self.visits.last_of(BELIEF, as_numpy(positions))
        if found is None:
            return torch.zeros_like(logits, dtype=torch.float32)
        return torch.as_tensor(found, device=logits.device)

    @property
    def _averaged_over(self) -> float:
        """What a batch's sum is divided by to be its part of the step's mean, as the gradients of
        batches and processes are averaged after."""
        return self._targets / (self.current_gradient_accumulation_steps * processes.count())

    def _credited(self, positions: Tensor, logits: Tensor, losses: Tensor) -> Tensor:
        """w_i (n), by which each sample's gradient is multiplied on its way from the loss."""
        judge = self.scoring.judge
        if not isinstance(judge, Judge) or not judge.acting:
            return torch.ones_like(losses)
        found = judge.weights(*map(as_numpy, (positions, losses)))
        credit = torch.as_tensor(found, dtype=losses.dtype, device=losses.device)
        shape = (-1, *[1] * (logits.dim() - 1))
        logits.register_hook(lambda gradient: gradient * credit.view(shape).to(gradient.dtype))
        return credit

    def _columns(
        self, positions: Tensor, labels: Tensor, losses: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        lengths = target_lengths(self.kind, labels).clamp(min=1)
        columns = {POSITION: positions, "loss": losses, "length": lengths}
        if self.kind in FREE:
            columns |= {"label": labels, "output": logits.reshape(len(labels), -1)}
        return columns

    def _weights(self, labels: Tensor, losses: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """Each sample's share w_i of the step's loss (`recording.py`)."""
        lengths = target_lengths(self.kind, labels)
        total, smoothing = (losses * lengths).sum(), self.args.label_smoothing_factor
        if smoothing:
            total = summed_loss(self.kind, logits, labels, smoothing)
        return sample_weights(lengths, total, loss, self._averaged_over)


def pool_trainer(scorer: Scorer, trusted: int) -> Callable[..., PoolTrainer]:
    """The Trainer of `quality.mode`; so many rows at the end of the pool are trusted."""
    online = scorer.quality.mode == "online"
    return partial(OnlineTrainer, scorer=scorer, trusted=trusted) if online else PoolTrainer


def keep_scores(trainer: PoolTrainer, folder: RunFolder) -> None:
    """Write `scores.parquet` after an online training, and what its scores have cost."""
    if not isinstance(trainer, OnlineTrainer):
        return
    inside = trainer.seconds
    if trainer.kind in FREE:
        trainer.close_window()  # the part of an epoch since the last one: at no pass
    scores = first_of(trainer.scores(), trainer.scoring.pool)
    if processes.is_main():
        with atomic_file(folder.scores) as file:
            scores.to_parquet(file)
        scored_inside(folder, inside, trainer.seconds, trainer.scoring.spent)
        tell(f"    {scores.verdict}")


def refuse_shards(args: TrainingArguments, fsdp: bool, deepspeed: bool) -> None:
    """Samples are told apart in whole weights, a process a device.

    Raises:
        ConfigError: they are not.
    """
    if fsdp or deepspeed or args.n_gpu > 1:
        what = "FSDP" if fsdp else "DeepSpeed" if deepspeed else "several GPUs in one process"
        raise ConfigError(
            f"quality.mode: online does not go with {what}; launch a process a GPU without it, or "
            "use mode: upfront."
        )


class _OnlineCallback(TrainerCallback):
    """Leads the sampler from epoch to epoch; puts the state into checkpoints and takes it up."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the state; saved at an epoch's last step it has the next draw to come."""
        if state.global_step:
            saved = _folder(args, state) / STATE_FILE
            if not saved.exists():
                raise TrainingError(f"{saved} is missing: this checkpoint holds no online scores.")
            self.trainer.load_online_state(load_file(saved))
            self._lead(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The end of a window, in all processes at once."""
        if self.trainer.scoring.window_is_over(self.trainer.visited):
            self.trainer.close_window()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also called when a training is interrupted within an epoch."""
        self._lead(state)

    def _lead(self, state: TrainerState) -> None:
        complete = int((state.epoch or 0.0) + 1e-6)
        if complete > self.trainer.drawn_for and state.global_step < state.max_steps:
            self.trainer.redraw(complete)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the state beside the checkpoint."""
        self.trainer.visits.settle()
        folder = _folder(args, state)
        if state.is_world_process_zero and folder.is_dir():
            with atomic_file(folder / STATE_FILE) as file:
                save_file(self.trainer.online_state(), file)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


@dataclass(frozen=True)
class _WithPositions:
    """A collator that lets the samples' positions through; evaluation has none."""

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collator([{k: v for k, v in r.items() if k != POSITION} for r in rows]))
        if POSITION in rows[0]:
            batch[POSITION] = torch.tensor([row[POSITION] for row in rows])
        return batch
