"""What a training step records of its samples, against a loop over them; and what it trains."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reference import looped_gradients, loss_of
from test_per_sample_grads import checkpointed
from tiny import KINDS, tiny_batch, tiny_model, with_lora
from tsqlora import recording
from tsqlora.errors import ModelError
from tsqlora.losses import target_lengths
from tsqlora.per_sample_grads import SHORT, Sketch
from tsqlora.recording import Recorder, sample_weights, summed_loss

NAMES = ["bert", "albert", "bart", "t5", "gpt2", "llama"]


@pytest.fixture(scope="module", autouse=True)
def _math_attention() -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def sketched(gradients: dict[str, Tensor]) -> Tensor:
    sketch = Sketch(SHORT)
    for name, gradient in gradients.items():
        sketch.add(name, gradient[None])
    return sketch.take()[0]


@settings(max_examples=25, deadline=None, phases=[Phase.generate])
@given(
    name=st.sampled_from(NAMES),
    samples=st.integers(1, 6),
    longest=st.integers(4, 12),
    left=st.booleans(),
    seed=st.integers(0, 10**6),
    double=st.booleans(),
    at_once=st.sampled_from([1, 2**10, 2**17]),
    checkpointing=st.sampled_from([None, "reentrant", "not reentrant"]),
)
def test_norms_and_sketches_are_those_of_a_loop_and_gradients_those_of_autograd(
    name: str, samples: int, longest: int, left: bool, seed: int, double: bool, at_once: int,
    checkpointing: str | None,
) -> None:  # fmt: skip
    kind, relative = KINDS[name], 1e-10 if double else 1e-5
    model = with_lora(tiny_model(name, seed, double=double), kind)
    batches = [
        tiny_batch(kind, samples, s, longest, left=left and kind == "causal-lm")
        for s in (seed, seed + 1)
    ]
    generator = torch.Generator().manual_seed(seed)
    # powers of two, as norms that work in float32 whatever the model round what flows back
    weights = 2.0 ** torch.randint(-3, 2, (2, samples), generator=generator).double()
    weights[0, 0] = 0.0
    loops = [looped_gradients(model, kind, batch) for batch in batches]
    for batch, own in zip(batches, weights, strict=True):
        (own * loss_of(model, kind, batch)).sum().backward()
    wanted = gradients_of(model)
    if checkpointing is not None and name != "albert":  # it has no checkpointing
        checkpointed(model, checkpointing == "reentrant")
    recorder = Recorder(model)
    before, recording.AT_ONCE = recording.AT_ONCE, at_once
    try:
        for batch, own, loop in zip(batches, weights, loops, strict=True):  # gradients accumulate
            with recorder.recording():
                losses = loss_of(model, kind, batch)
                recorder.expect(samples)
                (own * losses).sum().backward()
                norms, sketches = recorder.take(own)
            assert sketches is not None
            for i, gradients in enumerate(loop):
                true = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
                true = true * (own[i] != 0)
                assert abs(norms[i] - true) <= relative * max(true, 1e-3)
                expected = sketched(gradients) * (own[i] != 0)
                assert (sketches[i] - expected).norm() <= relative * max(true, 1e-3)
    finally:
        recording.AT_ONCE = before
    got = gradients_of(model)
    assert got.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (got[key] - gradient).norm() <= relative * gradient.norm().clamp(min=1e-3), key


def test_a_module_is_as_it_was_afterwards_and_its_bias_is_trained() -> None:
    model = with_lora(tiny_model("bert"), "classification", lora_bias=True)
    batch = tiny_batch("classification")
    loss_of(model, "classification", batch).sum().backward()
    wanted = gradients_of(model)
    assert any("bias" in name and "lora_B" in name for name in wanted)
    recorder = Recorder(model)
    with recorder.recording():
        losses = loss_of(model, "classification", batch)
        recorder.expect(len(losses))
        losses.sum().backward()
    assert not any("forward" in module.__dict__ for module in model.modules())
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, wanted[name])


def test_autocast_trains_and_records_what_it_would_have() -> None:
    model = with_lora(tiny_model("llama"), "causal-lm")
    batch = tiny_batch("causal-lm")
    loops = looped_gradients(model, "causal-lm", batch)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, "causal-lm", batch)

    losses().sum().backward()
    wanted = gradients_of(model)
    recorder = Recorder(model)
    with recorder.recording():
        found = losses()
        recorder.expect(len(found))
        found.sum().backward()
        norms, _ = recorder.take(torch.ones(len(found)))
    for name, gradient in gradients_of(model).items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted[name]).norm() <= 0.03 * wanted[name].norm()
    true = torch.stack([sum(g.square().sum() for g in loop.values()).sqrt() for loop in loops])  # type: ignore[union-attr]
    assert ((norms - true).abs() <= 0.05 * true).all()


@pytest.mark.parametrize("name", ["bert", "bart", "llama"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_are_the_shares_of_samples_in_the_trained_loss(name: str, smoothing: float) -> None:
    kind, batch = KINDS[name], tiny_batch(KINDS[name])
    model = with_lora(tiny_model(name), kind)
    with torch.no_grad():
        output = model(**batch)
    lengths, labels = target_lengths(kind, batch["labels"]), batch["labels"]
    total = summed_loss(kind, output.logits, labels, smoothing)
    loss = output.loss
    if smoothing:
        from transformers.trainer_pt_utils import LabelSmoother

        smoother = LabelSmoother(smoothing)
        loss = smoother(output, labels, shift_labels=kind == "causal-lm")
    weights = sample_weights(lengths, total, loss, float(lengths.sum()))
    torch.testing.assert_close(weights, lengths / lengths.sum())
    with pytest.raises(ModelError, match="something is added to it"):
        sample_weights(lengths, total, loss * 1.05, float(lengths.sum()))


def test_what_is_not_linear_is_refused_by_name() -> None:
    model = with_lora(
        tiny_model("llama"), "causal-lm", target_modules=["embed_tokens", "q_proj"], random=False
    )
    with pytest.raises(ModelError, match="embed_tokens"):
        Recorder(model)


def test_a_loss_that_reaches_no_factor_is_an_error() -> None:
    recorder = Recorder(with_lora(tiny_model("bert"), "classification"))
    with recorder.recording(), pytest.raises(ModelError, match="reaches no LoRA factor"):
        recorder.take(torch.ones(2))
