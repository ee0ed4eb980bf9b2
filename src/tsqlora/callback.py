"""Dynamic ranks in a `transformers.Trainer`: forwards its events, holds no logic."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora import processes
from tsqlora.adapter import (
    add_headroom,
    check_adapts,
    physical_ranks,
    require_early,
    set_physical_ranks,
)
from tsqlora.allocation import RankPlan
from tsqlora.dynamic_rank import DynamicRank, RankSchedule, Reallocation
from tsqlora.errors import TrainingError
from tsqlora.lora_layers import lora_modules
from tsqlora.reported import Figures, of_ranks
from tsqlora.sensitivity import LayerSensitivity
from tsqlora.zero import before_steps

STATE_FILE = "dynamic_rank.json"


class DynamicRankCallback(TrainerCallback):
    """Gives every adapted module some headroom, then moves ranks while the Trainer trains.

    Pass it to the Trainer's constructor, `callbacks=[DynamicRankCallback()]`: room is made before
    the optimizer exists. Its state goes with every checkpoint and comes back on resume.

    Args:
        plan: the budget and first ranks; without one, what the adapter holds at the start.
        headroom: further components each module may grow to.
        schedule: when ranks move.
        seed: of the rows that grown components start from, where there are no directions.
        sensitivity: whose directions they start from.
        compact: once ranks are frozen, give back the memory and time of pruned components; in a
            single process only.
        resume_from: the checkpoint the Trainer will resume from; needed where it was compacted.
        bounds: the lowest and the highest rank that a module may come to (None: by headroom).
        on_moves: called with all reallocations so far whenever there is a new one, and on resume.

    Raises:
        ModelError: the model has no LoRA adapter, or not the plan's.
        TrainingError: added after the Trainer was built, or never called while training.
    """

    def __init__(
        self,
        plan: RankPlan | None = None,
        headroom: int = 2,
        schedule: RankSchedule | None = None,
        seed: int = 0,
        on_moves: Callable[[Sequence[Reallocation]], None] | None = None,
        compact: bool = False,
        resume_from: str | Path | None = None,
        sensitivity: LayerSensitivity | None = None,
        bounds: tuple[int, int | None] = (0, None),
    ) -> None:
        self.bounds = bounds
        self.plan, self.headroom, self.schedule, self.seed = plan, headroom, schedule, seed
        self.on_moves, self.compact, self.resume_from = on_moves, compact, resume_from
        self.sensitivity = sensitivity
        self.ranks: DynamicRank | None = None
        self._room: dict[str, int] | None = None
        self._inside = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make room, before any optimizer or data-parallel wrapper sees the parameters."""
        model: nn.Module = kwargs["model"]
        lora_modules(model)
        if self.plan is not None:
            check_adapts(model, self.plan)
        if self.resume_from is None:
            add_headroom(model, self.headroom, self.bounds[1])
        else:
            set_physical_ranks(model, _read(Path(self.resume_from))["physical"])
        self._room = physical_ranks(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, or take up the checkpoint's state."""
        if self._room is None:
            raise TrainingError(
                "DynamicRankCallback came too late: pass it to the Trainer's constructor, "
                "Trainer(..., callbacks=[DynamicRankCallback()])."
            )
        if self.compact and args.load_best_model_at_end:
            raise TrainingError(
                "load_best_model_at_end would load a checkpoint of other shapes after ranks were "
                "compacted: leave out one of the two."
            )
        if physical_ranks(kwargs["model"]) != self._room:  # model_init has made it anew
            self._make_room(kwargs["model"], kwargs["optimizer"], state)
        self.ranks = DynamicRank(
            kwargs["model"],
            kwargs["optimizer"],
            state.max_steps,
            self.plan,
            self.schedule,
            self.seed,
            sensitivity=self.sensitivity,
            min_rank=self.bounds[0],
        )
        if state.global_step:
            here = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            self.ranks.load_state_dict(_read(Path(self.resume_from or here)))
        self._inside = before_steps(kwargs["optimizer"], self._before_step)
        self._tell()

    def _make_room(self, model: nn.Module, optimizer: Optimizer, state: TrainerState) -> None:
        if state.global_step or processes.count() > 1:
            raise TrainingError(
                "model_init has made the model again, without room for ranks to grow, and it is "
                "too late for that on resume and in several processes: give the Trainer model=, or "
                "DynamicRankCallback(headroom=0)."
            )
        require_early(model, optimizer)
        add_headroom(model, self.headroom, self.bounds[1])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are there, the optimizer has not stepped yet, unless DeepSpeed has."""
        if not self._inside:
            self._before_step()

    def figures(self, since: int | None = None) -> Figures:
        """Where ranks stand, to be logged: `ranks/mean`, `ranks/min`, `ranks/max`,
        `ranks/budget_used`; every `rank/MODULE` too where one has moved since that step.

        A Trainer of one's own passes it on, and every integration gets it::

            def log(self, logs, *rest):
                super().log({**logs, **self.dynamic.figures()}, *rest)

        Nothing while there is neither a plan nor a training yet.
        """
        plan, moving = self.plan, self.ranks
        if moving is None:
            if plan is None:
                return {}
            return of_ranks(plan.ranks, plan.shapes, plan.budget, since is None)
        ranks, budget = moving.current, moving.budget
        shapes = {module.name: module.shape for module in moving.modules}
        if plan is not None:  # it knows the modules without an adapter
            ranks, shapes, budget = {**plan.ranks, **ranks}, plan.shapes, plan.budget
        moved = since is None or any(move.step > since for move in moving.history)
        return of_ranks(ranks, shapes, budget, moved)

    def _before_step(self) -> None:
        assert self.ranks is not None
        move = self.ranks.step()
        if move is not None:
            self._tell()
        if self.compact and self.ranks.frozen:
            self.ranks.compact()
            self.compact = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the state beside the checkpoint."""
        assert self.ranks is not None
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            text = json.dumps(self.ranks.state_dict())
            (folder / STATE_FILE).write_text(text, encoding="utf-8")

    def _tell(self) -> None:
        if self.on_moves is not None and self.ranks is not None:
            self.on_moves(self.ranks.history)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing silently does nothing; the best checkpoint brings its own ranks."""
        if self.ranks is None or (state.global_step and not self.ranks.taken):
            raise TrainingError("Training ended but DynamicRankCallback never saw a step.")
        if args.load_best_model_at_end and self.ranks.note_return() is not None:
            self._tell()


def _read(checkpoint: Path) -> dict[str, Any]:
    saved = checkpoint / STATE_FILE
    if not saved.exists():
        raise TrainingError(
            f"{saved} is missing: this checkpoint holds no dynamic ranks. Where another is resumed "
            "from, name it: DynamicRankCallback(resume_from=...)."
        )
    state: dict[str, Any] = json.loads(saved.read_text(encoding="utf-8"))
    return state
