"""When ranks move, and which components: the plan made again from what training shows.

Over a short window before each reallocation the importance of every component and the demand of
every module are taken from the gradients that the backward has left (`observing.py`).

A new target plan is allocated within the same budget in proportion to √(planned rank · √demand
share); the least important components of modules above their target are pruned and modules below
it grow, at most `move_share` of the budget at once. Ranks freeze after the last reallocation.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tsqlora import processes
from tsqlora.adapter import (
    active,
    active_ranks,
    add_headroom,
    check_adapts,
    compact,
    forget,
    grow,
    physical_ranks,
    prune,
    require_early,
)
from tsqlora.allocation import RankPlan, allocate_ranks
from tsqlora.directions import FreshRows
from tsqlora.errors import TrainingError
from tsqlora.lora_layers import lora_modules
from tsqlora.observing import Observed, Observer
from tsqlora.optimizer_state import check_trains, check_understood, is_quantised
from tsqlora.sensitivity import LayerSensitivity
from tsqlora.sharded import has_gradient

logger = logging.getLogger("tsqlora")


@dataclass(frozen=True)
class RankSchedule:
    """Reallocations at equal distances between `start` and `end`, as parts of the training.

    Attributes:
        start, end: parts of the total steps; outside, ranks stand still.
        moves: how many reallocations.
        window: steps before each over which gradients are averaged.
        move_share: the most of the budget that moves at once.
    """

    start: float = 0.1
    end: float = 0.6
    moves: int = 5
    window: int = 8
    move_share: float = 0.1

    def steps(self, total: int) -> list[int]:
        """The 1-based steps at which ranks move, all different, none in the last part."""
        span = (self.end - self.start) / max(self.moves - 1, 1)
        raw = {round(total * (self.start + span * i)) for i in range(self.moves)}
        return sorted(step for step in raw if 1 <= step < total)


@dataclass(frozen=True)
class Reallocation:
    """One move of ranks: a line of `ranks.jsonl`."""

    step: int
    ranks: dict[str, int]
    pruned: dict[str, int]
    grown: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As in `ranks.jsonl`."""
        return {"step": self.step, "ranks": self.ranks, "pruned": self.pruned, "grown": self.grown}


class DynamicRank:
    """Moves ranks while training, within the budget at every step.

    In a loop of one's own, once an optimizer step, after its last backward::

        ranks = DynamicRank(model, optimizer, total_steps=n, headroom=2)
        loss.backward(); ranks.step(); optimizer.step(); optimizer.zero_grad()

    `headroom` is how many components more every module may grow to; with none a module takes back
    only what it lost. It is made here, so before the optimizer has stepped and before accelerate or
    DistributedDataParallel gets the model. With a `plan` the budget and first ranks are the plan's.
    With a `sensitivity` that has directions a grown component takes its module's next one. No
    module is pruned below `min_rank`, nor below 1.

    Gradients may be clipped and scaled (GradScaler) before or after; steps that a loss scaler skips
    are not looked at. The learning rate and its schedule are not touched.

    Attributes:
        planned: the first rank of every module, which the budget comes from.
        history: every reallocation so far.

    Raises:
        ModelError: the model has no LoRA adapter, or not the plan's.
        TrainingError: the optimizer does not train the factors, total_steps < 1, or it is too late
            for headroom.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        total_steps: int,
        plan: RankPlan | None = None,
        schedule: RankSchedule | None = None,
        seed: int = 0,
        headroom: int = 0,
        sensitivity: LayerSensitivity | None = None,
        min_rank: int = 0,
    ) -> None:
        if total_steps < 1:
            raise TrainingError(f"total_steps = {total_steps}: ranks need to know the length.")
        if plan is not None:
            check_adapts(model, plan)
        if headroom:
            require_early(model, optimizer)
            add_headroom(model, headroom)
        self.model, self.modules, self.min_rank = model, lora_modules(model), min_rank
        self.optimizer, self.rows = optimizer, FreshRows(self.modules, sensitivity, seed)
        self._understood = self._drifts = False
        self.schedule = schedule or RankSchedule()
        self.moves_at = self.schedule.steps(total_steps)
        self.taken = 0
        self.history: list[Reallocation] = []
        check_trains(self.modules, optimizer)
        ranks = plan.adapted if plan is not None else active_ranks(model)
        self.planned = {m.name: ranks.get(m.name, 0) for m in self.modules}
        self.observer = Observer(self.modules)
        self._idle = self._pruned()
        if not any(map(len, self._idle.values())):
            logger.warning("No module has room to grow: give DynamicRank some headroom.")

    @property
    def budget(self) -> int:
        """The adapter parameters never exceeded: the plan's, or what was active at the start."""
        return sum(self.planned[m.name] * sum(m.shape) for m in self.modules)

    def step(self) -> Reallocation | None:
        """Look at the gradients; move ranks when it is time. Call after backward, before the
        optimizer's step. Returns what moved, or None.

        Raises:
            TrainingError: no factor has a gradient, all are zero over a whole window, or the
                optimizer's state is not understood.
        """
        if not any(has_gradient(m.b.weight) for m in self.modules):
            raise TrainingError(
                "No LoRA factor has a gradient: call DynamicRank.step() after backward and before "
                "optimizer.step() and zero_grad(), and see that the adapter is trainable."
            )
        if not self._understood:  # it has no state before its first step
            self._understood = check_understood(self.optimizer, self._parameters())
            self._drifts = is_quantised(self.optimizer, self._parameters())
        if self._drifts:
            for module in self.modules:
                forget(module, self._idle[module.name], self.optimizer)
        self.taken += 1
        coming = next((s for s in self.moves_at if s >= self.taken), None)
        if coming is None or self.taken <= coming - self.schedule.window:
            return None
        self.observer.add()
        return self._reallocate() if self.taken == coming else None

    @property
    def current(self) -> dict[str, int]:
        """The rank of every module now."""
        return self.history[-1].ranks if self.history else self.planned

    @property
    def frozen(self) -> bool:
        """Whether ranks have moved for the last time."""
        return self.taken >= max(self.moves_at, default=0)

    def compact(self) -> None:
        """Give back the memory and time of all pruned components, once ranks are frozen.

        Factors, gradients and optimizer state are cut to the active ranks; parameters stay the same
        objects. To be called where `step` may be, or between optimizer steps.

        Raises:
            TrainingError: ranks still move, several processes train the model (they hold buffers of
                the old shapes), or the optimizer's state cannot be cut.
        """
        if not self.frozen:
            last = max(self.moves_at)
            raise TrainingError(f"Ranks move until step {last}: compact them after it.")
        if processes.count() > 1:
            raise TrainingError(
                "Ranks are compacted in a single process only, as others hold gradients in the old "
                "shapes: leave out ranks.compact; the exported adapter is compact anyway."
            )
        compact(self.model, self.optimizer)
        self.observer.clear()
        self._idle = self._pruned()

    def note_return(self) -> Reallocation | None:
        """Note as a last move that the model was given an earlier state back, if it was.

        As the Trainer does at the end with its best checkpoint.
        """
        before = self.current
        ranks = active_ranks(self.model)
        if ranks == before:
            return None
        pruned = {n: before[n] - rank for n, rank in ranks.items() if rank < before[n]}
        grown = {n: rank - before[n] for n, rank in ranks.items() if rank > before[n]}
        self.history.append(Reallocation(self.taken, ranks, pruned, grown))
        return self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the weights; JSON-able."""
        return {
            "planned": self.planned,
            "physical": physical_ranks(self.model),
            "taken": self.taken,
            "observed": self.observer.state_dict(),
            "given": self.rows.given,
            "history": [move.to_dict() for move in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken.

        Raises:
            TrainingError: the model, which holds its weights already, has other ranks than then.
        """
        if state["physical"] != physical_ranks(self.model):
            raise TrainingError(
                "The checkpoint's factors have other ranks than the model's: it was compacted, or "
                "made with another headroom or plan. DynamicRankCallback(resume_from=checkpoint) "
                "gives the model the checkpoint's shapes."
            )
        self.planned, self.taken = dict(state["planned"]), state["taken"]
        self.observer.load_state_dict(state["observed"])
        self.rows.given = {**self.rows.given, **state.get("given", {})}
        self.history = [Reallocation(**move) for move in state["history"]]
        if active_ranks(self.model) != self.current:
            raise TrainingError(
                "The weights have other ranks than this state: load them first, and from the same "
                "checkpoint, which DynamicRankCallback(resume_from=checkpoint) names."
            )
        self._idle = self._pruned()

    def _pruned(self) -> dict[str, Tensor]:
        return {m.name: (~active(m)).nonzero().flatten() for m in self.modules}

    def _parameters(self) -> list[nn.Parameter]:
        return [f.get_parameter("weight") for m in self.modules for f in (m.a, m.b)]

    def _reallocate(self) -> Reallocation | None:
        observed = self._agreed(self.observer.read())
        self.observer.clear()
        if not observed.steps:
            logger.warning("No gradient before step %d was finite: ranks stay.", self.taken)
            return None
        current = active_ranks(self.model)
        target = self._target(current, observed.demand)
        pruned, freed = self._prune_above(current, target, observed)
        grown = self._grow_below(current, target, freed)
        if not pruned and not grown:
            return None
        self._idle = self._pruned()
        ranks = active_ranks(self.model)
        self.history.append(Reallocation(self.taken, ranks, pruned, grown))
        return self.history[-1]

    def _agreed(self, own: Observed) -> Observed:
        """Of several processes all decide by what the first has observed, which all must have."""
        alive = {m.name: active(m).tolist() for m in self.modules}
        (first, observed), *others = processes.gather((alive, own))
        if any(mask != first or not observed.alike(other) for mask, other in others):
            raise TrainingError(
                f"The processes differ in ranks or gradients at step {self.taken}: train the model "
                "under DistributedDataParallel, FSDP2 or ZeRO, with one seed and plan in all, and "
                "call DynamicRank.step() after the last backward of the step."
            )
        return observed

    def _target(self, current: dict[str, int], demand: dict[str, float]) -> dict[str, int]:
        """The plan made again: weights √(planned rank · √demand share), caps the physical ranks."""
        total = sum(demand.values()) or 1.0
        weights = {
            name: (self.planned[name] * (demand[name] / total) ** 0.5) ** 0.5 for name in current
        }
        shapes = {m.name: m.shape for m in self.modules if weights[m.name] > 0}
        floor = max(self.min_rank, 1)
        fixed = sum(current[m.name] * sum(m.shape) for m in self.modules if m.name not in shapes)
        sensitivity = LayerSensitivity("demand", {n: weights[n] for n in shapes}, shapes)
        most = {m.name: m.rank for m in self.modules}
        left = self.budget - fixed
        if not shapes or left < floor * sum(map(sum, shapes.values())):
            return current
        plan = allocate_ranks(sensitivity, None, left, min_rank=floor, max_rank=most)
        return {**current, **plan.ranks}

    def _prune_above(
        self, current: dict[str, int], target: dict[str, int], observed: Observed
    ) -> tuple[dict[str, int], int]:
        """Prune the least important components over target, most `move_share` of the budget."""
        candidates = []
        for module in self.modules:
            over = current[module.name] - target[module.name]
            alive = active(module).cpu().nonzero().flatten().tolist()
            scores = observed.importance[module.name].tolist()
            for component in sorted(alive, key=lambda j: (scores[j], j))[: max(over, 0)]:
                value = scores[component] / sum(module.shape)
                candidates.append((value, module.name, component, module))
        freed, pruned = 0, dict[str, int]()
        for _, name, component, module in sorted(candidates, key=lambda c: c[:3]):
            if freed + sum(module.shape) > self.schedule.move_share * self.budget:
                break
            prune(module, [component], self.optimizer)
            freed += sum(module.shape)
            pruned[name] = pruned.get(name, 0) + 1
        return pruned, freed

    def _grow_below(
        self, current: dict[str, int], target: dict[str, int], freed: int
    ) -> dict[str, int]:
        """Grow modules below target, the furthest below first, within budget."""
        used = sum(current[m.name] * sum(m.shape) for m in self.modules) - freed
        left = min(self.budget - used, max(freed, int(self.schedule.move_share * self.budget)))
        grown: dict[str, int] = {}
        wanting = [m for m in self.modules if target[m.name] > current[m.name]]
        while wanting:
            wanting.sort(
                key=lambda m: (-(target[m.name] - current[m.name] - grown.get(m.name, 0)), m.name)
            )
            module = wanting[0]
            free = (~active(module)).nonzero().flatten().tolist()
            short = target[module.name] - current[module.name] - grown.get(module.name, 0)
            if not free or short <= 0 or sum(module.shape) > left:
                wanting.pop(0)
                continue
            row = self.rows.take(module, free[0], self.taken)
            grow(module, free[:1], self.optimizer, row[None])
            left -= sum(module.shape)
            grown[module.name] = grown.get(module.name, 0) + 1
        return grown
