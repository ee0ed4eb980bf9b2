"""Gradients by sample and own steps for each kind of layer that PEFT makes, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import tsqlora as tsq
from reference import looped_gradients, looped_lookahead, loss_of
from test_per_sample_grads import checkpointed
from tiny import KINDS, VOCABULARY, all_terms, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.errors import ModelError
from tsqlora.lookahead import one_step
from tsqlora.per_sample_grads import Dots, Keep, PerSampleGradients, Sketch, SquaredNorms
from tsqlora.scoring import Scorer
from tsqlora.targets import resolve_targets

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
    error = (got - true).norm() / true.norm().clamp(min=1e-30)
    return float(error.nan_to_num(nan=torch.inf))


def error_of(
    model: Any, kind: str, batch: dict[str, Tensor], checkpointing: str | None = None
) -> float:
    """The worst relative error of gradients, norms, dots, sketches and lookahead to a loop."""
    loops = looped_gradients(model, kind, batch)
    true = torch.stack([flat(loop) for loop in loops])
    steps = 0.5 / true.norm(dim=1).clamp(min=1e-12)
    after = looped_lookahead(model, kind, batch, steps)
    if checkpointing is not None:
        checkpointed(model, checkpointing == "reentrant")
    keep, norms, sketch = Keep(), SquaredNorms(), Sketch(64)
    dots = Dots(loops[0])
    with PerSampleGradients(model, keep, norms, dots, sketch) as gradients:
        gradients.backward(loss_of(model, kind, batch))
    whole = {name: keep.whole(name, weight) for name, weight in gradients.weights.items()}
    errors = [
        relative(flat({name: g[i] for name, g in whole.items()}), flat(loop))
        for i, loop in enumerate(loops)
    ]
    errors.append(relative(torch.as_tensor(norms.total).sqrt(), true.norm(dim=1)))
    errors.append(relative(torch.as_tensor(dots.total), true @ true[0]))
    alone = Sketch(64)
    for name, gradient in whole.items():
        alone.add(name, gradient)
    errors.append(relative(sketch.take(), alone.take()))
    with torch.no_grad(), one_step(gradients, keep, steps):
        errors.append(relative(loss_of(model, kind, batch), after))
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


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("bert", {"use_rslora": True}),
    "Conv1D, biases, and a module saved whole": (
        "gpt2",
        {"lora_bias": True, "modules_to_save": ["wpe"]},
    ),
    "ranks and scales of their own": (
        "llama",
        {"rank_pattern": {"q_proj": 5, "0.mlp.up_proj": 1}, "alpha_pattern": {"k_proj": 7}},
    ),
    "layers that run twice": ("llama", {"layer_replication": [[0, 2], [0, 2]]}),
    "one layer of two": ("bert", {"layers_to_transform": [1], "target_modules": ["query"]}),
    "trained tokens": ("llama", {"trainable_token_indices": [4, 5]}),
    "both ends, untied": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "both ends of one weight": ("gemma", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embeddings and shared layers": ("albert", {"target_modules": EMBEDDINGS["albert"]}),
    "embeddings of an encoder-decoder": ("bart", {"target_modules": EMBEDDINGS["bart"]}),
    "experts and embeddings": (
        "mixtral",
        {"target_modules": ["q_proj", "embed_tokens"], "target_parameters": EXPERTS},
    ),
    "a linear module's bare weight": (
        "llama",
        {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
    ),
}


@settings(max_examples=60)
@given(
    way=st.sampled_from(sorted(WAYS)),
    samples=st.integers(1, 5),
    longest=st.integers(4, 12),
    left=st.booleans(),
    masked=st.booleans(),
    checkpointing=st.sampled_from([None, "reentrant", "not reentrant"]),
    double=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_way_to_adapt(
    way: str,
    samples: int,
    longest: int,
    left: bool,
    masked: bool,
    checkpointing: str | None,
    double: bool,
    seed: int,
) -> None:
    name, more = WAYS[way]
    kind = KINDS[name]
    model = with_lora(tiny_model(name, seed, double), kind, **more)
    batch = tiny_batch(kind, samples, seed, longest, left=left and kind == "causal-lm")
    if masked and kind != "classification":
        batch["labels"][-1] = -100
    if name == "albert":  # it has no checkpointing
        checkpointing = None
    assert error_of(model, kind, batch, checkpointing) < (1e-10 if double else 1e-5)


def test_experts_that_are_linear_modules_are_exact_though_they_see_tokens_out_of_samples() -> None:
    config = tf.SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2,
        num_heads=2, num_experts=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.SwitchTransformersForConditionalGeneration(config).eval()
    model = with_lora(model, "seq2seq", target_modules=["wi", "wo", "q"])
    batch = tiny_batch("seq2seq", samples=6)
    true = torch.stack([flat(g).norm() for g in looped_gradients(model, "seq2seq", batch)])
    found = Scorer(collate, all_terms(), batch_size=3).score(
        model, Dataset.from_list(rows_of(batch))
    )
    assert relative(torch.from_numpy(found.gradient_norm), true.double()) < 1e-5


def test_an_adapter_that_transformers_added() -> None:
    model = tiny_model("llama", double=True)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert error_of(model.double(), "causal-lm", tiny_batch("causal-lm")) < 1e-10


def test_all_linear_leaves_out_what_an_adapter_would_not_reach() -> None:
    mamba = tiny_model("mamba")
    assert {
        name.rsplit(".", 1)[-1] for name in resolve_targets(mamba, "causal-lm", "all-linear")
    } == {
        "in_proj",
        "x_proj",
    }
    body = torch.nn.Module()
    body.weight_proj, body.fine = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert resolve_targets(body, "causal-lm", "all-linear") == ["fine"]


@pytest.mark.parametrize("start", ["gaussian", "pissa", "olora", "eva", "orthogonal"])
def test_however_the_factors_start(start: str) -> None:
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=start)
    model = get_peft_model(tiny_model("llama"), config).double().eval()
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


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Conv1d(4, 4, 3),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Conv3d(4, 4, 3),
        torch.nn.MultiheadAttention(4, 2),
    ],
)
def test_other_modules_are_refused(module: torch.nn.Module) -> None:
    body = torch.nn.Sequential()
    body.add_module("other", module)
    model = get_peft_model(body, LoraConfig(target_modules=["other"]))
    with pytest.raises(ModelError, match=r"other.*leave it out of target_modules"):
        PerSampleGradients(model)


OTHERS = [
    peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    peft.VeraConfig(target_modules=["q_proj"], r=2),
    peft.LoHaConfig(target_modules=["q_proj"], r=2),
    peft.OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4),
    peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    peft.LNTuningConfig(target_modules=["norm"]),
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: str(config.peft_type.value))
def test_adapters_of_other_kinds_are_refused_by_name_and_left_alone(config: Any) -> None:
    model = get_peft_model(tiny_model("llama"), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = Dataset.from_list(rows_of(tiny_batch("causal-lm")))
    for measure in (tsq.score_samples, tsq.layer_sensitivity):
        with pytest.raises(ModelError, match=rf"kind {config.peft_type.value}; only LoRA"):
            measure(model, rows, collate)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_lora_beside_another_kind_is_refused() -> None:
    model = with_lora(tiny_model("llama"), "causal-lm", mixed=True)
    model.add_adapter("other", peft.LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="kind LOHA; only LoRA"):
        PerSampleGradients(model)


def test_factors_that_are_views_of_others_are_refused() -> None:
    model = with_lora(
        tiny_model("gemma"),
        "causal-lm",
        target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    )
    with pytest.raises(ModelError, match=r"shares a factor with .*ensure_weight_tying=False"):
        PerSampleGradients(model)


def test_adapters_that_are_merged_or_disabled_are_refused() -> None:
    model = with_lora(tiny_model("llama"), "causal-lm")
    model.base_model.model.model.layers[0].self_attn.q_proj.merge()
    with pytest.raises(ModelError, match=r"layers.0.self_attn.q_proj.*call unmerge_adapter\(\)"):
        PerSampleGradients(model)
    model.unmerge_adapter()
    PerSampleGradients(model)
    model.disable_adapter_layers()
    with pytest.raises(ModelError, match=r"disabled; call enable_adapter_layers\(\)"):
        PerSampleGradients(model)


def test_two_active_adapters_are_refused() -> None:
    model: PeftModel = with_lora(tiny_model("llama"), "causal-lm")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="activate one"):
        PerSampleGradients(model)
