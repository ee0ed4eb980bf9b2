"""Checkpoints of a Trainer: sealed when they are whole, found again, written when interrupted.

Whatever lies in a checkpoint's folder when it is saved is part of it: callbacks that come before
put their own state there.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tsqlora import processes
from tsqlora.artefacts import atomic_write_json, os_errors, read_json, remove
from tsqlora.interruption import handling, stop
from tsqlora.progress import tell
from tsqlora.seals import seal, why_broken

logger = logging.getLogger("tsqlora")

SECONDS = "seconds.json"
"""In a checkpoint: the seconds of training that led to it."""


def whole_checkpoints(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The whole checkpoints in order of their steps, and why the others are not.

    One whose best checkpoint so far is gone is none either: it could not end as it would have.
    """
    whole, broken = list[Path](), dict[Path, str]()
    for checkpoint in _by_step(folder):
        reason = why_broken(checkpoint)
        best = None if reason else _best(checkpoint)
        if best is not None and best not in {path.name for path in [*whole, checkpoint]}:
            reason = f"{best}, its best, is gone"
        if reason:
            broken[checkpoint] = reason
        else:
            whole.append(checkpoint)
    return whole, broken


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint to go on from; broken ones are removed with a warning."""
    whole, broken = whole_checkpoints(folder)
    for checkpoint, reason in broken.items():
        logger.warning("%s is skipped and removed: %s.", checkpoint, reason)
        remove(checkpoint)
    return whole[-1] if whole else None


def seconds_before(checkpoint: Path | None) -> float:
    """The seconds of training that led to `checkpoint`."""
    return 0.0 if checkpoint is None else float(read_json(checkpoint / SECONDS)["seconds"])


def train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, or go on from `checkpoint`; save on Ctrl-C and SIGTERM; seal what is saved.

    Raises:
        RunError: a checkpoint cannot be written.
        KeyboardInterrupt: after the checkpoint that the signal asked for.
    """
    interrupted = InterruptCallback()
    trainer.add_callback(interrupted)
    trainer.add_callback(SealCallback(seconds_before(checkpoint)))
    if checkpoint is not None:
        tell(f"    going on from step {_step(checkpoint)}")
    with os_errors(trainer.args.output_dir or "."), handling(interrupted.interrupt):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if interrupted.asked is not None:
        stop(interrupted.asked)


class InterruptCallback(TrainerCallback):
    """The first signal saves a checkpoint after the running step and stops; a second at once.

    Of several processes each may have got it between other steps, so they agree on one.

    Attributes:
        asked: the number of the signal that came.
    """

    def __init__(self) -> None:
        self.asked: int | None = None

    def interrupt(self, number: int, *_: object) -> None:
        """The handler of the signals."""
        if self.asked is not None:
            stop(number)
        self.asked = number
        name = signal.Signals(number).name
        logger.warning("%s: saving a checkpoint after this step; again: stop at once.", name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer to save and stop."""
        if args.world_size > 1:
            self.asked = processes.largest(self.asked or 0) or None
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A training that was stopped within an epoch has not ended it: an evaluation then would
        be one that a training left alone never makes, and what goes on after it another one."""
        if self.asked is not None and not math.isclose(state.epoch or 0, round(state.epoch or 0)):
            control.should_log = control.should_evaluate = control.should_save = False


class SealCallback(TrainerCallback):
    """Seals a checkpoint when everything in it is written, and finite; then removes the oldest.

    The Trainer would remove before it knows that the new one is whole.
    """

    def __init__(self, before: float) -> None:
        self.before, self.limit, self.over = before, 0, False
        self.started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the removal of old checkpoints; find the best one again in a moved folder."""
        self.over = state.global_step >= state.max_steps
        self.limit = args.save_total_limit or self.limit
        args.save_total_limit = None
        best = Path(args.output_dir or ".") / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing more happens where all steps were taken before."""
        if self.over:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last callback of a save."""
        if args.world_size > 1:
            processes.wait()  # each writes some of it
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        parameters = [p for p in kwargs["model"].parameters() if p.requires_grad]
        finite = all(bool(p.isfinite().all()) for p in parameters)
        if state.is_world_process_zero and folder.is_dir() and finite:
            seconds = self.before + time.perf_counter() - self.started
            atomic_write_json(folder / SECONDS, {"seconds": round(seconds, 3)})
            seal(folder)
            self._remove_oldest(folder, state.best_model_checkpoint)

    def _remove_oldest(self, newest: Path, best: str | None) -> None:
        there = _by_step(newest.parent)
        kept = {newest.name, Path(best or "").name}
        spare = [checkpoint for checkpoint in there if checkpoint.name not in kept]
        surplus = len(there) - self.limit if self.limit else 0
        for checkpoint in spare[: max(surplus, 0)]:
            remove(checkpoint)


def _by_step(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and _step(p).isdigit()]
    return sorted(found, key=lambda path: int(_step(path)))


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def _best(checkpoint: Path) -> str | None:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    step = state.get("best_global_step")
    return f"checkpoint-{step}" if step and state.get("best_model_checkpoint") else None
