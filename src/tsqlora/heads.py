"""What a classifier has beside its pretrained body: trained whole, saved with the adapter."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

HEADS = ("classifier", "score")
"""Endings of the names that PEFT takes for a classification head by itself."""
_POOLER = ".pooler."
_DRAWN = "tsqlora_drawn_modules"


def may_be_new(key: str, model: nn.Module) -> bool:
    """Whether a sequence classifier's weight belongs to its head or to a pooler."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return False
    return _POOLER in key or not key.startswith(f"{_body(model)}.")


def note_drawn(model: nn.Module, keys: Iterable[str]) -> None:
    """Remember the poolers that a checkpoint lacked: their weights, of those `keys`, are random."""
    names = {key.rpartition(_POOLER)[0] + _POOLER.rstrip(".") for key in keys if _POOLER in key}
    setattr(model, _DRAWN, sorted(names))


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules without which an adapter of a sequence classifier means nothing.

    The head, which is all that stands outside the body, whatever the architecture calls it, and
    poolers that were drawn at random when the model was loaded.
    """
    body = _body(model)
    children = dict(model.named_children())
    if body not in children:
        return list(HEADS)
    head = [n for n, m in children.items() if n != body and any(True for _ in m.parameters())]
    return head + list(getattr(model, _DRAWN, ()))


def _body(model: nn.Module) -> str:
    return str(getattr(model, "base_model_prefix", ""))
