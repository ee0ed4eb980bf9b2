"""What a verb says at its end: what lies where, what came of it, and what can be done next."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

WIDTH = 12
NEXT = {
    "train": (
        "tsqlora evaluate {run} --data FILE",
        "tsqlora export {run} --format padded --out DIR    # for llama.cpp, TGI, SGLang",
    ),
    "score": (
        "open {ranked} in a spreadsheet: the rows most likely wrong come first",
        "tsqlora train {config}    # judges anew, or with quality.mode: upfront by these",
    ),
    "plan": (
        "tsqlora train {config}    # goes on from this plan",
        "tsqlora plan {config} --format peft    # to paste into a LoraConfig",
    ),
}
"""What can be done after each verb, in a line each."""


def told(verb: str, result: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """The result of a verb as text for a person."""
    text = _trained(result) if verb == "train" else readable(result)
    named = {**vars(arguments), **result}
    lines: tuple[str, ...] = NEXT.get(verb, ())
    if isinstance(named.get("config"), list):  # data without a configuration
        lines = tuple(line for line in lines if "{config}" not in line)
    after = [line.format_map(named) for line in lines]
    return "\n".join([text, *(["", "next:"] if after else []), *(f"  {line}" for line in after)])


def readable(result: Mapping[str, Any], indent: str = "") -> str:
    """A line a value, nested ones indented."""
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", readable(value, indent + "  ")]
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"{indent}{key}: {shown}".replace("\n", "\\n"))
    return "\n".join(lines)


def _trained(result: Mapping[str, Any]) -> str:
    metrics = result["metrics"]
    lines = [
        f"{'report':{WIDTH}}{result['report']}    # open it in a browser",
        f"{'adapter':{WIDTH}}{result['adapter']}    # plain LoRA: PEFT and vLLM load it",
    ]
    names = {"base": "before", "validation": "validation", "test": "test"}
    for section, name in names.items():
        if values := metrics.get(section):
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            lines.append(f"{name:{WIDTH}}{shown}")
    return "\n".join(
        [f"{'run':{WIDTH}}{result['run']}", *lines, f"{'cost':{WIDTH}}{_cost(metrics)}"]
    )


def _cost(metrics: Mapping[str, Any]) -> str:
    cost = metrics["cost"]
    return (
        f"scoring {cost['scoring_seconds']:.0f} s and {cost['scoring_passes']:,.0f} sample passes, "
        f"training {cost['training_seconds']:.0f} s and {cost['training_passes']:,.0f}; "
        f"{cost['trainable_parameters']:,} parameters, "
        f"{cost['peak_memory_bytes'] / 1e9:.1f} GB at most"
    )
