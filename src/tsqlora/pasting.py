"""A rank plan as text to paste into a script or the configuration of another trainer.

What each of them takes was read from its source (docs/serving.md says which): PEFT and axolotl have
patterns, LLaMA-Factory has none and takes ranks by module only from an adapter that is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from tsqlora.adapter import lora_config
from tsqlora.allocation import RankPlan
from tsqlora.errors import ConfigError

PEFT, AXOLOTL, LLAMAFACTORY = "peft", "axolotl", "llamafactory"
TRAINERS = (PEFT, AXOLOTL, LLAMAFACTORY)


def paste(plan: RankPlan, trainer: str, untrained: Path, like: LoraConfig | None = None) -> str:
    """The text for `trainer`; `untrained` is the plan as an adapter, for those without patterns.

    `like` is the plan as PEFT's configuration, with task, modules trained whole and dropout.

    Raises:
        ConfigError: the trainer is unknown, or the plan adapts no module.
    """
    if trainer not in TRAINERS:
        raise ConfigError(f"Unknown format {trainer!r}: {', '.join(TRAINERS)}.")
    config = like or lora_config(plan)
    fields = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules or ()),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        **_beside(config),
    }
    title = (
        f"# {plan.parameters} of {plan.budget} parameters, {len(plan.adapted)} of "
        f"{len(plan.ranks)} modules, alpha / r = {plan.scale:g} in each\n"
    )
    return title + _WRITERS[trainer](fields, untrained)


def _beside(config: LoraConfig) -> dict[str, Any]:
    """What an adapter has beside its ranks, where it has it."""
    names = ("task_type", "modules_to_save", "lora_dropout")
    return {name: value for name in names if (value := getattr(config, name))}


def _peft(fields: Mapping[str, Any], untrained: Path) -> str:
    inner = "".join(f"    {key}={_python(value)},\n" for key, value in fields.items())
    return f"LoraConfig(\n{inner})"


def _python(value: Any) -> str:
    if isinstance(value, dict):
        lines = [f"        {key!r}: {each!r},\n" for key, each in value.items()]
        return f"{{\n{''.join(lines)}    }}" if lines else "{}"
    if isinstance(value, list):
        return f"[\n{''.join(f'        {each!r},{chr(10)}' for each in value)}    ]"
    return repr(value)


def _axolotl(fields: Mapping[str, Any], untrained: Path) -> str:
    alphas = [fields["lora_alpha"], *fields["alpha_pattern"].values()]
    note = (
        "# The patterns need an axolotl with its pull request 3673 (May 2026). An older one takes\n"
        f"# these ranks from an adapter that is there: lora_model_dir: {_yaml(str(untrained))}\n"
    )
    if any(alpha != int(alpha) for alpha in alphas):
        note += "# axolotl takes whole alphas only: give adapter.scale as a whole number.\n"
    lines = [
        "adapter: lora",
        f"lora_r: {fields['r']}",
        f"lora_alpha: {fields['lora_alpha']}",
        "lora_target_modules:",
        *(f"  - {_yaml(name)}" for name in fields["target_modules"]),
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        if fields[key]:
            lines.append(f"lora_{key}:")
            lines += [f"  {_yaml(name)}: {value}" for name, value in fields[key].items()]
    if whole := fields.get("modules_to_save"):
        lines += ["lora_modules_to_save:", *(f"  - {_yaml(name)}" for name in whole)]
    if dropout := fields.get("lora_dropout"):
        lines.append(f"lora_dropout: {dropout}")
    return note + "\n".join(lines)


def _llamafactory(fields: Mapping[str, Any], untrained: Path) -> str:
    return (
        "# LLaMA-Factory has no key for ranks by module: lora_rank and lora_alpha hold for all.\n"
        "# It goes on with an adapter that is there, and keeps that one's ranks:\n"
        "finetuning_type: lora\n"
        f"adapter_name_or_path: {_yaml(str(untrained))}\n"
        "create_new_adapter: false"
    )


def _yaml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_WRITERS = {PEFT: _peft, AXOLOTL: _axolotl, LLAMAFACTORY: _llamafactory}
