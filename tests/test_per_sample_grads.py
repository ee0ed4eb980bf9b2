"""The engine against a loop over samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from reference import looped_gradients, loss_of
from tiny import DECODERS, ENCODERS, KINDS, SEQ2SEQ, tiny_batch, tiny_model, with_lora
from tsqlora.hooks import SharedInput
from tsqlora.lora_layers import lora_parameters
from tsqlora.per_sample_grads import (
    Dots,
    Keep,
    PerSampleGradients,
    Sketch,
    SquaredNorms,
    separable,
)

ARCHITECTURES = [*ENCODERS, *SEQ2SEQ, *DECODERS]
MIXES_SAMPLES = ["deberta", "deberta-v2", "xlnet"]
RELATIVE = 1e-10


@pytest.fixture(scope="module", autouse=True)
def _math_attention() -> Iterator[None]:
    """Fused attention kernels may round padded rows differently; the law is about the maths."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def engine(model, kind, batch, *reducers):  # type: ignore[no-untyped-def]
    with PerSampleGradients(model, *reducers) as gradients:
        losses = loss_of(model, kind, batch)
        gradients.backward(losses)
    return gradients, losses.detach()


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in MIXES_SAMPLES])
def test_every_gradient_equals_that_of_a_loop(name: str) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, double=True), kind)
    batch = tiny_batch(kind)
    keep = Keep()
    engine(model, kind, batch, keep)
    for i, expected in enumerate(looped_gradients(model, kind, batch)):
        scale = max(g.abs().max() for g in expected.values())
        for factor, gradient in expected.items():
            got = keep.gradients[factor][i] if factor in keep.gradients else 0 * gradient
            assert (got - gradient).abs().max() <= RELATIVE * scale, factor


@pytest.mark.parametrize("name", MIXES_SAMPLES)
def test_a_layer_run_once_for_the_whole_batch_is_refused_and_exact_singly(name: str) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, double=True), kind)
    with pytest.raises(SharedInput, match="cannot be told apart"):
        engine(model, kind, tiny_batch(kind), SquaredNorms())
    batch = tiny_batch(kind, samples=1)
    norms = SquaredNorms()
    engine(model, kind, batch, norms)
    (expected,) = looped_gradients(model, kind, batch)
    total = sum(g.square().sum() for g in expected.values())
    assert torch.allclose(norms.total, total, rtol=RELATIVE)


@pytest.mark.parametrize("longest", [3, 9])  # at 3, XLNet's (T, N) looks like 3 samples
@pytest.mark.parametrize("name", ["bert", "gpt2", "bart", *MIXES_SAMPLES])
def test_samples_are_told_apart_where_each_alone_has_the_same_gradient(
    name: str, longest: int
) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name), kind)
    whole = tiny_batch(kind, samples=3)
    batch = {key: tensor[..., :longest].contiguous() for key, tensor in whole.items()}
    assert separable(model, kind, batch) == (name not in MIXES_SAMPLES)


@settings(max_examples=30)
@given(
    name=st.sampled_from(["bert", "bart", "t5", "gpt2", "llama", "albert"]),
    samples=st.integers(1, 6),
    longest=st.integers(4, 12),
    left=st.booleans(),
    seed=st.integers(0, 10**6),
    checkpointing=st.sampled_from([None, "reentrant", "not reentrant"]),
)
def test_norms_dots_and_sketches_reduce_the_looped_gradients(
    name: str, samples: int, longest: int, left: bool, seed: int, checkpointing: str | None
) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, seed, double=True), kind)
    batch = tiny_batch(kind, samples, seed, longest, left=left and kind == "causal-lm")
    loops = looped_gradients(model, kind, batch)
    other = looped_gradients(model, kind, tiny_batch(kind, 1, seed + 1))[0]
    if checkpointing is not None and name != "albert":  # it has no checkpointing
        checkpointed(model, checkpointing == "reentrant")
    norms, dots, sketch, alone = SquaredNorms(), Dots(other), Sketch(64), Sketch(64)
    engine(model, kind, batch, norms, dots, sketch)
    for factor in other:
        alone.add(factor, torch.stack([g[factor] for g in loops]))
    true = torch.stack([flat(g) for g in loops])
    close(norms.total, true.square().sum(1))
    close(dots.total, true @ flat(other))
    close(sketch.take(), alone.take())


class Bag(torch.nn.Module):
    """Words to their mean to two layers: unlike transformers' models it takes an empty batch."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(20, 6, padding_idx=0)
        self.up, self.down = torch.nn.Linear(6, 5), Conv1D(3, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.words(ids)))).sum(1)


@settings(max_examples=20)
@given(samples=st.integers(0, 4), longest=st.integers(0, 5), seed=st.integers(0, 10**6))
def test_batches_of_none_and_samples_without_tokens(samples: int, longest: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["words", "up", "down"], init_lora_weights=False)
    model = get_peft_model(Bag(), config).double()
    ids = torch.randint(0, 20, (samples, longest))
    norms, sketch, keep = SquaredNorms(), Sketch(16), Keep()
    with PerSampleGradients(model, norms, sketch, keep) as gradients:
        gradients.backward(model(ids).square().sum(1))
    weights = gradients.weights
    loops = [
        torch.autograd.grad(model(i[None]).square().sum(), list(weights.values())) for i in ids
    ]
    flats = [torch.cat([g.flatten() for g in loop]) for loop in loops]
    true = torch.stack([*flats, torch.zeros(sum(w.numel() for w in weights.values())).double()])
    whole = [keep.whole(name, weight).flatten(1) for name, weight in weights.items()]
    close(torch.cat(whole, 1), true[:-1])
    close(norms.total, true[:-1].square().sum(1))
    assert sketch.take().shape == (samples, 16)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def close(got: Tensor, true: Tensor) -> None:
    assert got.shape == true.shape
    assert (got - true).norm() <= RELATIVE * true.norm()


def checkpointed(model: Any, reentrant: bool) -> None:
    """Gradient checkpointing on, dropout off."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def test_float32_agrees_to_1e5() -> None:
    model = with_lora(tiny_model("llama"), "causal-lm")
    batch = tiny_batch("causal-lm")
    norms = SquaredNorms()
    engine(model, "causal-lm", batch, norms)
    loops = looped_gradients(model, "causal-lm", batch)
    expected = torch.stack([sum(g.square().sum() for g in loop.values()) for loop in loops])
    assert torch.allclose(norms.total, expected, rtol=1e-5)


def test_gradients_held_by_parameters_stay_as_they_were() -> None:
    model = with_lora(tiny_model("bert"), "classification")
    parameters = lora_parameters(model)
    parameters[0].grad = torch.ones_like(parameters[0])
    engine(model, "classification", tiny_batch("classification"), SquaredNorms())
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(p.grad is None for p in parameters[1:])
    assert all(p.requires_grad for p in parameters)


@pytest.mark.parametrize("name", ["bert", "bart", "llama"])
def test_with_a_depth_the_last_layers_gradients_are_the_same(name: str) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, double=True), kind)
    batch = tiny_batch(kind)
    whole, last = Keep(), Keep()
    engine(model, kind, batch, whole)
    with PerSampleGradients(model, last, depth=0.3) as gradients:
        gradients.backward(loss_of(model, kind, batch))
    names = list(whole.gradients)
    assert 0 < len(last.gradients) < len(names) / 2
    assert set(last.gradients) == set(gradients.weights)
    for factor, gradient in last.gradients.items():
        assert torch.equal(gradient, whole.gradients[factor])


def test_sketches_keep_inner_products_in_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(2, 6, 30, generator=generator)
    true = (gradient[0] * gradient[1]).sum()
    estimates = []
    for seed in range(400):
        sketch = Sketch(64, seed)
        sketch.add("module.A", gradient)
        first, second = sketch.take()
        estimates.append(first @ second)
    found = torch.stack(estimates)
    assert abs(found.mean() - true) < 4 * found.std() / 20


def test_short_factors_fill_a_sketch_as_a_long_one_does() -> None:
    """The error of an inner product is ‖g‖‖h‖/√size, however many factors the entries lie in."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(2, 100, 4, 10, generator=generator)
    first, second = gradients.flatten(1)
    size, errors = 509, []
    for seed in range(60):
        sketch = Sketch(size, seed)
        for number in range(100):
            sketch.add(f"layer {number}.A", gradients[:, number])
        got, other = sketch.take()
        errors.append(float(got @ other - first @ second))
    usual = float(first.norm() * second.norm()) / size**0.5
    assert 0.6 * usual < np.std(errors) < 1.4 * usual
