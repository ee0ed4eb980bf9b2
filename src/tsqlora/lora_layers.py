"""What PEFT's LoRA layers look like inside: the only module that reads their attributes.

Shape letters, here and in every module that touches tensors: N samples, T positions, r rank,
`in` and `out` the widths of a target module, whose factors are A (r, in) and B (out, r).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, PeftType
from torch import Tensor, nn

from tsqlora.errors import ModelError
from tsqlora.heads import HEADS, head_modules
from tsqlora.losses import CAUSAL_LM, CLASSIFICATION, REGRESSION, SEQ2SEQ
from tsqlora.targets import linear_names, resolve_targets

PEFT_TASK_TYPES = {
    CLASSIFICATION: "SEQ_CLS",
    REGRESSION: "SEQ_CLS",
    SEQ2SEQ: "SEQ_2_SEQ_LM",
    CAUSAL_LM: "CAUSAL_LM",
}


@dataclass(frozen=True)
class LoraModule:
    """One adapted module and its two factors: y = base(x) + scale · B A x."""

    name: str
    layer: LoraLayer
    adapter: str

    @property
    def a(self) -> nn.Linear:
        """The module that holds A (r, in)."""
        return self.layer.lora_A[self.adapter]

    @property
    def b(self) -> nn.Linear:
        """The module that holds B (out, r)."""
        return self.layer.lora_B[self.adapter]

    @property
    def base(self) -> nn.Module:
        """The frozen module that is adapted."""
        return self.layer.get_base_layer()

    @property
    def scale(self) -> float:
        """The factor before B A."""
        return float(self.layer.scaling[self.adapter])

    @property
    def rank(self) -> int:
        """Rows of A, whether they are zero or not."""
        return int(self.a.weight.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the adapted module."""
        return int(self.b.weight.shape[0]), int(self.a.weight.shape[1])

    def set_rank(self, rank: int, scale: float | None = None) -> None:
        """Tell PEFT the physical rank; the scale alpha / r stays as it is, or becomes `scale`."""
        scale = self.scale if scale is None else scale
        self.layer.scaling[self.adapter] = scale
        self.layer.r[self.adapter] = rank
        self.layer.lora_alpha[self.adapter] = scale * rank
        self.a.out_features = self.b.in_features = rank


def lora_modules(model: nn.Module) -> list[LoraModule]:
    """Every linear module that the active LoRA adapter of `model` adapts, in the model's order.

    Raises:
        ModelError: no LoRA adapter, several active, or a layer without a rank of its own to plan
            and move (embeddings, expert parameters, DoRA and other variants).
    """
    return adapted_layers(model, ("Linear",), "its rank cannot be planned or moved")


def adapted_layers(model: nn.Module, kinds: Sequence[str], because: str) -> list[LoraModule]:
    """Every layer that the active LoRA adapter adapts, all of these `kinds` (class names begin so).

    Raises:
        ModelError: no LoRA adapter, several active, merged or disabled ones, an adapter other than
            LoRA, or a layer of another kind, `because`.
    """
    refuse_other_adapters(model)
    found, problems = [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        active = [a for a in layer.active_adapters if a in layer.r]
        if layer.merged or layer.disable_adapters:
            problems.append(f"{name}: {_asleep(layer)} first")
            continue
        if len(active) > 1:
            problems.append(f"{name}: {len(active)} adapters are active at once; activate one")
        elif active:
            problems += _unsupported(name, layer, active[0], kinds, because)
            found.append(LoraModule(_base_name(name), layer, active[0]))
    if problems:
        raise ModelError.of(problems)
    if not found:
        raise ModelError(
            "The model has no active LoRA adapter: wrap it with "
            "peft.get_peft_model(model, tsqlora.lora_config(plan)) first."
        )
    return found


def refuse_other_adapters(model: nn.Module) -> None:
    """Only LoRA has factors to measure, plan and move.

    Raises:
        ModelError: `model` carries a PEFT adapter of another kind, which is named.
    """
    carries = isinstance(model, PeftModel | PeftMixedModel)
    if not carries and not getattr(model, "_hf_peft_config_loaded", False):
        return
    configs: dict[str, PeftConfig] = model.peft_config  # type: ignore[assignment]
    kinds = {each.peft_type for each in configs.values()}
    others = sorted(str(getattr(kind, "value", kind)) for kind in kinds - {PeftType.LORA})
    if others:
        raise ModelError(
            f"The model carries an adapter of kind {', '.join(others)}; only LoRA is supported: "
            "take it off with unload() or merge_and_unload(), then adapt the base model by LoRA."
        )


def _asleep(layer: LoraLayer) -> str:
    if layer.merged:
        return "its factors are merged into the weight; call unmerge_adapter()"
    return "its adapter is disabled; call enable_adapter_layers()"


def _unsupported(
    name: str, layer: LoraLayer, adapter: str, kinds: Sequence[str], because: str
) -> list[str]:
    kind = type(layer).__name__
    if layer.lora_variant.get(adapter) is not None:
        variant = type(layer.lora_variant[adapter]).__name__
        return [f"{name}: {variant} (such as use_dora) is not supported; use plain LoRA or rsLoRA"]
    if isinstance(layer, LoraLinear) or kind.startswith(tuple(kinds)):
        return []
    setting = "target_modules"
    if kind == "ParamWrapper":  # which PEFT also makes of experts' names among the modules
        setting = "target_parameters, or its name out of target_modules"
    return [f"{name}: {kind} is not supported, {because}; leave it out of {setting}"]


def _base_name(name: str) -> str:
    """The module's name in the model that was adapted, without PEFT's and torch.compile's own."""
    return name.replace("_orig_mod.", "").removeprefix("base_model.model.")


def has_lora(model: nn.Module) -> bool:
    """Whether any module of `model` carries LoRA factors."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The factors A and B of every adapted module, A before B, in the model's order."""
    modules = lora_modules(model)
    return [linear.get_parameter("weight") for m in modules for linear in (m.a, m.b)]


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's own weight is packed into 4 or 8 bits by bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a target module as (out, in), dequantised where it is quantised."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if is_quantized(module):
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                "bitsandbytes has repacked the 4-bit weights for inference on this CPU, for good: "
                "load the model again, and do not run it in eval mode before it is measured."
            )
        weight = _unpacked(module)
    transposed = type(module).__name__ == "Conv1D"
    return weight.detach().T if transposed else weight.detach()


def _unpacked(module: Any) -> Tensor:
    weight = module.weight
    if type(weight).__name__ == "Int8Params":  # PEFT's way leaves the layer without its scales
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.detach() * (scales / 127)[:, None]
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


def wrap(model: nn.Module, config: LoraConfig) -> PeftModel:
    """`get_peft_model` whose complaints are a `ModelError` naming what can be targeted.

    A classifier's head is trained and saved whole, also where PEFT does not know its name. Every
    name must match, where PEFT is content with one of them.
    """
    if config.task_type == PEFT_TASK_TYPES[CLASSIFICATION]:
        unknown = [name for name in head_modules(model) if not name.endswith(HEADS)]
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *unknown}) or None
    _require_matches(model, config)
    kinds = sorted({n.rsplit(".", 1)[-1] for n in linear_names(model)})
    try:
        return get_peft_model(model, config)
    except (ValueError, KeyError, TypeError, re.error) as error:
        raise ModelError(
            f"adapter.target_modules = {_shown(config.target_modules)} cannot be adapted in "
            f"{type(model).__name__}: {str(error).splitlines()[0]} Linear modules there end in: "
            f"{', '.join(kinds) or 'none'}; or use all-linear."
        ) from error


def _require_matches(model: nn.Module, config: LoraConfig) -> None:
    """PEFT takes a name for every module whose dotted name ends in it."""
    parts = [name.split(".") for name, _ in model.named_modules()]
    known = {".".join(names[i:]) for names in parts for i in range(len(names))}
    targets = () if isinstance(config.target_modules, str) else config.target_modules or ()
    saved = set(config.modules_to_save or ()) - set(HEADS)  # which PEFT adds unasked
    wanted = {"target_modules": targets, "modules_to_save": saved}
    problems = [
        f"adapter.{field}: {type(model).__name__} has no module {name!r}. Module names there end "
        f"in: {_leaves(model)}."
        for field, names in wanted.items()
        for name in sorted(set(names) - known)
    ]
    if problems:
        raise ModelError.of(problems)


def _leaves(model: nn.Module) -> str:
    """The last parts of the names of all modules with weights of their own."""
    owners = (
        n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    )
    return ", ".join(sorted({n.rsplit(".", 1)[-1] for n in owners}))


def _shown(targets: str | Iterable[str] | None) -> str:
    if isinstance(targets, str):
        return targets
    return ", ".join(sorted({name.rpartition(".")[2] for name in targets or ()}))


@contextmanager
def temporary_adapter(
    model: nn.Module,
    kind: str,
    rank: int = 8,
    scale: float = 2.0,
    target_modules: str | Sequence[str] = "all-linear",
) -> Iterator[PeftModel]:
    """`model` under a fresh LoRA adapter (B = 0) that is gone afterwards, base weights untouched.

    A classification head gets a trainable copy (PEFT's modules_to_save); the original comes back
    bit-equal, as do `requires_grad` of every parameter and the training mode.
    """
    refuse_other_adapters(model)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    training = model.training
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        target_modules=resolve_targets(model, kind, target_modules),
        task_type=PEFT_TASK_TYPES[kind],
    )
    adapted = wrap(model, config)
    originals = _saved_originals(model)
    try:
        yield adapted
    finally:
        adapted.unload()
        for name, original in originals.items():
            model.set_submodule(name, original)
        _forget_peft(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        model.train(training)


def _saved_originals(model: nn.Module) -> dict[str, nn.Module]:
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    return {name: wrapper.original_module for name, wrapper in wrappers.items()}


def _forget_peft(model: nn.Module) -> None:
    for attribute in ("peft_config", "_peft_is_base_adapter", "active_adapter"):
        if attribute in model.__dict__:
            delattr(model, attribute)


def is_fresh(model: nn.Module) -> bool:
    """Whether what is active of LoRA has learnt nothing yet: A or B is 0 in every module."""
    pairs = (
        (a[adapter], b[adapter])
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for a, b in (
            (layer.lora_A, layer.lora_B),
            (layer.lora_embedding_A, layer.lora_embedding_B),
        )
        for adapter in layer.active_adapters
        if adapter in a
    )
    return all(any(map(_is_zero, pair)) for pair in pairs)


def _is_zero(factor: Any) -> bool:
    weight = getattr(factor, "weight", factor)  # of an embedding the factor is the tensor itself
    return weight.device.type != "meta" and not weight.any()


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every trainable tensor by its full name: factors and modules_to_save."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def load_trainable_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put `trainable_state` back, in place.

    Raises:
        ModelError: names or shapes differ from the model's.
    """
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in state.items()}:
        raise ModelError("The saved adapter does not fit this model: names or shapes differ.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def clone_config(config: LoraConfig) -> LoraConfig:
    """An independent copy of an adapter's configuration."""
    return copy.deepcopy(config)
