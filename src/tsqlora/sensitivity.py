"""How much the loss depends on each target module's weight W (out, in), from hooks alone.

∇W of sample i is D_iᵀ X_i, formed in the backward hook from the module's input X_i (T, in) and the
gradient D_i (T, out) at its output, one module at a time, so frozen and quantised weights work.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn

from tsqlora.artefacts import atomic_write_json
from tsqlora.batches import (
    Batch,
    Collator,
    batches,
    evaluating,
    forward_losses,
    require_samples,
    singly,
    subset,
)
from tsqlora.errors import ConfigError, RunError
from tsqlora.hooks import SampleTaps, SharedInput, frozen
from tsqlora.lora_layers import LoraModule, base_weight, has_lora, lora_modules, temporary_adapter
from tsqlora.losses import infer_kind
from tsqlora.per_sample_grads import separable

WEIGHT_GRADIENT, FISHER, HESSIAN = "weight_gradient", "fisher", "hessian"
CHUNK = 4_000_000
"""At most so many numbers of per-sample ∇W at once, or one sample's where that is more."""


@dataclass(frozen=True)
class LayerSensitivity:
    """The sensitivity of every target module, and its shape (out, in)."""

    estimator: str
    modules: dict[str, float]
    shapes: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, object]:
        """As in `sensitivity.json`."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {
            "version": 1,
            "estimator": self.estimator,
            "modules": self.modules,
            "shapes": shapes,
        }

    def save(self, path: str | Path) -> None:
        """Write `sensitivity.json`."""
        atomic_write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> LayerSensitivity:
        """Read `sensitivity.json`.

        Raises:
            RunError: the file is missing or is not a sensitivity.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            shapes = {name: (int(s[0]), int(s[1])) for name, s in raw["shapes"].items()}
            return cls(raw["estimator"], dict(raw["modules"]), shapes)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not a layer sensitivity ({error}).") from error


def layer_sensitivity(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    estimator: str = WEIGHT_GRADIENT,
    target_modules: str | Sequence[str] = "all-linear",
    max_samples: int = 512,
    batch_size: int = 32,
    seed: int = 0,
) -> LayerSensitivity:
    """S_m for every target module, the mean over samples of `dataset` (TsqLoRA §3).

    `weight_gradient`: E_i Σ|W ⊙ ∇W ℓ_i|, to first order the loss change of removing each weight.
    `fisher`: E_i Σ (∇W ℓ_i)², the trace of the empirical Fisher matrix.
    `hessian`: |E_i tr ∇²_W ℓ_i|, Hutchinson's estimate with one Rademacher direction a batch.

    A model without adapters gets temporary ones (B = 0, so its function is unchanged), removed
    after. At most `max_samples` seeded rows are used. W is the frozen weight; dropout is off.

    Raises:
        ConfigError: the estimator is unknown.
        ModelError: the model's kind is unknown or nothing matches `target_modules`.
        DataError: there is no row, or the batches hold no labels.
    """
    if estimator not in (WEIGHT_GRADIENT, FISHER, HESSIAN):
        raise ConfigError(f"Unknown estimator {estimator!r}: weight_gradient, fisher or hessian.")
    kind = infer_kind(model)
    require_samples(model, dataset, collator)
    rows = subset(dataset, max_samples, seed)
    with ExitStack() as stack:
        if not has_lora(model):
            stack.enter_context(temporary_adapter(model, kind, 1, target_modules=target_modules))
        stack.enter_context(evaluating(model))
        meter = _Meter(model, kind, estimator, seed)
        for _, batch in batches(model, rows, collator, batch_size, "layer sensitivity"):
            meter.add(batch)
        return meter.result(len(rows))


class _Meter:
    """Adds up S_m of every module, batch by batch."""

    def __init__(self, model: nn.Module, kind: str, estimator: str, seed: int) -> None:
        self.model, self.kind, self.estimator, self.seed = model, kind, estimator, seed
        self.modules = {module.name: module for module in lora_modules(model)}
        self.totals = dict.fromkeys(self.modules, 0.0)
        self.single: bool | None = None
        self._batches = 0
        self._sign = 0.0
        self._taps = SampleTaps({n: m.layer for n, m in self.modules.items()}, self._consume)

    def add(self, batch: Batch) -> None:
        """Add one batch, one sample at a time where a layer mixes samples."""
        self._batches += 1
        measure = self._hutchinson if self.estimator == HESSIAN else self._backward
        if self.single is None:
            self.single = not separable(self.model, self.kind, batch)
        if not self.single:
            before = dict(self.totals)
            try:
                measure(batch)
                return
            except SharedInput:
                self.single, self.totals = True, before
        for sample in singly(batch):
            measure(sample)

    def result(self, samples: int) -> LayerSensitivity:
        """The means over `samples`."""
        means = {name: abs(total) / max(samples, 1) for name, total in self.totals.items()}
        shapes = {name: module.shape for name, module in self.modules.items()}
        return LayerSensitivity(self.estimator, means, shapes)

    def _backward(self, batch: Batch) -> None:
        with frozen(self.model.parameters()), self._taps, torch.enable_grad():
            self._taps.backward(forward_losses(self.model, self.kind, batch))

    def _consume(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        self.totals[name] += _SHARES[self.estimator](self, self.modules[name], inputs, gradients)

    def _weight_gradient(self, module: LoraModule, inputs: Tensor, gradients: Tensor) -> float:
        weight = base_weight(module.base).to(gradients)
        total = 0.0
        chunk = max(1, CHUNK // weight.numel())
        for d, x in zip(gradients.split(chunk), inputs.split(chunk), strict=True):
            total += float(torch.bmm(d.transpose(1, 2), x).mul_(weight).abs_().sum())
        return total

    def _fisher(self, module: LoraModule, inputs: Tensor, gradients: Tensor) -> float:
        # ‖DᵀX‖² = Σ (DDᵀ) ⊙ (XXᵀ), which never forms ∇W (the ghost norm of opacus)
        inner = torch.bmm(gradients, gradients.transpose(1, 2))
        return float((inner * torch.bmm(inputs, inputs.transpose(1, 2))).sum())

    def _hutchinson(self, batch: Batch) -> None:
        """vᵀHv = (⟨v, ∇ℓ(W + εv)⟩ - ⟨v, ∇ℓ(W - εv)⟩) / 2ε, v random signs in every module at once.

        Central differences need no second backward, which fused attention lacks, and never form v
        for more than one module. Cross terms between modules have expectation 0.
        """
        for self._sign in (1.0, -1.0):
            with ExitStack() as stack:
                for module in self.modules.values():
                    stack.enter_context(_hooked(module.base, self._perturb(module)))
                self._backward(batch)

    def _perturb(self, module: LoraModule) -> Callable[..., Tensor]:
        def hook(_: nn.Module, entered: tuple[Tensor, ...], output: Tensor) -> Tensor:
            signs = self._signs(module, output)
            return output + self._sign * _step(module, output) * (entered[0].to(signs) @ signs.T)

        return hook

    def _hessian(self, module: LoraModule, inputs: Tensor, gradients: Tensor) -> float:
        signs = self._signs(module, gradients)
        along = float(((inputs @ signs.T) * gradients).sum())
        return self._sign * along / (2 * _step(module, gradients))

    def _signs(self, module: LoraModule, like: Tensor) -> Tensor:
        seed = zlib.crc32(f"{self.seed}/{self._batches}/{module.name}".encode())
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(0, 2, module.shape, generator=generator) * 2 - 1).to(like)


_SHARES: dict[str, Callable[[_Meter, LoraModule, Tensor, Tensor], float]] = {
    WEIGHT_GRADIENT: _Meter._weight_gradient,
    FISHER: _Meter._fisher,
    HESSIAN: _Meter._hessian,
}


def _step(module: LoraModule, like: Tensor) -> float:
    """ε: a part of the weight's root mean square that suits the precision of differences."""
    relative = 1e-5 if like.dtype == torch.float64 else 1e-2
    return relative * float(base_weight(module.base).float().square().mean().sqrt()) or relative


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
