"""A rank plan as a plain PEFT adapter: configuration, components that come and go.

A component is row j of A with column j of B. A component is active while its row is not zero; a
pruned one has row, column and optimizer moments zero, which is an exact fixed point of AdamW, so
training needs no mask, and parameters never change identity or shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tsqlora.allocation import RankPlan, pattern_key
from tsqlora.errors import ConfigError, ModelError, TrainingError
from tsqlora.lora_layers import LoraModule, clone_config, lora_modules
from tsqlora.optimizer_state import keep_state, state_of, zero_state
from tsqlora.sharded import is_sharded, set_parameter, whole, zero_gradient

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lora_config(
    plan: RankPlan,
    task_type: str | None = None,
    modules_to_save: Sequence[str] | None = None,
    dropout: float = 0.0,
) -> LoraConfig:
    """The plan as a plain `peft.LoraConfig`: exact names, `rank_pattern` and `alpha_pattern`.

    alpha / r = plan.scale in every module; modules of rank 0 are not targeted.

    Raises:
        ConfigError: no module has a rank.
    """
    adapted = plan.adapted
    if not adapted:
        raise ConfigError(
            "The rank plan adapts no module: raise ranks.mean_rank or ranks.parameters."
        )
    largest = max(adapted.values())
    config = LoraConfig(
        r=largest,
        lora_alpha=_whole(plan.scale * largest),
        target_modules=sorted(adapted),
        lora_dropout=dropout,
        task_type=task_type,
        modules_to_save=list(modules_to_save) if modules_to_save else None,
    )
    set_patterns(config, adapted, dict.fromkeys(adapted, plan.scale))
    return config


def set_patterns(config: LoraConfig, ranks: dict[str, int], scales: dict[str, float]) -> None:
    """Make `config` say these ranks, and alpha = scale · r; the largest rank is its default."""
    config.r = max(ranks.values())
    default = {scales[name] for name, rank in ranks.items() if rank == config.r}
    config.lora_alpha = _whole(max(default) * config.r)
    config.use_rslora = False
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name, rank in ranks.items():
        alpha = _whole(scales[name] * rank)
        if rank != config.r:
            config.rank_pattern[pattern_key(name)] = rank
        if alpha != config.lora_alpha:
            config.alpha_pattern[pattern_key(name)] = alpha


def _whole(value: float) -> int:
    return int(value) if float(value).is_integer() else value  # type: ignore[return-value]


def changes_base(config: LoraConfig) -> bool:
    """Whether PEFT's initialisation of such an adapter also changed the weights of its base."""
    kinds = ("pissa", "olora", "corda", "loftq", "lora_ga")
    return str(config.init_lora_weights).startswith(kinds)


def check_plan(model: nn.Module, plan: RankPlan) -> None:
    """Assert that PEFT gave every module the planned rank and scale: a missed pattern is silent.

    Raises:
        ModelError: naming the modules that differ.
    """
    actual = {m.name: (m.rank, m.scale) for m in lora_modules(model)}
    wanted = {name: (rank, plan.scale) for name, rank in plan.adapted.items()}
    different = [
        f"{name}: planned {wanted.get(name)}, found {actual.get(name)}"
        for name in sorted(actual.keys() | wanted.keys())
        if not _same(actual.get(name), wanted.get(name))
    ]
    if different:
        raise ModelError.of(different)


def check_adapts(model: nn.Module, plan: RankPlan) -> None:
    """Check that the adapter is on the plan's modules, whatever their ranks are by now.

    Raises:
        ModelError: naming those that only one of the two has.
    """
    adapted = {module.name for module in lora_modules(model)}
    unknown, lacking = sorted(adapted - plan.ranks.keys()), sorted(plan.adapted.keys() - adapted)
    problems = [
        f"{words}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for words, names in (
            ("The plan gives ranks to modules that the adapter is not on", lacking),
            ("The adapter is on modules that the plan does not know", unknown),
        )
        if names
    ]
    if problems:
        problems[-1] += ". Wrap the model by get_peft_model(model, tsqlora.lora_config(plan))."
        raise ModelError.of(problems)


def require_early(model: nn.Module, optimizer: Optimizer) -> None:
    """Check that factors may still change their shapes.

    Raises:
        TrainingError: the optimizer has state of them, or other processes their gradients.
    """
    wrapped = any(isinstance(m, DistributedDataParallel) for m in model.modules())
    stepped = any(optimizer.state.values())  # schedule-free ones have entries before, all empty
    if wrapped or is_sharded(model) or stepped:
        raise TrainingError(
            "It is too late to make room for ranks to grow, as the "
            + ("optimizer has stepped" if stepped else "model is wrapped for processes")
            + ": make DynamicRank before accelerator.prepare(model) and the first step, or leave "
            "out headroom."
        )


def _same(a: tuple[int, float] | None, b: tuple[int, float] | None) -> bool:
    return a is not None and b is not None and a[0] == b[0] and math.isclose(a[1], b[1])


def add_headroom(model: nn.Module, components: int, most: int | None = None) -> None:
    """Room for `components` more in every adapted module, pruned from the start: same function.

    None beyond `most` components of a module.

    To be called before the optimizer has state and before the model is wrapped for data-parallel
    training: the parameters stay the same objects but grow in shape.
    """
    modules = lora_modules(model)
    bound = () if most is None else (most,)
    rooms = {m.name: min(m.rank + components, *m.shape, *bound) for m in modules}
    set_physical_ranks(model, {m.name: max(m.rank, rooms[m.name]) for m in modules})


def set_physical_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Cut every module's factors down to `ranks`, or fill them up with zeros.

    To be called when `add_headroom` may be; whatever it cuts is lost.
    """
    modules = lora_modules(model)
    for module in modules:
        extra = ranks[module.name] - module.rank
        if extra == 0:
            continue
        a, b = module.a.weight, module.b.weight
        more = max(extra, 0)
        a.data = torch.cat([a.data, a.data.new_zeros(more, a.shape[1])])[: module.rank + extra]
        b.data = torch.cat([b.data, b.data.new_zeros(b.shape[0], more)], 1)
        b.data = b.data[:, : a.shape[0]].contiguous()
        a.grad = b.grad = None
        module.set_rank(module.rank)
    _tell_config(model, modules)


def _tell_config(model: nn.Module, modules: Sequence[LoraModule]) -> None:
    configs: dict[str, LoraConfig] = model.peft_config  # type: ignore[assignment]
    adapter = modules[0].adapter
    config = configs[adapter] = clone_config(configs[adapter])  # that of the user stays as it is
    set_patterns(config, {m.name: m.rank for m in modules}, {m.name: m.scale for m in modules})


def compact(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Leave no component that is pruned, in the factors, their gradients and the optimizer's state.

    The function stays the same but for the order of sums, parameters the same objects. A module
    without any active component keeps one of zeros, as PEFT knows no rank 0. Not for parameters
    that other processes hold in their old shape.

    Raises:
        TrainingError: the optimizer's state cannot be cut; nothing is changed then.
    """
    modules = lora_modules(model)
    kept, states = {}, {}
    for module in modules:
        index = active(module).nonzero().flatten()
        kept[module.name] = index if len(index) else index.new_zeros(1)
        for parameter, dimension in _factors(module):
            states[parameter] = keep_state(optimizer, parameter, dimension, kept[module.name])
    for module in modules:
        for parameter, dimension in _factors(module):
            _cut(parameter, dimension, kept[module.name])
            state_of(optimizer, parameter).update(states[parameter])
        module.set_rank(module.rank)
    _tell_config(model, modules)


def _factors(module: LoraModule) -> list[tuple[nn.Parameter, int]]:
    """A and B, each with the dimension that components lie along."""
    return [(module.a.get_parameter("weight"), 0), (module.b.get_parameter("weight"), 1)]


def _cut(parameter: nn.Parameter, dimension: int, index: Tensor) -> None:
    data, gradient = parameter.data.index_select(dimension, index), parameter.grad
    parameter.grad = None
    # autograd remembers a parameter's shape while a graph lives, unless its dtype changes
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
    if gradient is not None:
        parameter.grad = gradient.index_select(dimension, index)


def active(module: LoraModule) -> Tensor:
    """Which components are active (r): those whose row of A is not zero."""
    return whole(module.a.weight.detach()).abs().amax(1) > 0


def active_ranks(model: nn.Module) -> dict[str, int]:
    """The number of active components of every adapted module."""
    return {m.name: int(active(m).sum()) for m in lora_modules(model)}


def physical_ranks(model: nn.Module) -> dict[str, int]:
    """The number of components of every adapted module, active or not."""
    return {m.name: m.rank for m in lora_modules(model)}


def warm_start(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Begin from a briefly adapted adapter's `trainable_state`, of any rank.

    Each module starts at the best approximation of the adapted BA that its rank r allows: with
    BA = USVᵀ, A = cVᵀ and B = US/c for the r largest singular values, c the length of a fresh row
    (1/√3 by PEFT's initialisation). Components beyond those of BA keep their fresh row and zero
    column. modules_to_save are copied. The steps of the brief adaptation thus count as training.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for module in lora_modules(model):
            prefix = f"base_model.model.{module.name}"
            names = [f"{prefix}.lora_{factor}.{module.adapter}.weight" for factor in "AB"]
            if names[0] not in state:
                continue
            a, b = _principal(*(state[name].to(module.a.weight) for name in names))
            kept = min(module.rank, len(a))
            module.a.weight[:kept] = a[:kept]
            module.b.weight[:, :kept] = b[:, :kept]
        for name, tensor in state.items():
            if "lora_" not in name and name in parameters:
                parameters[name].copy_(tensor)


def _principal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same BA by its singular vectors, largest first, rows of A 1/√3 long; none for BA = 0."""
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    there = int((s > 1e-6 * s[0]).sum())
    return (q_a @ vh.T).T[:there] / 3**0.5, (q_b @ u * s)[:, :there] * 3**0.5


def prune(module: LoraModule, components: Sequence[int], optimizer: Optimizer | None) -> None:
    """Zero the components' rows, columns, gradients and what the optimizer remembers of them.

    Raises:
        TrainingError: the optimizer's state is not understood (`optimizer_state.py`).
    """
    index = torch.as_tensor(list(components), device=module.a.weight.device, dtype=torch.long)
    with torch.no_grad():
        for parameter, dimension in _factors(module):
            set_parameter(parameter, dimension, index, 0.0)
            zero_gradient(parameter, dimension, index)
    forget(module, index, optimizer)


def forget(module: LoraModule, index: Tensor, optimizer: Optimizer | None) -> None:
    """Zero what the optimizer remembers of the components `index`."""
    with torch.no_grad():
        for parameter, dimension in _factors(module):
            zero_state(optimizer, parameter, dimension, index)


def grow(
    module: LoraModule,
    components: Sequence[int],
    optimizer: Optimizer | None,
    rows: Tensor,
) -> None:
    """Make pruned components active, with `rows` of A (components, in), columns and moments zero.

    The model's function does not change, bit for bit.
    """
    weight = module.a.weight
    prune(module, components, optimizer)
    with torch.no_grad():
        index = torch.as_tensor(list(components), device=weight.device, dtype=torch.long)
        set_parameter(weight, 0, index, rows.to(weight.device))


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """`base` under the adapter saved in `folder`.

    Raises:
        ModelError: it is broken, or no adapter of this model.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{folder} holds no adapter_model.safetensors: remove the folder and train "
            "again with --resume."
        )
    try:
        return PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{folder} cannot be loaded ({reason}): remove the folder and train again with "
            "--resume."
        ) from error
