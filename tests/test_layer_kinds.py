"""Gradients by sample and own steps for each kind of layer that PEFT makes, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from reference import looped_gradients, looped_lookahead, loss_of
from tiny import KINDS, tiny_batch, tiny_model, with_lora
from tsqlora.errors import ModelError
from tsqlora.lookahead import one_step
from tsqlora.per_sample_grads import Dots, Keep, PerSampleGradients, Sketch, SquaredNorms

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EMBEDDINGS = {
    "bert": ["word_embeddings", "query"],
    "albert": ["word_embeddings", "query"],
    "bart": ["shared", "embed_tokens", "q_proj"],
    "t5": ["shared", "q"],
    "gpt2": ["wte", "c_attn"],
    "llama": ["embed_tokens", "q_proj"],
    "gemma": ["embed_tokens", "q_proj"],
}


@pytest.fixture(scope="module", autouse=True)
def _math_attention() -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def relative(got: Tensor, true: Tensor) -> float:
    return float((got - true).norm() / true.norm().clamp(min=1e-30))


def error_of(model: Any, kind: str, batch: dict[str, Tensor]) -> float:
    """The worst relative error of gradients, norms, dots, sketches and lookahead to a loop."""
    loops = looped_gradients(model, kind, batch)
    keep, norms, sketch = Keep(), SquaredNorms(), Sketch(64)
    dots = Dots(loops[0])
    with PerSampleGradients(model, keep, norms, dots, sketch) as gradients:
        gradients.backward(loss_of(model, kind, batch))
    whole = {name: keep.whole(name, weight) for name, weight in gradients.weights.items()}
    errors = [
        relative(flat({name: g[i] for name, g in whole.items()}), flat(loop))
        for i, loop in enumerate(loops)
    ]
    true = torch.stack([flat(loop) for loop in loops])
    errors.append(relative(torch.as_tensor(norms.total).sqrt(), true.norm(dim=1)))
    errors.append(relative(torch.as_tensor(dots.total), true @ true[0]))
    alone = Sketch(64)
    for name, gradient in whole.items():
        alone.add(name, gradient)
    errors.append(relative(sketch.take(), alone.take()))
    steps = 0.5 / true.norm(dim=1)
    with torch.no_grad(), one_step(gradients, keep, steps):
        stepped = loss_of(model, kind, batch)
    errors.append(relative(stepped, looped_lookahead(model, kind, batch, steps)))
    return max(errors)


@settings(max_examples=20)
@given(
    name=st.sampled_from(sorted(EMBEDDINGS)),
    samples=st.integers(1, 5),
    longest=st.integers(4, 10),
    left=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_embeddings(name: str, samples: int, longest: int, left: bool, seed: int) -> None:
    kind = KINDS[name]
    model = tiny_model(name, seed, double=True)
    model = with_lora(model, kind, target_modules=EMBEDDINGS[name])
    batch = tiny_batch(kind, samples, seed, longest, left=left and kind == "causal-lm")
    assert error_of(model, kind, batch) < 1e-10


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "phimoe"])
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[1:]])
def test_expert_parameters(name: str, parameters: list[str]) -> None:
    model = tiny_model(name, double=True)
    model = with_lora(model, "causal-lm", target_modules=["q_proj"], target_parameters=parameters)
    assert error_of(model, "causal-lm", tiny_batch("causal-lm")) < 1e-10
    assert "forward" not in vars(model.base_model.model.model.layers[0].mlp.experts)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_expert_parameters_whatever_the_experts_run_on(implementation: str) -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    model = with_lora(model, "causal-lm", target_modules=["q_proj"], target_parameters=EXPERTS)
    assert error_of(model, "causal-lm", tiny_batch("causal-lm")) < 1e-5


def test_rslora() -> None:
    model = with_lora(tiny_model("bert", double=True), "classification", use_rslora=True)
    assert error_of(model, "classification", tiny_batch("classification")) < 1e-10


def test_a_bias_of_lora_and_modules_to_save_have_no_part_in_the_gradient() -> None:
    model = with_lora(
        tiny_model("gpt2", double=True), "causal-lm", lora_bias=True, modules_to_save=["wpe"]
    )
    assert error_of(model, "causal-lm", tiny_batch("causal-lm")) < 1e-10


def test_of_several_adapters_the_active_one() -> None:
    model = with_lora(tiny_model("llama", double=True), "causal-lm")
    second = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    model.add_adapter("second", second)
    model.double()
    batch = tiny_batch("causal-lm")
    for adapter, rank in [("default", 3), ("second", 2)]:
        model.set_adapter(adapter)
        assert error_of(model, "causal-lm", batch) < 1e-10
        weights = PerSampleGradients(model).weights
        assert {min(weight.shape) for weight in weights.values()} == {rank}


def test_a_bf16_base_under_float32_factors() -> None:
    # a kernel may round a row of bf16 by the shape of its batch: the batch is one sample, repeated
    model = with_lora(tiny_model("llama").bfloat16(), "causal-lm").float()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    batch = {name: value[:1].repeat(3, 1) for name, value in tiny_batch("causal-lm").items()}
    assert error_of(model, "causal-lm", batch) < 2e-2


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_under_autocast_as_exact_as_bf16_is(name: str) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name), kind)
    batch = tiny_batch(kind)
    exact, low = Keep(), Keep()
    for keep, enabled in [(exact, False), (low, True)]:
        with torch.autocast("cpu", torch.bfloat16, enabled), PerSampleGradients(model, keep) as g:
            g.backward(loss_of(model, kind, batch))
    for i in range(len(batch["labels"])):
        got = flat({n: gradient[i] for n, gradient in low.gradients.items()})
        true = flat({n: exact.gradients[n][i] for n in low.gradients})
        assert got.dtype == torch.float32
        assert relative(got, true) < 0.03


def test_a_module_that_is_never_called_has_gradient_zero() -> None:
    model = with_lora(tiny_model("bert", double=True), "classification")
    attention = model.base_model.model.bert.encoder.layer[0].attention.self
    attention.forward = lambda hidden, *_, **__: (hidden, None)
    batch = tiny_batch("classification")
    assert error_of(model, "classification", batch) < 1e-10
    keep = Keep()
    with PerSampleGradients(model, keep) as gradients:
        gradients.backward(loss_of(model, "classification", batch))
    assert set(gradients.weights) > set(keep.gradients)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use plain LoRA or rsLoRA"),
        ({"use_rslora": True, "use_dora": True}, "use plain LoRA or rsLoRA"),
    ],
)
def test_what_is_not_exact_is_refused(settings: dict[str, Any], message: str) -> None:
    model = with_lora(tiny_model("bert"), "classification", **settings)
    with pytest.raises(ModelError, match=message):
        PerSampleGradients(model)


def test_convolutions_are_refused() -> None:
    body = torch.nn.Sequential()
    body.add_module("conv", torch.nn.Conv1d(4, 4, 3))
    model = get_peft_model(body, LoraConfig(target_modules=["conv"]))
    with pytest.raises(ModelError, match=r"conv.*leave it out of target_modules"):
        PerSampleGradients(model)


def test_two_active_adapters_are_refused() -> None:
    model: PeftModel = with_lora(tiny_model("llama"), "causal-lm")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="activate one"):
        PerSampleGradients(model)
