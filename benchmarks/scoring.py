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
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from common import Case, cases_of, options_of, peak_memory, save, timed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import masking_utils

from tsqlora import losses
from tsqlora.batches import Batch, forward_losses, singly
from tsqlora.calibration import ONE_IN
from tsqlora.factors import scored_layers, sites
from tsqlora.hooks import SampleTaps, frozen
from tsqlora.lora_layers import temporary_adapter
from tsqlora.losses import infer_kind, sample_losses, target_lengths
from tsqlora.measuring import Meter, Wanted
from tsqlora.per_sample_grads import PerSampleGradients
from tsqlora.recording import Recorder, sample_weights

DEPTH = 0.4
"""How deep the economical mode goes: the last layers, with this share of the adapted weights."""


Method = Callable[[Batch], Any]
"""Takes one batch; gives the squared gradient norms where it has them."""


def plain(model: nn.Module, kind: str, batch: Batch) -> None:
    forward_losses(model, kind, batch).sum().backward()
    model.zero_grad()


def forward(model: nn.Module, kind: str, batch: Batch) -> None:
    with torch.no_grad():
        forward_losses(model, kind, batch)


def floor(model: nn.Module, kind: str) -> Method:
    """Forward and backward through every adapted layer, no gradient of any weight: the limit."""
    layers = scored_layers(model)
    taps = SampleTaps({site.name: site.module for site in sites(layers)}, lambda *_: None)

    def method(batch: Batch) -> None:
        with frozen(model.parameters()), taps:
            taps.backward(forward_losses(model, kind, batch))

    return method


def engine(*terms: str, **wanted: Any) -> Callable[..., Method]:
    """What scoring does with a batch, all of it: made once for a pool, as there."""

    def made(model: nn.Module, kind: str) -> Method:
        meter = Meter(model, kind, Wanted(terms, **wanted))

        def method(batch: Batch) -> Tensor:
            norms = torch.from_numpy(meter.measure(batch)["gradient_norm"]).square()
            return norms.to(batch["labels"].device)

        return method

    return made


def training(recorded: bool) -> Callable[..., Method]:
    """A training step as the Trainer takes it: forward, backward, clipping, AdamW (at rate 0)."""

    def made(model: nn.Module, kind: str) -> Method:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, recorder = torch.optim.AdamW(trained, lr=0.0), Recorder(model)

        def method(batch: Batch) -> Tensor | None:
            norms = None
            with recorder.recording() if recorded else nullcontext():
                output = model(**batch)
                if recorded:
                    lengths = target_lengths(kind, batch["labels"])
                    losses = sample_losses(kind, output.logits.detach(), batch["labels"])
                    total, targets = (losses * lengths).sum(), float(lengths.sum())
                    weights = sample_weights(lengths, total, output.loss.detach(), targets)
                    recorder.expect(len(lengths))
                output.loss.backward()
                if recorded:
                    norms, sketches = recorder.take(weights)
                    sketches.cpu().numpy()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return None if norms is None else norms.square()

        return method

    return made


def each(method: Callable[[nn.Module, str, Batch], Any]) -> Callable[..., Method]:
    """A method that has nothing to make once."""
    return lambda model, kind: partial(method, model, kind)


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

    with (
        ExitStack() as stack
    ):  # transformers looks into a mask's values, we into labels', which vmap cannot
        stack.enter_context(patch.object(losses, "_require_classes", lambda *_: None))
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


NORM, STEP, CONVERGENCE = "gradient_norm", "loss_reduction", "convergence"
PLAIN, FLOOR, FORWARD = (
    "plain forward and backward",
    "backward, no weight's gradient",
    "forward alone",
)
LAST, WHOLE, ECONOMICAL = "economical, most samples", "economical, one in 16", "economical"
TRAINING, ONLINE = "a plain training step", "online: a training step, scores recorded"
METHODS: dict[str, Callable[[nn.Module, str], Method]] = {
    PLAIN: each(plain),
    FLOOR: floor,
    FORWARD: each(forward),
    "gradient norm": engine(NORM),
    "gradient norm + convergence": engine(NORM, CONVERGENCE),
    "all three terms, exact": engine(NORM, STEP, CONVERGENCE),
    "all three, second order": engine(NORM, STEP, CONVERGENCE, lookahead="second_order"),
    "all three, first order": engine(NORM, STEP, CONVERGENCE, lookahead="first_order"),
    LAST: engine(NORM, STEP, CONVERGENCE, depth=DEPTH),
    WHOLE: engine(NORM, STEP, CONVERGENCE, depth=DEPTH, whole=True),
    TRAINING: training(recorded=False),
    ONLINE: training(recorded=True),
    "loop over samples": each(loop),
    "torch.func.vmap(grad)": each(vmap),
    "opacus": each(opacus),
}
TARGETS = {
    "gradient norm + convergence": (1.10, 1.15),
    "all three terms, exact": (1.70, None),
    ECONOMICAL: (0.75, None),
    ONLINE: (1.05, None),
}
AGAINST = {ONLINE: TRAINING}
"""What the time of a row is held against where that is not the plain pass."""
LIMITS = {
    "gradient norm": [FLOOR],
    "gradient norm + convergence": [FLOOR],
    "all three terms, exact": [FLOOR, FORWARD],
    "all three, second order": [FLOOR, FORWARD],
    "all three, first order": [FLOOR],
    LAST: [FORWARD],
}
"""What each cannot do without, as rows of the same table: their sum is its limit."""


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
        methods = {name: METHODS[name](adapted, kind) for name in only}
        norms = engine(NORM)(adapted, kind)(moved[0])
        for name, method in methods.items():
            results[name] |= first_try(method, adapted, moved[0], device)
            got = results[name].pop("norms", None)
            if got is not None and name != LAST:
                results[name]["relative_error"] = float(((got - norms).abs() / norms).max())
        for _ in range(repeats):
            for name in (n for n in only if "error" not in results[n]):
                results[name]["times"].append(timed(through(methods[name], moved), device))
    taken = {name: found.pop("times") for name, found in results.items()}
    for name, found in results.items():
        if times := taken[name]:
            found["seconds"] = statistics.median(times)
            base = taken.get(AGAINST.get(name, PLAIN)) or taken[PLAIN]
            ratios = [own / plain for own, plain in zip(times, base, strict=True)]
            found["time_ratio"] = statistics.median(ratios)
    if {LAST, WHOLE} <= results.keys() and not any("error" in results[n] for n in (LAST, WHOLE)):
        results[ECONOMICAL] = mixed(results[LAST], results[WHOLE])
    return results


def mixed(most: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """The economical mode over a pool: one sample in `ONE_IN` is measured whole."""
    times = ("seconds", "time_ratio")
    found = {key: most[key] + (whole[key] - most[key]) / ONE_IN for key in times}
    return {**found, "bytes": max(most["bytes"], whole["bytes"])}


def first_try(method: Method, model: nn.Module, batch: Batch, device: str) -> dict[str, Any]:
    """The norms and peak memory of one batch, after a run that warms up."""
    try:
        got = method(batch)
        return {"norms": got, "bytes": peak_memory(lambda: method(batch), model, device)}
    except Exception as error:  # rivals fail in their own ways; that is a result
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"}


def through(method: Method, batches: list[Batch]) -> Callable[[], None]:
    """A method on all batches."""

    def call() -> None:
        for batch in batches:
            method(batch)

    return call


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    """One table: ratios to the plain pass (`AGAINST`: the step), the targets, and the limits."""
    base = results[PLAIN]
    print(f"\n{title}: plain pass {base['seconds']:.3f} s, {base['bytes'] / 2**20:.0f} MiB")
    print("| what | time | at most | limit | over it | memory | at most | error of norms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, found in results.items():
        if "error" in found:
            print(f"| {name} | fails: {found['error']} | | | | | | |")
            continue
        found["memory_ratio"] = found["bytes"] / base["bytes"]
        below = [results[row] for row in LIMITS.get(name, ()) if row in results]
        if below:
            found["time_limit"] = sum(row["time_ratio"] for row in below)
        limit, ratio = found.get("time_limit"), found["time_ratio"]
        most, most_memory = TARGETS.get(name, (None, None))
        over = f"{ratio / limit - 1:+.0%}" if limit else ""
        error = f"{found['relative_error']:.0e}" if "relative_error" in found else ""
        cells = [ratio, most, limit, over, found["memory_ratio"], most_memory, error]
        shown = [f"{c:.2f}" if isinstance(c, float) else c or "" for c in cells]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


def main() -> None:
    """Measure, print, save."""
    parser = options_of(__doc__.splitlines()[0], "scoring.json")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--bf16", action="store_true", help="all of it under autocast")
    options = parser.parse_args()
    for name, case in cases_of(options).items():
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            figures = measure(case(), options.repeats, options.device, options.methods)
        show(name, figures)
        save(options, name, figures)


if __name__ == "__main__":
    main()
