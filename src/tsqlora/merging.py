"""The adapter added to the weights of its base: a plain model, a quantised base dequantised."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tsqlora.errors import ModelError
from tsqlora.lora_layers import LoraModule, adapted_layers, base_weight, is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def merged_model(model: PeftModel) -> PreTrainedModel:
    """W + scale · B A in every adapted module of a copy of the base, the adapter gone.

    Merging into 4 or 8 bits would round the adapter away, so a quantised base comes back in the
    precision it was quantised from. An embedding that is adapted or trained is no longer tied to
    the other one, which is not.

    Raises:
        ModelError: tied embeddings of an encoder-decoder are adapted; weights are not finite, or a
            bias of B has no place in the base.
    """
    whole = copy.deepcopy(model)
    base: Any = whole.get_base_model()
    _untie(base)
    try:
        if any(is_quantized(module) for module in base.modules()):
            return _dequantized(whole)
        return whole.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:  # not finite, or a bias without a place
        raise ModelError(f"The adapter cannot be merged: {error}") from error


def _untie(base: Any) -> None:
    if not getattr(base.config, "tie_word_embeddings", False):
        return
    wrapped = (LoraLayer, ModulesToSaveWrapper)
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if ends[1] is None or not any(isinstance(end, wrapped) for end in ends):
        return
    if getattr(base.config, "is_encoder_decoder", False):
        raise ModelError(
            f"The tied embeddings of {type(base).__name__} are adapted in one place only, which no "
            "merged model can say: export it as compact or padded."
        )
    for end in ends:
        inner = end.get_base_layer() if isinstance(end, LoraLayer) else end
        inner = inner.original_module if isinstance(inner, ModulesToSaveWrapper) else inner
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False


def _dequantized(whole: PeftModel) -> PreTrainedModel:
    layers = adapted_layers(whole, ("Linear", "Embedding"), "it cannot be merged into a plain one")
    quantized = {layer.name: _update(layer) for layer in layers if is_quantized(layer.base)}
    for layer in layers:
        if layer.name not in quantized:
            layer.layer.merge(safe_merge=True)
    base: Any = whole.unload()
    for name, module in list(base.named_modules()):
        if is_quantized(module):
            base.set_submodule(name, _plain(module, quantized.get(name)))
    for mark in _MARKS:
        base.__dict__.pop(mark, None)
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    return base


def _update(lora: LoraModule) -> tuple[Tensor, Tensor | None]:
    """What the adapter adds to the weight, and to the bias."""
    a, b = lora.a.weight.detach().float(), lora.b.weight.detach().float()
    bias = lora.b.bias
    return lora.scale * (b @ a), None if bias is None else lora.scale * bias.detach().float()


def _plain(module: nn.Module, update: tuple[Tensor, Tensor | None] | None) -> nn.Module:
    weight = base_weight(module)
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    if update is not None:
        weight = (weight.float() + update[0]).to(weight.dtype)
        if update[1] is not None:
            bias = update[1] if bias is None else bias + update[1]
    transposed = issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)  # as GPT-2 has them
    linear: Any
    if transposed:
        linear, weight = Conv1D(*weight.shape), weight.T
    else:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight), requires_grad=False)
    return linear
