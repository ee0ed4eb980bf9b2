"""How serving engines apply a LoRA adapter, from their sources; neither tsqlora nor PEFT is used.

Each rule gives the factor before B A. Sources: vLLM `lora/peft_helper.py` (up to 0.30: one scale,
the patterns not read); PEFT `get_pattern_key`, which vLLM's per-module form follows; llama.cpp
`convert_lora_to_gguf.py` (one `adapter.lora.alpha`) and `llama-adapter.h` (`get_scale`: alpha over
the tensor's own rank); TGI `adapters/lora.py` (a kind of module is left out where a layer lacks
it); SGLang `lora_config.py` (overrides are read and then rejected).
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."
Config = dict[str, Any]


class Refused(Exception):
    """The engine does not load such an adapter."""


def vllm(config: Config, module: str, rank: int) -> float:
    if config["modules_to_save"]:
        raise Refused("vLLM only supports modules_to_save being None.")
    root = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return config["lora_alpha"] / root


def vllm_per_module(config: Config, module: str, rank: int) -> float:
    def of(pattern: str, default: float) -> float:
        found = (v for k, v in config[pattern].items() if re.match(rf"(.*\.)?({k})$", module))
        return next(found, default)

    own = of("rank_pattern", config["r"])
    assert own == rank, f"{module}: the file has rank {rank}, the configuration {own}"
    alpha = of("alpha_pattern", config["lora_alpha"])
    root = math.sqrt(own) if config["use_rslora"] else own
    return vllm({**config, "r": 1, "lora_alpha": alpha, "use_rslora": False}, module, rank) / root


def llama_cpp(config: Config, module: str, rank: int) -> float:
    return config["lora_alpha"] / rank


def sglang(config: Config, module: str, rank: int) -> float:
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if any(value != config[default] for value in config[pattern].values()):
            raise Refused(f"{pattern} is not supported")
    return vllm(config, module, rank)


ENGINES: dict[str, Callable[[Config, str, int], float]] = {
    "vllm": vllm,
    "vllm-per-module": vllm_per_module,
    "llama.cpp": llama_cpp,
    "tgi": vllm,
    "sglang": sglang,
}


def served(engine: str, folder: Path, base: Any) -> Any:
    """A copy of `base` with the adapter of `folder` added as that engine would."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    factors = _pairs(tensors)
    if engine == "tgi":
        factors = {m: pair for m, pair in factors.items() if not _lacking(m, factors, base)}
    model = copy.deepcopy(base)
    with torch.no_grad():
        for module, (a, b) in factors.items():
            target = model.get_submodule(module)
            delta = (b.double() @ a.double()) * ENGINES[engine](config, module, len(a))
            if isinstance(target, Conv1D | nn.Embedding):  # whose weights are (in, out)
                delta = delta.T
            target.weight += delta.to(target.weight)
    return model


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
        if found is None:
            if ".base_layer." in name:
                continue  # all of them skip the base's own weights
            raise Refused(f"Unexpected name {name!r}: not a lora_A or lora_B tensor")
        pairs.setdefault(found[1], {})[found[2]] = tensor
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


def _lacking(module: str, factors: dict[str, Any], base: Any) -> bool:
    pattern = re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(module))
    kin = (name for name, _ in base.named_modules() if re.fullmatch(pattern, name))
    return any(name not in factors for name in kin)
