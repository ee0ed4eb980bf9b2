"""The estimators of sensitivity against full gradients, one sample after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import looped_sensitivity, mean_gradients
from tiny import KINDS, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.estimators import Direction, MeanGradient, fisher, weight_gradient
from tsqlora.sensitivity import layer_sensitivity


class Bare:
    """What the estimators look at in a `LoraModule`."""

    def __init__(self, weight: torch.Tensor, name: str = "m") -> None:
        self.base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.base.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.name, self.shape = name, tuple(weight.shape)


def case(sizes: list[int], dtype: torch.dtype, seed: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A module, X (N, T, in) and D (N, T, out) with some padded positions."""
    samples, tokens, out, width = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    gradients = draw(samples, tokens, out)
    gradients[:, tokens // 2 + 1 :] = 0
    return Bare(draw(out, width)), draw(samples, tokens, width), gradients


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*(st.integers(1, n) for n in (5, 9, 7, 8))).map(list),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(1, 200),
    st.integers(0, 99),
)
def test_in_whatever_pieces_the_sums_are_those_of_full_gradients(
    sizes: list[int], dtype: torch.dtype, room: int, seed: int
) -> None:
    module, inputs, gradients = case(sizes, dtype, seed)
    weight, true = module.base.weight.double(), [0.0, 0.0]
    for x, d in zip(inputs.double(), gradients.double(), strict=True):
        true[0] += float((weight * (d.T @ x)).abs().sum())
        true[1] += float((d.T @ x).square().sum())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    found = [float(f(module, inputs, gradients, room)) for f in (weight_gradient, fisher)]
    assert found == pytest.approx(true, rel=tolerance, abs=1e-12)


def test_no_more_numbers_at_once_than_the_largest_module_has(monkeypatch: Any) -> None:
    module, inputs, gradients = case([6, 5, 8, 10], torch.float32, 0)
    products: list[int] = []
    bmm = torch.bmm

    def counting(*given: Any, **more: Any) -> torch.Tensor:
        result = bmm(*given, **more)
        products.append(result.numel())
        return result

    monkeypatch.setattr(torch, "bmm", counting)
    weight_gradient(module, inputs, gradients, 80)
    fisher(module, inputs.repeat(1, 9, 1), gradients.repeat(1, 9, 1), 80)
    assert max(products) <= 80
    assert sum(products) == 2 * 6 * 80


@pytest.mark.parametrize("name", ["llama", "bart", "gpt2"])
def test_a_bf16_base_is_measured_to_its_precision(name: str) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name), kind)
    rows = rows_of(tiny_batch(kind, samples=5))
    true = looped_sensitivity(model, kind, collate(rows), "weight_gradient")
    model.bfloat16()
    found = layer_sensitivity(model, Dataset.from_list(rows), collate, batch_size=5)
    assert found.modules == pytest.approx(true, rel=0.1)


def test_random_directions_are_unbiased_and_each_sample_has_its_own() -> None:
    module, _, _ = case([1, 1, 6, 7], torch.float64, 0)
    rows = torch.arange(20_000)
    a, b = Direction(3, rows).signs(module, torch.zeros(1, dtype=torch.float64))
    assert a.abs().min() == b.abs().min() == 1
    v = (a[:, :, None] * b[:, None, :]).flatten(1)
    outer = v.T @ v / len(rows)
    assert (outer - torch.eye(42)).abs().max() < 0.04
    few = Direction(3, rows[5:8]).signs(module, a)
    assert torch.equal(few[0], a[5:8])
    assert torch.equal(few[1], b[5:8])
    assert not torch.equal(Direction(4, rows).signs(module, a)[0], a)
    other = Bare(module.base.weight, "n")
    assert not torch.equal(Direction(3, rows).signs(other, a)[0], a)  # type: ignore[arg-type]


def test_the_hessian_does_not_depend_on_the_batches() -> None:
    model = with_lora(tiny_model("llama", double=True), "causal-lm")
    dataset = Dataset.from_list(rows_of(tiny_batch("causal-lm", samples=7)))
    one, seven = (
        layer_sensitivity(model, dataset, collate, "hessian", batch_size=size) for size in (1, 7)
    )
    assert one.modules == pytest.approx(seven.modules, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "deberta-v2"])
def test_the_spectrum_is_that_of_the_mean_gradient(name: str) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, double=True), kind)
    rows = rows_of(tiny_batch(kind, samples=5))
    dataset = Dataset.from_list(rows)
    found = layer_sensitivity(model, dataset, collate, batch_size=3, spectrum=6)
    for name, mean in mean_gradients(model, kind, collate(rows)).items():
        true = torch.linalg.svdvals(mean)[:6]
        assert torch.allclose(torch.tensor(found.spectrum[name]).double(), true, atol=1e-9)
        directions = torch.as_tensor(found.directions[name])
        assert_orthonormal(directions)
        assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()
        energies = (mean @ directions.double().T).norm(dim=0)  # σ_j each, as each is its v_j
        assert torch.allclose(energies, true[: len(directions)], atol=1e-6)
        assert (true[len(directions) :] <= 1.001e-2 * true[0]).all()


def assert_orthonormal(rows: torch.Tensor) -> None:
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.integers(1, 6))
def test_a_sketch_finds_a_low_rank_mean_exactly_and_a_decaying_one_nearly(
    seed: int, rank: int
) -> None:
    torch.manual_seed(seed)
    out, width, samples = 120, 150, 3
    module: Any = Bare(torch.zeros(out, width).double())
    sketch, near = MeanGradient(module, 6, seed), MeanGradient(module, 6, seed)
    assert not sketch.whole
    inputs = torch.randn(samples, rank, width).double()
    gradients = torch.randn(samples, 1, out).double().expand(-1, rank, -1)
    decay = 0.5 ** torch.arange(40).double()
    u, v = (torch.linalg.qr(torch.randn(n, 40).double())[0] for n in (out, width))
    for x, d in zip(inputs, gradients, strict=True):
        sketch.add(x[None], d[None])
    near.add(v.T[None], (u * decay).T[None])
    mean = torch.einsum("ntk,ntl->kl", gradients, inputs) / samples
    true = torch.linalg.svdvals(mean)[:6]
    assert torch.allclose(torch.tensor(sketch.spectrum(samples)[0]).double(), true, atol=1e-8)
    values, directions = near.spectrum(1)
    assert values == pytest.approx(decay[:6].tolist(), rel=0.02)
    _, low = sketch.spectrum(samples)
    assert len(low) == samples  # each sample's gradient is of rank 1
    held = (mean @ low.double().T).square().sum()
    assert float(held) == pytest.approx(float(mean.square().sum()), rel=1e-5)
    for found in (low, directions):
        assert_orthonormal(found)
    for count in range(1, 7):
        held = ((u * decay @ v.T) @ directions[:count].double().T).square().sum()
        assert held >= 0.97 * decay[:count].square().sum()


def test_a_module_that_no_sample_reaches_has_none() -> None:
    module, _, _ = case([1, 1, 3, 4], torch.float32, 0)
    values, directions = MeanGradient(module, 2, 0).spectrum(1)
    assert values == [0.0, 0.0]
    assert directions.shape == (0, 4)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_mean_gradient_that_is_zero_or_not_finite_has_no_directions(value: float) -> None:
    for sizes in ([2, 3, 4, 5], [2, 3, 90, 120]):
        module, inputs, gradients = case(sizes, torch.float32, 0)
        sketch = MeanGradient(module, 2, 0)
        sketch.add(inputs, torch.full_like(gradients, value))
        values, directions = sketch.spectrum(2)
        assert directions.shape == (0, sizes[-1])
        assert values == pytest.approx([0.0 if value == 0 else torch.nan] * 2, nan_ok=True)
