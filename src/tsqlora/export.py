"""A trained adapter in the forms that other programs load: compact, padded, merged.

What each engine makes of them is in docs/serving.md; tests/test_export.py computes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from tsqlora import processes
from tsqlora.adapter import active, changes_base, set_patterns
from tsqlora.batches import unwrapped
from tsqlora.errors import ConfigError, ModelError
from tsqlora.lora_layers import LoraModule, adapted_layers, clone_config
from tsqlora.merging import merged_model
from tsqlora.sharded import is_sharded, whole
from tsqlora.targets import is_linear

FORMATS = ("compact", "padded", "merged")


@dataclass(frozen=True)
class _Exported:
    """One module's factors A (r, in), B (out, r), and the bias of B where there is one."""

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")

    @property
    def rank(self) -> int:
        return len(self.a)

    def padded(self, rank: int) -> _Exported:
        return replace(self, a=_pad(self.a, rank, 0), b=_pad(self.b, rank, 1))

    def tensors(self, module: str) -> Iterator[tuple[str, Tensor]]:
        prefix = f"base_model.model.{module}"
        yield f"{prefix}.{self.names[0]}", self.a
        yield f"{prefix}.{self.names[1]}", self.b
        if self.bias is not None:
            yield f"{prefix}.lora_B.bias", self.bias


def export_adapter(model: nn.Module, folder: str | Path, format: str = "compact") -> Path:
    """Write the trained adapter so that it loads without tsqlora; returns the folder.

    `compact`: every module's true rank, `rank_pattern`, one scale alpha / r for all; for PEFT and
    vLLM. `padded`: one rank everywhere, filled up with zeros, no patterns, and zeros for the layers
    that only some of their kind lack: right in every loader, llama.cpp, TGI and SGLang among them,
    where `compact` is not. `merged`: the plain model, the adapter added to its weights and a
    quantised base dequantised. Where modules had different scales, B takes up the difference. The
    model itself is left as it is. Where it lies in shards (FSDP2) all processes must call this; the
    first writes.

    Raises:
        ConfigError: the format is unknown.
        ModelError: the model is no `PeftModel` with an active LoRA adapter, or its adapter cannot
            be told from its base.
    """
    if format not in FORMATS:
        raise ConfigError(f"Unknown export format {format!r}: compact, padded or merged.")
    model = unwrapped(model)
    layers = adapted_layers(
        model, ("Linear", "Embedding"), "it cannot be exported without its model"
    )
    if not isinstance(model, PeftModel):
        raise ModelError("Only a peft.PeftModel can be exported: adapt it by peft.get_peft_model.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "merged":
        if is_sharded(model):
            raise ModelError(
                "A model in shards (FSDP) cannot be merged in place: export it as compact and "
                "merge that, `tsqlora export RUN --format merged`."
            )
        merged_model(model).save_pretrained(folder)
        return folder
    tensors, config = _packed(model, layers, padded=format == "padded")
    if is_sharded(model) and not processes.is_main():
        return folder  # all have gathered, one writes
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return folder


def _packed(
    model: PeftModel, layers: list[LoraModule], padded: bool
) -> tuple[dict[str, Tensor], LoraConfig]:
    adapter = layers[0].adapter
    config = clone_config(model.peft_config[adapter])
    if changes_base(config):
        raise ModelError(
            f"init_lora_weights = {config.init_lora_weights} changed the base's own weights, so "
            "the adapter means nothing on the untouched base: export it as merged."
        )
    scale = max(layer.scale for layer in layers) or 1.0
    exported = {layer.name: _factors(layer, layer.scale / scale) for layer in layers}
    if not any(each.rank for each in exported.values()):
        exported[layers[0].name] = exported[layers[0].name].padded(1)  # PEFT knows no empty adapter
    if padded:
        most = max(each.rank for each in exported.values())
        exported = {name: each.padded(most) for name, each in exported.items()}
        exported |= dict(_lacking(model, layers, most, config.lora_bias))
    kept = {name: each for name, each in exported.items() if each.rank}
    set_patterns(config, {n: each.rank for n, each in kept.items()}, dict.fromkeys(kept, scale))
    config.target_modules = sorted(kept)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.init_lora_weights, config.inference_mode = True, True
    return _tensors(model, adapter, kept), config


def _tensors(model: PeftModel, adapter: str, kept: dict[str, _Exported]) -> dict[str, Tensor]:
    """The factors, and what else PEFT saves: modules_to_save, trained biases and the like."""
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    state = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, each in kept.items():
        state.update(each.tensors(name))
    return {name: whole(t.detach()).cpu().contiguous().clone() for name, t in state.items()}


def _factors(lora: LoraModule, factor: float) -> _Exported:
    """The factors without components that are zero, B times `factor`."""
    layer, adapter = lora.layer, lora.adapter
    if adapter in layer.lora_embedding_A:
        a = whole(layer.lora_embedding_A[adapter].detach())
        b = whole(layer.lora_embedding_B[adapter].detach())
        names = ("lora_embedding_A", "lora_embedding_B")
        return _Exported(a, b if factor == 1 else b * factor, names=names)
    mask = active(lora)
    bias: Tensor | None = None if lora.b.bias is None else whole(lora.b.bias.detach())
    if bias is not None and not mask.any():
        mask[0] = True  # the bias has no home without it
    a, b = whole(lora.a.weight.detach())[mask], whole(lora.b.weight.detach())[:, mask]
    if factor != 1:
        b, bias = b * factor, None if bias is None else bias * factor
    return _Exported(a, b, bias)


def _lacking(
    model: PeftModel, layers: list[LoraModule], rank: int, with_bias: bool
) -> Iterator[tuple[str, _Exported]]:
    """Zeros for every module that is not adapted though its namesakes in other layers are.

    TGI leaves out all modules of a kind of which one layer is missing.
    """
    names = {layer.name for layer in layers}
    kinds = {_kind(name) for name in names}
    like = torch.zeros(0)
    for name, module in model.get_base_model().named_modules():
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if name in names or _kind(name) not in kinds or not is_linear(base):
            continue
        shape = _shape(base)
        a, b = like.new_zeros(rank, shape[1]), like.new_zeros(shape[0], rank)
        yield name, _Exported(a, b, like.new_zeros(shape[0]) if with_bias else None)


def _shape(module: Any) -> tuple[int, int]:
    """(out, in); the weight itself may be packed into 4 bits."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.weight.shape[1], module.weight.shape[0]


def _kind(name: str) -> str:
    """The name without the numbers of its layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _pad(tensor: Tensor, rank: int, dimension: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dimension] = rank - shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension)
