"""What per-sample gradients cost against a plain forward and backward of the same batches.

Run: .venv/bin/pip install -c constraints.txt -e '.[demo,bench]'
     .venv/bin/python benchmarks/scoring.py
Prints a table and writes benchmarks/results/scoring.json. Time: medians of interleaved repetitions
in one process. Memory: the weights and the most bytes alive at once in tensors made since, counted
from the storages that torch's dispatcher hands out (on CUDA, torch's own peak).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from common import Case, cases_of, options_of, peak_memory, save, timed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import masking_utils

from tsqlora.batches import Batch, forward_losses, singly
from tsqlora.lookahead import one_step
from tsqlora.lora_layers import temporary_adapter
from tsqlora.losses import infer_kind
from tsqlora.per_sample_grads import Keep, PerSampleGradients, Reducer, Sketch, SquaredNorms

DEPTH = 0.1
"""How deep the economical mode goes: the last layers, with this share of the adapted weights."""


def plain(model: nn.Module, kind: str, batch: Batch) -> None:
    forward_losses(model, kind, batch).sum().backward()
    model.zero_grad()


def forward(model: nn.Module, kind: str, batch: Batch) -> None:
    with torch.no_grad():
        forward_losses(model, kind, batch)


def engine(*terms: str, depth: float = 1.0) -> Callable[..., Tensor]:
    """A method: norms, sketches if "convergence", one further forward if "lookahead"."""

    def method(model: nn.Module, kind: str, batch: Batch) -> Tensor:
        norms, keep = SquaredNorms(), Keep()
        reducers: list[Reducer] = [norms]
        reducers += [SKETCH] if "convergence" in terms else []
        reducers += [keep] if "lookahead" in terms else []
        with PerSampleGradients(model, *reducers, depth=depth) as gradients:
            gradients.backward(forward_losses(model, kind, batch))
        total = torch.as_tensor(norms.total)
        if "convergence" in terms:
            SKETCH.take()
        if "lookahead" in terms:
            with torch.no_grad(), one_step(gradients, keep, 0.5 / total.sqrt()):
                forward_losses(model, kind, batch)
        return total

    return method


SKETCH = Sketch()


def loop(model: nn.Module, kind: str, batch: Batch) -> Tensor:
    """Every sample alone, its norm from the parameters' own gradients."""
    weights = list(PerSampleGradients(model).weights.values())
    found = []
    for sample in singly(batch):
        gradients = torch.autograd.grad(forward_losses(model, kind, sample).sum(), weights)
        found.append(torch.stack([g.square().sum() for g in gradients]).sum())
    return torch.stack(found)


def vmap(model: nn.Module, kind: str, batch: Batch) -> Tensor:
    """torch.func: vmap of grad over the samples."""
    trained = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: Batch) -> Tensor:
            return forward_losses(self.model, kind, {k: v[None] for k, v in sample.items()}).sum()

    module = Loss()

    def loss(weights: dict[str, Tensor], sample: Batch) -> Tensor:
        named = {f"model.{name}": weight for name, weight in weights.items()}
        return torch.func.functional_call(module, named, (sample,))

    with ExitStack() as stack:  # transformers looks into a mask's values, which vmap cannot
        for name in ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa"):
            stack.enter_context(patch.object(masking_utils, name, lambda *_, **__: False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # vmap has no rule for the fused one
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, batch)
    return sum((g.flatten(1).square().sum(1) for g in gradients.values()), start=torch.zeros(()))


def opacus(model: nn.Module, kind: str, batch: Batch) -> Tensor:
    """opacus: GradSampleModule over the factors (heads frozen, as its layers must be its own)."""
    from opacus import GradSampleModule

    held = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    for parameter in held:
        parameter.requires_grad_(False)
    factors = [m for n, m in model.named_modules() if "lora_" in n and isinstance(m, nn.Linear)]
    for module in factors:
        module.train()  # it looks at modules in training mode only; dropout stays off
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    try:
        forward_losses(wrapped, kind, batch).sum().backward()
        weights = PerSampleGradients(model).weights.values()
        return sum((w.grad_sample.flatten(1).square().sum(1) for w in weights), torch.zeros(()))
    finally:
        wrapped.zero_grad()
        wrapped.to_standard_module()
        for module in factors:
            module.eval()
        for parameter in held:
            parameter.requires_grad_(True)


METHODS: dict[str, Callable[[nn.Module, str, Batch], Any]] = {
    "plain forward and backward": plain,
    "forward alone": forward,
    "gradient norm": engine(),
    "gradient norm + convergence": engine("convergence"),
    "all three terms, exact": engine("convergence", "lookahead"),
    "economical": engine("convergence", "lookahead", depth=DEPTH),
    "loop over samples": loop,
    "torch.func.vmap(grad)": vmap,
    "opacus": opacus,
}
TARGETS = {
    "gradient norm + convergence": (1.10, 1.15),
    "all three terms, exact": (1.70, None),
    "economical": (0.75, None),
}


def measure(case: Case, repeats: int, device: str, only: list[str]) -> dict[str, dict[str, Any]]:
    """Every method on one model: seconds, bytes, and what it refused with."""
    model, batches = case
    kind = infer_kind(model)
    with temporary_adapter(model.to(device), kind) as adapted:
        adapted.eval()
        for parameter in (p for n, p in adapted.named_parameters() if "lora_B" in n):
            nn.init.normal_(parameter, std=0.02)
        moved = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
        results: dict[str, dict[str, Any]] = {name: {"times": []} for name in only}
        norms = engine()(adapted, kind, moved[0])
        for name in only:
            results[name] |= first_try(METHODS[name], adapted, kind, moved[0], norms, device)
        for _ in range(repeats):
            for name in (n for n in only if "error" not in results[n]):
                results[name]["times"].append(timed(through(name, adapted, kind, moved), device))
    for found in results.values():
        times = found.pop("times")
        found["seconds"] = statistics.median(times) if times else None
    return results


def first_try(
    method: Any, model: nn.Module, kind: str, batch: Batch, norms: Tensor, device: str
) -> dict[str, Any]:
    """Peak memory on one batch, after a run that warms up and compares the norms."""
    try:
        got = method(model, kind, batch)
        found: dict[str, Any] = {
            "bytes": peak_memory(lambda: method(model, kind, batch), model, device)
        }
    except Exception as error:  # rivals fail in their own ways; that is a result
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"}
    if isinstance(got, Tensor) and method is not METHODS["economical"]:
        found["relative_error"] = float(((got - norms).abs() / norms).max())
    return found


def through(name: str, model: nn.Module, kind: str, batches: list[Batch]) -> Callable[[], None]:
    """A method on all batches."""

    def call() -> None:
        for batch in batches:
            METHODS[name](model, kind, batch)

    return call


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    """One table: ratios to the plain pass, and the targets."""
    base = results["plain forward and backward"]
    print(f"\n{title}: plain pass {base['seconds']:.3f} s, {base['bytes'] / 2**20:.0f} MiB")
    for name, found in results.items():
        if "error" in found:
            print(f"  {name:30} fails: {found['error']}")
            continue
        found["time_ratio"] = found["seconds"] / base["seconds"]
        found["memory_ratio"] = found["bytes"] / base["bytes"]
        targets = TARGETS.get(name, (None, None))
        wanted = "  at most " + ", ".join(f"{t:.2f}" for t in targets if t) if any(targets) else ""
        error = f"  error {found['relative_error']:.0e}" if "relative_error" in found else ""
        ratios = f"{found['time_ratio']:6.2f}x time {found['memory_ratio']:6.2f}x memory"
        print(f"  {name:30} {ratios}{wanted}{error}")


def main() -> None:
    """Measure, print, save."""
    parser = options_of(__doc__.splitlines()[0], "scoring.json")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    models = {}
    for name, case in cases_of(options).items():
        models[name] = measure(case(), options.repeats, options.device, options.methods)
        show(name, models[name])
    save(options, models)


if __name__ == "__main__":
    main()
