"""The models that a run trains: under the first adapter, and under the planned one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from tsqlora import processes
from tsqlora.adapter import check_plan, lora_config, warm_start
from tsqlora.allocation import RankPlan
from tsqlora.artefacts import atomic_folder
from tsqlora.config import RunConfig
from tsqlora.directions import start_from_gradient
from tsqlora.export import export_adapter
from tsqlora.initial import InitialAdapter
from tsqlora.lora_layers import PEFT_TASK_TYPES, lora_modules, wrap
from tsqlora.losses import CAUSAL_LM, SEQ2SEQ
from tsqlora.progress import tell
from tsqlora.rank_rules import MARGINAL_GAIN
from tsqlora.run_folder import RunFolder
from tsqlora.sensitivity import LayerSensitivity
from tsqlora.tasks import auto_model
from tsqlora.two_parts import uniform_config


def initial_adapter(config: RunConfig) -> InitialAdapter | None:
    """The adapter of `adapter.init`, checked against the model's architecture; None without one.

    Raises:
        ModelError: it is no LoRA adapter of this model, or not of the modules that are asked for.
    """
    if config.adapter.init is None:
        return None
    found = InitialAdapter.read(config.adapter.init)
    found.check(config, auto_model(config.task))
    return found


def along_gradient(config: RunConfig) -> bool:
    """Whether fresh components begin along the mean gradient: `adapter.start`."""
    generates = config.task in (SEQ2SEQ, CAUSAL_LM)
    return config.adapter.start == "gradient" or (config.adapter.start == "auto" and generates)


def first_model(config: RunConfig, base: PreTrainedModel) -> PeftModel:
    """`base` under the adapter that is briefly adapted: `adapter.init`, or a uniform one."""
    initial = initial_adapter(config)
    if initial is None:
        return wrap(base, uniform_config(config, base))
    return initial.load(base, config.scale)


def planned_config(config: RunConfig, plan: RankPlan) -> LoraConfig:
    """The plan's adapter as PEFT has it, with what the run trains whole."""
    initial = initial_adapter(config)
    whole = config.adapter.modules_to_save if initial is None else initial.modules_to_save
    return lora_config(plan, PEFT_TASK_TYPES[config.task], whole, config.adapter.dropout)


def untrained_model(
    config: RunConfig,
    base: PreTrainedModel,
    plan: RankPlan,
    sensitivity: LayerSensitivity | None = None,
) -> PeftModel:
    """`base` under the plan's adapter, B = 0, A along the directions of `sensitivity`, if given."""
    set_seed(config.seed)
    model = wrap(base, planned_config(config, plan))
    check_plan(model, plan)
    if sensitivity is not None:
        start_from_gradient(model, sensitivity)
    return model


def spectrum_of(config: RunConfig) -> int:
    """How many singular values and directions the run takes with the sensitivity."""
    wanted = along_gradient(config) or config.ranks.rule == MARGINAL_GAIN
    return config.ranks.max_rank if wanted else 0


def measured_files(config: RunConfig, folder: RunFolder) -> list[Path]:
    """What the measurement of the sensitivity leaves."""
    return [folder.sensitivity, *([folder.directions] if spectrum_of(config) else [])]


def first_directions(config: RunConfig, folder: RunFolder) -> LayerSensitivity | None:
    """The measured sensitivity, whose directions fresh components take; None for `random`."""
    return LayerSensitivity.load(folder.sensitivity) if along_gradient(config) else None


def save_untrained(model: PeftModel, folder: Path) -> None:
    """Write `untrained_model`, for trainers that have no key for ranks by module."""

    def write() -> None:
        with atomic_folder(folder) as written:
            export_adapter(model, written)

    processes.from_main(write)


def planned_model(
    config: RunConfig,
    base: PreTrainedModel,
    plan: RankPlan,
    state: Mapping[str, Tensor],
    sensitivity: LayerSensitivity | None,
) -> PeftModel:
    """`base` under the plan's adapter, begun from the first one's `trainable_state`.

    Components that it leaves fresh begin along the directions of `sensitivity`, if given.
    """
    model = untrained_model(config, base, plan)
    warm_start(model, state)
    if sensitivity is not None:
        start_from_gradient(model, sensitivity)
    if config.adapter.init is not None:
        factors = [state[n] for n in sorted(state) if "lora_" in n]
        there = sum(map(_square, factors[::2], factors[1::2]))
        kept = sum(_square(m.a.weight, m.b.weight) for m in lora_modules(model))
        tell(f"    the plan keeps {100 * kept / (there or 1):.1f} % of ‖BA‖² of adapter.init")
    return model


def _square(a: Tensor, b: Tensor) -> float:
    """‖BA‖² from the small products."""
    a, b = a.detach().float(), b.detach().float()
    return float(((b.T @ b) * (a @ a.T)).sum())


def trained_parameters(model: PeftModel, plan: RankPlan) -> int:
    """The plan's parameters and those of modules_to_save; headroom, always zero, is not counted."""
    others = (
        p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n
    )
    return plan.parameters + sum(others)
