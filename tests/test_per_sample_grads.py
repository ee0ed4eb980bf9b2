"""The engine against a loop over samples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import looped_gradients, looped_lookahead, loss_of
from tiny import DECODERS, ENCODERS, KINDS, SEQ2SEQ, tiny_batch, tiny_model, with_lora
from tsqlora.hooks import SharedInput
from tsqlora.lora_layers import lora_parameters
from tsqlora.per_sample_grads import (
    Dots,
    Keep,
    PerSampleGradients,
    Sketch,
    SquaredNorms,
    one_step,
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


@settings(max_examples=15)
@given(
    name=st.sampled_from(["bert", "bart", "gpt2", "llama", "albert"]),
    samples=st.integers(1, 6),
    longest=st.integers(4, 12),
    left=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_norms_dots_and_sketches_reduce_the_looped_gradients(
    name: str, samples: int, longest: int, left: bool, seed: int
) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, seed, double=True), kind)
    batch = tiny_batch(kind, samples, seed, longest, left=left and kind == "causal-lm")
    loops = looped_gradients(model, kind, batch)
    norms, dots, sketch, alone = SquaredNorms(), Dots(loops[0]), Sketch(64), Sketch(64)
    engine(model, kind, batch, norms, dots, sketch)
    for factor in loops[0]:
        alone.add(factor, torch.stack([g[factor] for g in loops]))
    expected_norms = torch.stack([sum(g.square().sum() for g in loop.values()) for loop in loops])
    expected_dots = torch.stack(
        [sum((g * loops[0][f]).sum() for f, g in loop.items()) for loop in loops]
    )
    assert torch.allclose(norms.total, expected_norms, rtol=1e-9)
    assert torch.allclose(dots.total, expected_dots, rtol=1e-7, atol=1e-9)
    assert torch.allclose(sketch.take(), alone.take(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "albert", "bart", "t5", "gpt2", "llama", "qwen2-moe"])
def test_lookahead_of_a_batch_equals_steps_really_taken_one_by_one(name: str) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, double=True), kind)
    batch = tiny_batch(kind, samples=3)
    keep, norms = Keep(), SquaredNorms()
    gradients, _ = engine(model, kind, batch, keep, norms)
    steps = 0.5 / norms.total.sqrt()
    with torch.no_grad(), one_step(gradients, keep.gradients, steps):
        got = loss_of(model, kind, batch)
    assert torch.allclose(got, looped_lookahead(model, kind, batch, steps), rtol=1e-9)


def test_float32_agrees_to_1e5() -> None:
    model = with_lora(tiny_model("llama"), "causal-lm")
    batch = tiny_batch("causal-lm")
    norms = SquaredNorms()
    engine(model, "causal-lm", batch, norms)
    loops = looped_gradients(model, "causal-lm", batch)
    expected = torch.stack([sum(g.square().sum() for g in loop.values()) for loop in loops])
    assert torch.allclose(norms.total, expected, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = with_lora(tiny_model("llama", double=True), "causal-lm")
    batch = tiny_batch("causal-lm")
    plain, checkpointed = SquaredNorms(), SquaredNorms()
    engine(model, "causal-lm", batch, plain)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    engine(model, "causal-lm", batch, checkpointed)
    assert torch.allclose(plain.total, checkpointed.total, rtol=1e-9)


def test_gradients_held_by_parameters_stay_as_they_were() -> None:
    model = with_lora(tiny_model("bert"), "classification")
    parameters = lora_parameters(model)
    parameters[0].grad = torch.ones_like(parameters[0])
    engine(model, "classification", tiny_batch("classification"), SquaredNorms())
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(p.grad is None for p in parameters[1:])


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
