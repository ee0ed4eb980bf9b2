"""What layer sensitivity costs against a plain forward and backward of the same batches.

Run: .venv/bin/python benchmarks/sensitivity.py
Prints a table and writes benchmarks/results/sensitivity.json. Time: medians of interleaved
repetitions in one process, as ratios within a repetition. Memory: as in benchmarks/scoring.py; the
room allowed is the plain peak and the largest module's gradient.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Case, cases_of, options_of, peak_memory, save, timed
from torch import nn

from tsqlora.batches import Batch, forward_losses
from tsqlora.lora_layers import base_weight, lora_modules, temporary_adapter
from tsqlora.losses import infer_kind
from tsqlora.sensitivity import FISHER, HESSIAN, WEIGHT_GRADIENT, Meter

PLAIN, FULL = "plain forward and backward", "the same, every weight trained"
SPECTRUM = "weight_gradient and 32 singular values"
TARGET = 1.5


def plain(model: nn.Module, kind: str, batches: list[Batch]) -> None:
    """A training pass of the adapter."""
    for batch in batches:
        forward_losses(model, kind, batch).sum().backward()
        model.zero_grad()


def full(model: nn.Module, kind: str, batches: list[Batch]) -> None:
    """A training pass of all weights: autograd's own sum over samples of every ∇W."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(True)
        plain(model, kind, batches)
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)


def measure(case: Case, repeats: int, device: str) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of every estimator on one model."""
    model, batches = case
    kind = infer_kind(model)
    with temporary_adapter(model.to(device), kind) as adapted:
        adapted.eval()
        moved = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
        methods: dict[str, Callable[[list[Batch]], None]] = {
            PLAIN: lambda given: plain(adapted, kind, given),
            FULL: lambda given: full(adapted, kind, given),
        }
        for estimator in (WEIGHT_GRADIENT, FISHER, HESSIAN):
            methods[estimator] = estimating(adapted, kind, estimator)
        methods[SPECTRUM] = estimating(adapted, kind, WEIGHT_GRADIENT, 32)
        for method in methods.values():
            method(moved[:1])
        found = {
            name: {"bytes": peak_memory(lambda m=method: m(moved[:1]), adapted, device)}
            for name, method in methods.items()
        }
        times: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(repeats):
            for name, method in methods.items():
                times[name].append(timed(lambda m=method: m(moved), device))
        largest = max(base_weight(m.base).float().nbytes for m in lora_modules(adapted))
    for name, result in found.items():
        ratios = [own / base for own, base in zip(times[name], times[PLAIN], strict=True)]
        result["seconds"] = statistics.median(times[name])
        result["time_ratio"] = statistics.median(ratios)
        result["room_used"] = (result["bytes"] - found[PLAIN]["bytes"]) / largest
    return found


def estimating(
    model: nn.Module, kind: str, estimator: str, spectrum: int = 0
) -> Callable[[list[Batch]], None]:
    """One estimator's pass; the meter has looked at the model before."""
    meter = Meter(model, kind, estimator, 0, spectrum)

    def call(batches: list[Batch]) -> None:
        for batch in batches:
            meter.add(batch, np.arange(len(batch["labels"])))

    return call


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    """One table."""
    base = results[PLAIN]
    print(f"\n{title}: plain pass {base['seconds']:.3f} s, {base['bytes'] / 2**20:.0f} MiB")
    for name, found in results.items():
        target = f"  at most {TARGET:.2f}, 1.00" if name in (WEIGHT_GRADIENT, FISHER) else ""
        print(
            f"  {name:39} {found['time_ratio']:5.2f}x time, memory: plain and "
            f"{found['room_used']:+.2f} of the largest gradient{target}"
        )


def main() -> None:
    """Measure, print, save."""
    options = options_of(__doc__.splitlines()[0], "sensitivity.json").parse_args()
    for name, case in cases_of(options).items():
        figures = measure(case(), options.repeats, options.device)
        show(name, figures)
        save(options, name, figures)


if __name__ == "__main__":
    main()
