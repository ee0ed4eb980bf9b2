"""What ranks that move cost against plain PEFT LoRA of the same mean rank, and what AdaLoRA costs.

Run: .venv/bin/python benchmarks/dynamics.py
Prints a table and writes benchmarks/results/dynamics.json. All arms train side by side in one
process, a step each in turn on the same batch, several times over; a step's time is the median of
its repetitions, and the figure is their mean over the whole training, moves and all. Memory:
weights, gradients, optimizer and the most alive at once in a short training, moves included, as in
benchmarks/scoring.py. AdaLoRA is called as PEFT documents it: `update_and_allocate` every step, its
regulariser in the loss.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import Case, cases_of, options_of, peak_memory, save, timed
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from tsqlora.adapter import active_ranks, add_headroom, check_plan, lora_config
from tsqlora.allocation import RankPlan, allocate_ranks
from tsqlora.batches import Batch
from tsqlora.callback import DynamicRankCallback
from tsqlora.dynamic_rank import DynamicRank
from tsqlora.lora_layers import PEFT_TASK_TYPES, resolve_targets, temporary_adapter
from tsqlora.losses import infer_kind
from tsqlora.sensitivity import WEIGHT_GRADIENT, Meter

RANK, SCALE = 8, 2.0
PLAIN, MOVING, COMPACTED, ADALORA = (
    "plain LoRA", "ranks that move", "the same, compacted when frozen", "AdaLoRA"
)  # fmt: skip
TARGETS = {MOVING: (1.02, 1.05)}
FROZEN = 0.6
"""From this part of the training on ranks stand still, AdaLoRA's too."""


@dataclass
class Arm:
    """A model in training; `between` comes after the backward, `after` after the optimizer."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    between: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None

    def step(self, batch: Batch) -> None:
        """One step, clipped as the Trainer does it."""
        self.model(**batch).loss.backward()
        self.between()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.after()
        self.optimizer.zero_grad()


Make = Callable[[nn.Module, RankPlan, str, int], Arm]


def _arm(model: nn.Module) -> Arm:
    assert isinstance(model, PeftModel)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Arm(model.train(), torch.optim.AdamW(trained, lr=1e-3))


def plain(base: nn.Module, plan: RankPlan, kind: str, steps: int) -> Arm:
    """Rank 8 in the same modules."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=int(SCALE * RANK),
        target_modules=sorted(plan.ranks),
        task_type=PEFT_TASK_TYPES[kind],
    )
    return _arm(get_peft_model(base, config))


def moving(compacted: bool) -> Make:
    """The plan, with the callback's own headroom and schedule."""

    def make(base: nn.Module, plan: RankPlan, kind: str, steps: int) -> Arm:
        model = get_peft_model(base, lora_config(plan, PEFT_TASK_TYPES[kind]))
        check_plan(model, plan)
        add_headroom(model, DynamicRankCallback().headroom)
        arm = _arm(model)
        ranks = DynamicRank(model, arm.optimizer, steps, plan)
        done = [not compacted]

        def between() -> None:
            ranks.step()
            if ranks.frozen and not done[0]:
                ranks.compact()
                done[0] = True

        arm.between = between
        return arm

    return make


def adalora(base: nn.Module, plan: RankPlan, kind: str, steps: int) -> Arm:
    """From 1.5 times the rank to the same, over the same part of the training."""
    config = AdaLoraConfig(
        init_r=RANK * 3 // 2,
        target_r=RANK,
        lora_alpha=int(SCALE * RANK),
        target_modules=sorted(plan.ranks),
        task_type=PEFT_TASK_TYPES[kind],
        tinit=max(1, steps // 10),
        tfinal=round(steps * (1 - FROZEN)),
        deltaT=max(1, min(10, steps // 20)),
        total_step=steps,
    )
    arm = _arm(get_peft_model(base, config))
    taken = iter(range(1, 10**9))
    arm.after = lambda: arm.model.base_model.update_and_allocate(next(taken))
    return arm


ARMS: dict[str, Make] = {
    PLAIN: plain,
    MOVING: moving(compacted=False),
    COMPACTED: moving(compacted=True),
    ADALORA: adalora,
}


def planned(model: nn.Module, kind: str, batches: list[Batch]) -> RankPlan:
    """The plan of the paper's rule on these batches, mean rank 8."""
    targets = resolve_targets(model, kind, "all-linear")
    with temporary_adapter(model, kind, 1, target_modules=targets) as adapted:
        meter = Meter(adapted.eval(), kind, WEIGHT_GRADIENT)
        for batch in batches:
            meter.add(batch, np.arange(len(batch["labels"])))
    samples = sum(len(batch["labels"]) for batch in batches)
    return allocate_ranks(meter.result(samples), mean_rank=RANK, scale=SCALE)


def measure(case: Case, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of every arm on one model."""
    base, given = case
    kind, base = infer_kind(base), base.to(options.device)
    batches = [{k: v.to(options.device) for k, v in batch.items()} for batch in given]
    plan = planned(base, kind, batches)
    times: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    for _ in range(options.repeats):
        arms = {n: make(copy.deepcopy(base), plan, kind, options.steps) for n, make in ARMS.items()}
        for name in ARMS:
            times[name].append([])
        for step in range(options.steps):
            batch = batches[step % len(batches)]
            turn = list(arms)[step % len(arms) :] + list(arms)[: step % len(arms)]
            for name in turn:
                call = arms[name].step
                times[name][-1].append(timed(lambda c=call, b=batch: c(b), options.device))
    frozen = round(options.steps * FROZEN) + 1
    results: dict[str, dict[str, Any]] = {}
    for name in ARMS:
        steps = [statistics.median(each) for each in zip(*times[name], strict=True)]
        results[name] = {
            "seconds": statistics.mean(steps),
            "seconds_frozen": statistics.mean(steps[frozen:]),
            "bytes": memory(base, plan, kind, batches[0], name, options.device),
        }
    moved = active_ranks(arms[MOVING].model)
    results[MOVING]["components_moved"] = sum(
        abs(moved.get(name, 0) - rank) for name, rank in plan.ranks.items()
    )
    return results


def memory(base: nn.Module, plan: RankPlan, kind: str, batch: Batch, name: str, device: str) -> int:
    """Peak bytes of a short training, its moves included."""
    arm = ARMS[name](copy.deepcopy(base), plan, kind, 10)

    def call() -> None:
        for _ in range(3):
            arm.step(batch)

    return peak_memory(call, arm.model, device)


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    """One table: ratios to plain LoRA, and the targets."""
    base = results[PLAIN]
    print(f"\n{title}: plain LoRA {base['seconds']:.3f} s a step, {base['bytes'] / 2**20:.0f} MiB")
    for name, found in results.items():
        for figure in ("seconds", "seconds_frozen", "bytes"):
            found[f"{figure}_ratio"] = found[figure] / base[figure]
        wanted = "  at most {:.2f}, {:.2f}".format(*TARGETS[name]) if name in TARGETS else ""
        print(
            f"  {name:32} {found['seconds_ratio']:.3f}x time (frozen: "
            f"{found['seconds_frozen_ratio']:.3f}x) {found['bytes_ratio']:.3f}x memory{wanted}"
        )


def main() -> None:
    """Measure, print, save."""
    parser = options_of(__doc__.splitlines()[0], "dynamics.json")
    parser.add_argument("--steps", type=int, default=100)
    parser.set_defaults(repeats=2, batch_size=8)
    options = parser.parse_args()
    for name, case in cases_of(options).items():
        figures = measure(case(), options)
        show(name, figures)
        save(options, name, figures)


if __name__ == "__main__":
    main()
