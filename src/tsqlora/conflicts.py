"""What is wrong between the keys of a configuration that are right on their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def rank_conflicts(ranks: Any, given: Mapping[str, Any]) -> Iterator[str]:
    """Between the keys of `ranks`, of which `given` were written."""
    low, mean, high = ranks.min_rank, ranks.mean_rank, ranks.max_rank
    if given.get("mean_rank") is not None and given.get("parameters") is not None:
        yield "give ranks.mean_rank or ranks.parameters, not both: set the other to null"
    elif mean is None and ranks.parameters is None:
        yield "ranks.mean_rank or ranks.parameters is required: both are null"
    if ranks.compact and not ranks.dynamic:
        yield "ranks.compact is for ranks.dynamic: true; without it no component is ever pruned"
    if low > high:
        yield f"ranks.min_rank ({low}) must not exceed ranks.max_rank ({high})"
    elif mean is not None and not low <= mean <= high:
        yield f"ranks.mean_rank ({mean}) must lie from min_rank ({low}) to max_rank ({high})"


def mode_conflicts(quality: Any, given: Mapping[str, Any]) -> Iterator[str]:
    """Between the keys of `quality`, of which `given` were written."""
    if (mode := quality.mode) == "none" and given.get("fraction", 1) != 1:
        yield "quality.fraction: quality.mode: none draws all samples; leave it out"
    if mode == "online" and (given.get("weights") or {}).get("loss_reduction", 0) != 0:
        yield (
            "quality.weights.loss_reduction takes a forward of its own, which quality.mode: online "
            "does without; set it to 0, or use mode: upfront"
        )
    trained_on = mode == "online" and quality.reference != "validation"
    upfront = {
        "preset: paper": quality.preset == "paper",
        "reference": quality.reference is not None and not trained_on,
        "depth": quality.depth < 1,
        "lookahead": quality.lookahead != "exact",
    }
    if mode != "upfront":
        for key in (key for key, there in upfront.items() if there):
            yield f"quality.{key} is for quality.mode: upfront; leave it out"
    elif upfront["preset: paper"] and upfront["reference"]:
        yield "quality.reference: quality.preset: paper knows none; leave it out"


def conflicts(
    run: Mapping[str, Any], known_metrics: Mapping[str, tuple[str, ...]]
) -> Iterator[str]:
    """What is wrong between fields; values that are bad on their own are let pass."""
    task, data, quality = run["task"], run["data"], run["quality"]
    metrics, known = run.get("metrics"), known_metrics.get(str(task), ())
    if data.messages is None:
        if data.text is None:
            yield "data.text is required: a column, a pair of columns or a template"
        if data.target is None and known and task != "causal-lm":
            yield f"data.target is required for {task}: the column of the label, number or text"
    elif data.text is not None or data.target is not None:
        yield "give data.messages, or data.text and data.target, not both"
    elif known and task != "causal-lm":
        yield f"data.messages is for causal-lm; for {task} give data.text and data.target"
    if data.chat is True and known and (task != "causal-lm" or data.target is None):
        yield "data.chat is for causal-lm with data.text and data.target: leave it out"
    if run.get("target_tokenizer") is not None and known and task != "seq2seq":
        yield f"target_tokenizer is for seq2seq, not for {task}: leave it out"
    if quality.reference == "validation" and data.validation is None:
        yield "quality.reference: validation needs data.validation"
    for name in metrics if known and isinstance(metrics, tuple) else ():
        if name not in known:
            yield f"metrics: {name} is not a metric of {task}; choose from {', '.join(known)}"
