"""DeepSpeed's configuration: what goes with ranks that move, filled up from the training's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tsqlora.errors import ConfigError

_AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
"""What transformers then takes from the other keys of `training`."""
_REFUSED = {
    "optimizer": "set training.optim, learning_rate, weight_decay and adam_beta1 instead",
    "scheduler": "set training.lr_scheduler_type and warmup_steps instead",
    "tensor_parallel": "leave it out",
    "amp": "set training.bf16 or fp16 instead",
    "torch_autocast": "set training.bf16 or fp16 instead",
    "zero_optimization.offload_param": "leave it out, it is for stage 3",
    "zero_optimization.offload_optimizer": "leave it out; the state of LoRA factors is small",
    "zero_optimization.zenflow": "leave it out",
}


def deepspeed_settings(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """`training.deepspeed`, a mapping or a JSON file, filled up; None where there is none.

    Raises:
        ConfigError: DeepSpeed is not installed; the file cannot be read; the stage or another key
            does not go with ranks that move.
    """
    given = training.get("deepspeed")
    if not given:
        return None
    settings = _read(given)
    zero = settings.setdefault("zero_optimization", {})
    problems = [
        f"training.deepspeed: {name} is not supported: {instead}."
        for name, instead in _REFUSED.items()
        if _set(settings, name)
    ]
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage == 3:
        problems.append(
            "training.deepspeed: ZeRO-3 shards the parameters too, and ranks are moved in whole "
            "ones: use stage 2, or `fsdp: true`, which shards them (docs/parallel.md)."
        )
    elif stage not in (0, 1, 2):
        problems.append(
            f"training.deepspeed: zero_optimization.stage must be 0, 1 or 2, not {stage!r}."
        )
    elif stage == 0 and _in_16_bits(training, settings):
        problems.append(
            "training.deepspeed: in 16 bits stage 0 keeps the optimizer's state where it cannot be "
            "reached: use stage 1 or 2."
        )
    if find_spec("deepspeed") is None:
        problems.append("training.deepspeed needs DeepSpeed: pip install 'tsqlora[deepspeed]'.")
    if problems:
        raise ConfigError.of(problems)
    return {**_AUTO, **settings}


def check_by_deepspeed(filled: Any) -> None:
    """Have DeepSpeed read what transformers has filled up, before anything long.

    Raises:
        ConfigError: it names other values than the rest of `training`, or DeepSpeed refuses it.
    """
    if filled.mismatches:
        raise ConfigError.of(
            [f"training.deepspeed: {x.removeprefix('- ')}" for x in filled.mismatches]
        )
    # the product of the others and of the processes, whom it does not know yet
    settings = {k: v for k, v in deepcopy(filled.config).items() if k != "train_batch_size"}
    try:
        import_module("deepspeed.runtime.config").DeepSpeedConfig(settings)
    except Exception as error:  # whatever is raised behind a key, the user mends it
        raise ConfigError(f"training.deepspeed: {error}") from error


def _read(given: Any) -> dict[str, Any]:
    if isinstance(given, (str, Path)):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"training.deepspeed: {given} cannot be read: {error}") from error
    if not isinstance(given, Mapping):
        raise ConfigError("training.deepspeed must be a mapping, or the path of a JSON file.")
    return dict(given)


def _set(settings: Mapping[str, Any], name: str) -> bool:
    found: Any = settings
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    off = found.get("device") == "none" if isinstance(found, Mapping) else False
    return bool(found) and not off


def _in_16_bits(training: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    enabled = [(settings.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16")]
    return True in enabled or bool(training.get("bf16") or training.get("fp16"))
