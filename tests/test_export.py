"""Exports loaded without tsqlora: by PEFT, and by the arithmetic of every serving engine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from serving import ENGINES, Refused, served
from tiny import BART, tiny_batch, tiny_model, with_lora
from tsqlora.adapter import add_headroom, grow, prune
from tsqlora.errors import ModelError
from tsqlora.export import export_adapter
from tsqlora.lora_layers import lora_modules

CLOSE = 1e-5
"""Logits of order 1 agree to this: float32 rounding, where a weight takes up an update."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def logits(model: Any, kind: str = "causal-lm") -> torch.Tensor:
    batch = tiny_batch(kind)
    if kind != "seq2seq":
        batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


def by_peft(folder: Path, base: Any) -> Any:
    return PeftModel.from_pretrained(base, str(folder))


def uneven(name: str = "llama", **more: Any) -> Any:
    """Ranks 0 to 4, different in the two layers, B random, as after training with moving ranks."""
    model = with_lora(tiny_model(name), "causal-lm", 4, **more)
    for i, module in enumerate(lora_modules(model)):
        prune(module, range(i % (module.rank + 1)), None)
    return model


def brought_in(name: str = "llama") -> Any:
    """An rsLoRA adapter with patterns, so scales differ by module."""
    patterns = {"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {"v_proj": 5}}
    return with_lora(tiny_model(name), "causal-lm", 4, use_rslora=True, **patterns)


MODELS = {
    "moved": uneven,
    "moved gpt2": lambda: uneven("gpt2"),
    "moved mixtral": lambda: uneven("mixtral"),
    "brought in": brought_in,
    "embedding": lambda: with_lora(
        tiny_model("llama"),
        "causal-lm",
        4,
        target_modules=[*ATTENTION, "embed_tokens"],
        rank_pattern={"embed_tokens": 3, "k_proj": 2},
    ),
}


def base_of(case: str) -> Any:
    return tiny_model(case.removeprefix("moved").strip() or "llama" if "moved" in case else "llama")


@pytest.mark.parametrize("case", MODELS)
def test_padded_is_right_in_every_engine_and_compact_where_it_is_said_to_be(
    case: str, tmp_path: Path
) -> None:
    model = MODELS[case]()
    expected = logits(model)
    assert (logits(base_of(case)) - expected).abs().max() > 100 * CLOSE, "nothing to compare"
    for form in ("compact", "padded"):
        folder = export_adapter(model, tmp_path / form, form)
        assert (logits(by_peft(folder, base_of(case))) - expected).abs().max() < CLOSE
        right = ENGINES if form == "padded" else ("vllm", "vllm-per-module")
        for engine in right:
            error = (logits(served(engine, folder, base_of(case))) - expected).abs().max()
            assert error < CLOSE, f"{engine} is wrong by {error}"
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("case", ["moved", "brought in", "embedding"])
def test_compact_is_wrong_in_llama_cpp_and_refused_by_sglang(case: str, tmp_path: Path) -> None:
    model = MODELS[case]()
    folder = export_adapter(model, tmp_path / "compact")
    llama_cpp = logits(served("llama.cpp", folder, base_of(case)))
    assert (llama_cpp - logits(model)).abs().max() > 100 * CLOSE
    with pytest.raises(Refused, match="pattern"):
        served("sglang", folder, base_of(case))


def test_a_module_that_is_adapted_in_one_layer_only_is_lost_in_tgi_unless_padded(
    tmp_path: Path,
) -> None:
    model = with_lora(tiny_model("llama"), "causal-lm", target_modules=["layers.1.mlp.up_proj"])
    expected = logits(model)
    compact = export_adapter(model, tmp_path / "compact")
    assert torch.equal(
        logits(served("tgi", compact, tiny_model("llama"))), logits(tiny_model("llama"))
    )
    padded = export_adapter(model, tmp_path / "padded", "padded")
    assert (logits(served("tgi", padded, tiny_model("llama"))) - expected).abs().max() < CLOSE


@settings(max_examples=8)
@given(
    ranks=st.lists(st.integers(0, 4), min_size=14, max_size=14),
    alphas=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    rslora=st.booleans(),
)
def test_whatever_the_ranks_and_scales_all_rules_agree(
    ranks: list[int], alphas: list[int], rslora: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    patterns = dict(zip(["q_proj", "up_proj", r"layers\.0\..*"], alphas, strict=True))
    model = with_lora(
        tiny_model("llama"), "causal-lm", 4, use_rslora=rslora, alpha_pattern=patterns
    )
    for module, rank in zip(lora_modules(model), ranks, strict=True):
        prune(module, range(module.rank - rank), None)
    expected, folder = logits(model), tmp_path_factory.mktemp("exports")
    for form in ("compact", "padded"):
        export_adapter(model, folder / form, form)
        assert (logits(by_peft(folder / form, tiny_model("llama"))) - expected).abs().max() < CLOSE
    for engine in ENGINES:
        padded = served(engine, folder / "padded", tiny_model("llama"))
        assert (logits(padded) - expected).abs().max() < CLOSE
    for engine in ("vllm", "vllm-per-module"):
        compact = served(engine, folder / "compact", tiny_model("llama"))
        assert (logits(compact) - expected).abs().max() < CLOSE


def test_what_is_saved_whole_is_right_in_peft_and_merged_and_refused_elsewhere(
    tmp_path: Path,
) -> None:
    model = with_lora(tiny_model("llama"), "causal-lm", modules_to_save=["embed_tokens"])
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    expected = logits(model)
    for form in ("compact", "padded"):
        folder = export_adapter(model, tmp_path / form, form)
        assert (logits(by_peft(folder, tiny_model("llama"))) - expected).abs().max() < CLOSE
        for engine in ("vllm", "llama.cpp"):
            with pytest.raises(Refused):
                served(engine, folder, tiny_model("llama"))
    merged = export_adapter(model, tmp_path / "merged", "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(plain) - expected).abs().max() < CLOSE


@pytest.mark.parametrize("form", ["compact", "padded"])
def test_a_bias_of_b_is_kept_where_scales_and_ranks_differ(form: str, tmp_path: Path) -> None:
    model = with_lora(
        tiny_model("llama"), "causal-lm", 2, lora_bias=True, alpha_pattern={"q_proj": 3}
    )
    first, second = lora_modules(model)[:2]
    prune(first, [0], None)
    prune(second, [0, 1], None)
    expected = logits(model)
    folder = export_adapter(model, tmp_path / form, form)
    assert (logits(by_peft(folder, tiny_model("llama"))) - expected).abs().max() < CLOSE
    with pytest.raises(ModelError, match="cannot be merged"):
        export_adapter(model, tmp_path / "merged", "merged")


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("form", ["compact", "padded", "merged"])
def test_an_export_is_the_same_to_the_byte_each_time(form: str, tmp_path: Path) -> None:
    model = uneven()
    first = digests(export_adapter(model, tmp_path / "first", form))
    export_adapter(model, tmp_path / "other", "merged")
    assert digests(export_adapter(model, tmp_path / "again", form)) == first


@pytest.mark.parametrize("trained", [{"target_modules": ["embed_tokens", "q_proj"]}, {}])
def test_merged_unties_an_embedding_that_is_adapted_alone(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    def tied() -> Any:
        base = tiny_model("llama")
        base.config.tie_word_embeddings = True
        base.tie_weights()
        return base

    model = with_lora(tied(), "causal-lm", **(trained or {"modules_to_save": ["embed_tokens"]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    expected = logits(model)
    assert (logits(tied()) - expected).abs().max() > 100 * CLOSE
    merged = export_adapter(model, tmp_path / "merged", "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(plain) - expected).abs().max() < CLOSE
    assert torch.equal(logits(model), expected)


def test_what_cannot_be_merged_or_told_from_its_base_is_refused(tmp_path: Path) -> None:
    bart = BartForConditionalGeneration(BartConfig(**BART))
    model = get_peft_model(bart, LoraConfig(target_modules=["shared"]))
    with pytest.raises(ModelError, match=r"tied embeddings.*compact or padded"):
        export_adapter(model, tmp_path / "bart", "merged")
    pissa = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=ATTENTION, init_lora_weights="pissa")
    )
    expected = logits(pissa)
    with pytest.raises(ModelError, match=r"pissa.*merged"):
        export_adapter(pissa, tmp_path / "pissa")
    merged = export_adapter(pissa, tmp_path / "merged", "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(plain) - expected).abs().max() < CLOSE
    injected = tiny_model("llama")
    injected.add_adapter(LoraConfig(target_modules=ATTENTION))
    with pytest.raises(ModelError, match="get_peft_model"):
        export_adapter(injected, tmp_path / "injected")


def test_of_several_adapters_the_active_one_moves_and_is_exported(tmp_path: Path) -> None:
    model = with_lora(tiny_model("llama"), "causal-lm", 2)
    model.add_adapter(
        "second",
        LoraConfig(
            r=3,
            lora_alpha=7,
            use_rslora=True,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
        ),
    )
    other = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
    model.set_adapter("second")
    scales = {m.name: m.scale for m in lora_modules(model)}
    add_headroom(model, 2)
    for module in lora_modules(model):
        prune(module, [0], None)
        grow(module, [3, 4], None, torch.rand(2, module.shape[1]))
    assert {m.name: m.scale for m in lora_modules(model)} == scales
    assert all(torch.equal(p, other[n]) for n, p in model.named_parameters() if n in other)
    expected = logits(model)
    for form in ("compact", "padded"):
        folder = export_adapter(model, tmp_path / form, form)
        assert (logits(by_peft(folder, tiny_model("llama"))) - expected).abs().max() < CLOSE
