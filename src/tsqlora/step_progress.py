"""A Trainer's steps told as all our progress is, with what it logs."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from tsqlora.progress import Progress, tell


class StepProgress(TrainerCallback):
    """In the place of the Trainer's own bar, which has no name and fills log files.

    `disable_tqdm` asks for lines instead of a bar.
    """

    def __init__(self, what: str) -> None:
        self.what, self._loss = what, ""
        self._steps: Progress | None = None
        self._batches: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, or go on from the checkpoint's step."""
        self.close()
        self._steps = self._progress(args, state, self.what, state.max_steps, "steps")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step more."""
        if self._steps is not None:
            self._steps(state.global_step - self._steps.done)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch more of an evaluation within the training."""
        if not has_length(loader := kwargs["eval_dataloader"]):
            return
        if self._batches is None:
            self._batches = self._progress(args, state, "evaluating", len(loader), "batches")
        self._batches()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The evaluation is over."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loss goes into the bar, or into the next line; what was evaluated has its own."""
        logs = kwargs["logs"]
        if "loss" in logs and self._steps is not None:
            self._steps.note = f"loss {logs['loss']:.4g}"
        if "train_loss" in logs:
            self._loss = f", mean loss {logs['train_loss']:.4g}"
        if "eval_loss" in logs and state.is_world_process_zero:
            tell(f"    step {state.global_step}: eval_loss {logs['eval_loss']:.4g}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what it took."""
        took = None if self._steps is None else self._steps.took()
        self.close()
        if took is not None and state.is_world_process_zero:
            tell(f"    {took}{self._loss}")

    def close(self) -> None:
        """Take the bars away, also after an error."""
        for each in filter(None, (self._batches, self._steps)):
            each.close(last=False)
        self._batches = self._steps = None

    def _progress(
        self, args: TrainingArguments, state: TrainerState, what: str, total: int, unit: str
    ) -> Progress:
        hidden = not state.is_world_process_zero
        done = state.global_step if unit == "steps" else 0
        return Progress(what, total, unit, None, done, bool(args.disable_tqdm), hidden)
