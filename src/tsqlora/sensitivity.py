"""How much the loss depends on each target module's weight W (out, in), from hooks alone.

∇W of sample i is D_iᵀ X_i, formed in the backward hook from the module's input X_i (T, in) and the
gradient D_i (T, out) at its output, one module at a time, so frozen and quantised weights work
(`estimators.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from tsqlora import processes
from tsqlora.artefacts import atomic_file, atomic_write_json, remove
from tsqlora.batches import (
    Batch,
    Collator,
    Pool,
    evaluating,
    forward_losses,
    passing,
    singly,
    subset,
    unwrapped,
)
from tsqlora.errors import ConfigError, RunError
from tsqlora.estimators import Direction, MeanGradient, fisher, weight_gradient
from tsqlora.hooks import SampleTaps, SharedInput, frozen
from tsqlora.lora_layers import LoraModule, base_weight, has_lora, lora_modules, temporary_adapter
from tsqlora.losses import infer_kind
from tsqlora.per_sample_grads import separable
from tsqlora.trials import require_samples

WEIGHT_GRADIENT, FISHER, HESSIAN = "weight_gradient", "fisher", "hessian"


@dataclass(frozen=True)
class LayerSensitivity:
    """The sensitivity of every target module, and its shape (out, in).

    Attributes:
        spectrum: the largest singular values of the module's mean gradient, in falling order;
            empty unless asked for.
        directions: its right singular vectors (k, in) of length 1 to these, largest entries
            positive; fewer where there are no more, empty unless asked for. Never compared.
    """

    estimator: str
    modules: dict[str, float]
    shapes: dict[str, tuple[int, int]]
    spectrum: dict[str, list[float]] = field(default_factory=dict)
    directions: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, object]:
        """As in `sensitivity.json`."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        written: dict[str, object] = {
            "version": 1,
            "estimator": self.estimator,
            "modules": self.modules,
            "shapes": shapes,
        }
        return {**written, "spectrum": self.spectrum} if self.spectrum else written

    def save(self, path: str | Path) -> None:
        """Write `sensitivity.json`, and beside it `sensitivity.safetensors` for the directions."""
        beside = directions_file(path)
        if self.directions:
            with atomic_file(beside) as file:
                save_file(self.directions, file)
        else:
            remove(beside)
        atomic_write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> LayerSensitivity:
        """Read `sensitivity.json`, and the directions where they are beside it.

        Raises:
            RunError: the file is missing or is not a sensitivity.
        """
        beside = directions_file(path)
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            shapes = {name: (int(s[0]), int(s[1])) for name, s in raw["shapes"].items()}
            spectrum = {name: list(values) for name, values in raw.get("spectrum", {}).items()}
            directions = load_file(beside) if beside.exists() else {}
            return cls(raw["estimator"], dict(raw["modules"]), shapes, spectrum, directions)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RunError(
                f"{path} and {beside.name} are not a layer sensitivity ({error}): remove them and "
                "measure it again."
            ) from error


def directions_file(path: str | Path) -> Path:
    """Where the directions of the sensitivity at `path` lie."""
    return Path(path).with_suffix(".safetensors")


def layer_sensitivity(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    estimator: str = WEIGHT_GRADIENT,
    target_modules: str | Sequence[str] = "all-linear",
    max_samples: int = 512,
    batch_size: int = 32,
    seed: int = 0,
    spectrum: int = 0,
    together: bool = False,
) -> LayerSensitivity:
    """S_m for every target module, the mean over samples of `dataset` (TsqLoRA §3).

    `weight_gradient`: E_i Σ|W ⊙ ∇W ℓ_i|, to first order the loss change of removing each weight.
    `fisher`: E_i Σ (∇W ℓ_i)², the trace of the empirical Fisher matrix.
    `hessian`: |E_i tr ∇²_W ℓ_i|, Hutchinson's estimate with one direction a sample; by its nature
    two forwards and backwards, so twice the time of the others.

    `spectrum`: of how many ranks to take the singular values and right singular vectors of each
    module's mean gradient E_i ∇W ℓ_i in the same pass (0: none), which the rule `marginal_gain` of
    `allocate_ranks`, `start_from_gradient` and components that grow need: the largest rank.

    `together`: all processes of this launch call it at once, each measures a share of the batches,
    and all get the result that one of them alone would get.

    A model without adapters gets temporary ones (B = 0, so its function is unchanged), removed
    after. At most `max_samples` seeded rows are used. W is the frozen weight; dropout is off.

    Raises:
        ConfigError: the estimator is unknown.
        ModelError: the model's kind is unknown or nothing matches `target_modules`.
        DataError: there is no row, or the batches hold no labels.
    """
    if estimator not in (WEIGHT_GRADIENT, FISHER, HESSIAN):
        raise ConfigError(f"Unknown estimator {estimator!r}: weight_gradient, fisher or hessian.")
    model = unwrapped(model)
    kind = infer_kind(model)
    require_samples(model, dataset, collator)
    rows = subset(dataset, max_samples, seed)
    with ExitStack() as stack:
        if not has_lora(model):
            stack.enter_context(temporary_adapter(model, kind, 1, target_modules=target_modules))
        stack.enter_context(evaluating(model))
        meter = Meter(model, kind, estimator, seed, spectrum)
        pool = Pool(model, rows, collator, batch_size)
        _, batch = next(pool.take(pool.plan[0]))
        meter.single = not separable(model, kind, batch)
        share = (processes.index(), processes.count()) if together else (0, 1)
        for number, positions, batch in _batches(pool, *share):
            meter.add(batch, positions, number)
        if together:
            meter.unite()
        return meter.result(len(rows))


def _batches(pool: Pool, first: int, every: int) -> Iterator[tuple[int, np.ndarray, Batch]]:
    """(number, positions, batch) of every so many-th batch from the first on."""
    mine = list(range(first, len(pool.plan), every))
    ahead = [pool.plan[n] for n in mine]
    with passing(pool.tokens, ahead, "layer sensitivity", hidden=first > 0) as passed:
        for number in mine:
            for positions, batch in pool.take(pool.plan[number]):
                yield number, positions, batch
            passed(pool.plan[number])


class Meter:
    """Adds up S_m of every module, batch by batch.

    Attributes:
        totals: by the number of the batch, Σ_i over it of each module's share, in float64.
        sketches: of the mean gradients, where they are wanted.
    """

    def __init__(
        self, model: nn.Module, kind: str, estimator: str, seed: int = 0, spectrum: int = 0
    ) -> None:
        self.model, self.kind, self.estimator, self.seed = model, kind, estimator, seed
        self.modules = {module.name: module for module in lora_modules(model)}
        self.totals: dict[int, dict[str, float]] = {}
        self.sketches = {
            name: MeanGradient(module, spectrum, seed)
            for name, module in self.modules.items()
            if spectrum
        }
        self.room = max(math.prod(module.shape) for module in self.modules.values())
        self.single: bool | None = None
        self._found: dict[str, Tensor] = {}
        self._in_sketch: frozenset[str] = frozenset()  # of this batch, so far
        self._sketched: frozenset[str] = frozenset()  # of this batch, before it was taken apart
        self._steps: dict[str, float] = {}
        self._taps = SampleTaps({n: m.layer for n, m in self.modules.items()}, self._consume)
        self._direction: Direction | None = None
        self._sign = 0.0

    def add(self, batch: Batch, positions: np.ndarray, number: int = 0) -> None:
        """Add a batch, or a piece of it, one sample at a time where a layer mixes samples.

        `positions` (N) are the samples' rows in the data set, `number` the batch's.
        """
        self._batch = self.totals.setdefault(number, dict.fromkeys(self.modules, 0.0))
        if self.single is None:
            self.single = not separable(self.model, self.kind, batch)
        if not self.single:
            try:
                self._measure(batch, positions)
                return
            except SharedInput:
                self.single, self._sketched = True, self._in_sketch
        for i, sample in enumerate(singly(batch)):
            self._measure(sample, positions[i : i + 1])
        self._sketched = frozenset()

    def unite(self) -> None:
        """Take in what the other processes have added; the same in all of them."""
        self.totals = {k: v for part in processes.gather(self.totals) for k, v in part.items()}
        for sketch in self.sketches.values():
            sketch.unite()

    def result(self, samples: int) -> LayerSensitivity:
        """The means over `samples`."""
        totals = {
            name: sum(self.totals[number][name] for number in sorted(self.totals))
            for name in self.modules
        }
        means = {name: abs(total) / max(samples, 1) for name, total in totals.items()}
        shapes = {name: module.shape for name, module in self.modules.items()}
        found = {name: sketch.spectrum(samples) for name, sketch in self.sketches.items()}
        spectrum = {name: values for name, (values, _) in found.items()}
        directions = {name: vectors.numpy() for name, (_, vectors) in found.items()}
        return LayerSensitivity(self.estimator, means, shapes, spectrum, directions)

    def _measure(self, batch: Batch, positions: np.ndarray) -> None:
        self._found, self._in_sketch = {}, frozenset()
        if self.estimator == HESSIAN:
            self._hutchinson(batch, torch.as_tensor(positions))
        else:
            self._backward(batch)
        if self._found:  # one wait for the device a batch
            values = torch.stack(list(self._found.values())).cpu().double().tolist()
            for name, value in zip(self._found, values, strict=True):
                self._batch[name] += value

    def _backward(self, batch: Batch) -> None:
        with frozen(self.model.parameters()), self._taps, torch.enable_grad():
            self._taps.backward(forward_losses(self.model, self.kind, batch))

    def _consume(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        module = self.modules[name]
        if self.estimator == HESSIAN:
            assert self._direction is not None
            share = self._direction.along(module, inputs, gradients)
            share = share * self._sign / (2 * self._step(module, gradients))
        else:
            measure = weight_gradient if self.estimator == WEIGHT_GRADIENT else fisher
            share = measure(module, inputs, gradients, self.room)
        self._found[name] = self._found[name] + share if name in self._found else share
        if self.sketches and self._sign >= 0 and name not in self._sketched:
            self.sketches[name].add(inputs, gradients)
            self._in_sketch |= {name}

    def _hutchinson(self, batch: Batch, positions: Tensor) -> None:
        """vᵀHv = (⟨v, ∇ℓ(W + εv)⟩ - ⟨v, ∇ℓ(W - εv)⟩) / 2ε, in every module at once.

        Central differences need no second backward, which fused attention lacks. Cross terms
        between modules have expectation 0.
        """
        self._direction = Direction(self.seed, positions)
        for self._sign in (1.0, -1.0):
            with ExitStack() as stack:
                for module in self.modules.values():
                    stack.enter_context(_hooked(module.base, self._perturb(module)))
                self._backward(batch)

    def _perturb(self, module: LoraModule) -> Callable[..., Tensor]:
        def hook(_: nn.Module, entered: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert self._direction is not None
            size, lengths = self._sign * self._step(module, output), self._taps.lengths
            return self._direction.move(module, entered[0], output, size, lengths)

        return hook

    def _step(self, module: LoraModule, like: Tensor) -> float:
        """ε: a part of the weight's root mean square that suits the precision of differences."""
        if module.name not in self._steps:
            relative = 1e-5 if like.dtype == torch.float64 else 1e-2
            size = float(base_weight(module.base).float().norm())
            self._steps[module.name] = relative * (size / math.prod(module.shape) ** 0.5 or 1.0)
        return self._steps[module.name]


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
