"""Which modules of a model an adapter goes onto."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tsqlora.heads import head_modules
from tsqlora.losses import CLASSIFICATION, REGRESSION

EXPERT_NAMES = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Leaf names that PEFT turns into expert parameters in a mixture of experts."""
STATE, READ_PAST = {"A_log", "D"}, ("out_proj", "dt_proj")
"""What a Mamba mixer owns, and those of its modules whose weights it reads past any adapter."""
ROUTED = {"experts", "router"}
"""Parts of names inside which tokens are picked out of their samples, or choose experts."""


def resolve_targets(
    model: nn.Module, kind: str, target_modules: str | Sequence[str]
) -> str | list[str]:
    """`all-linear` as explicit names; anything else as it is, for PEFT to match.

    All linear modules but the output embedding and a classification head. In a mixture of experts,
    whose experts are stacked parameters or see tokens out of their samples, only what lies outside
    them and their router; in Mamba, none whose weight is read past it. None with "weight" in its
    name: PEFT puts the adapter's name before every "weight" of a key, and so loses what it loads.
    """
    if not isinstance(target_modules, str):
        return list(target_modules)
    if target_modules != "all-linear":
        return target_modules
    output = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = [n for n, m in model.named_modules() if output is not None and m is output]
    if kind in (CLASSIFICATION, REGRESSION):
        excluded += head_modules(model)
    names = [n for n in linear_names(model) if not any(_within(n, e) for e in excluded)]
    if any("experts" in n.split(".") for n, _ in model.named_parameters()):
        names = [n for n in names if not ROUTED & set(n.split("."))]
        names = [n for n in names if n.rsplit(".", 1)[-1] not in EXPERT_NAMES]
    return [n for n in names if "weight" not in n and not _read_past(model, n)]


def _read_past(model: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf in READ_PAST and model.get_submodule(parent)._parameters.keys() >= STATE


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear modules (nn.Linear and GPT-2's Conv1D)."""
    return [n for n, m in model.named_modules() if is_linear(m)]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, its quantised kin and GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
