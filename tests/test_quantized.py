"""Bases in 4 bits: loaded by a key, measured exactly, trained with moving ranks, exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from reference import looped_sensitivity
from runs import WORDS, classification_run, save_model, write_rows
from serving import served
from tiny import collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora import layer_sensitivity
from tsqlora.cli import main
from tsqlora.errors import ConfigError, ModelError
from tsqlora.export import export_adapter
from tsqlora.loading import load_config, load_model
from tsqlora.lora_layers import base_weight, is_quantized
from tsqlora.pipeline import Run
from tsqlora.quantized import Quantization, keep_exact
from tsqlora.targets import linear_names

pytest.importorskip("bitsandbytes")
CLOSE = 1e-5
"""float32 rounding, as in test_export.py."""
HERE = Quantization("cuda:0" if torch.cuda.is_available() else "cpu", torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def packed(folder: Path, classes: int = 0) -> Any:
    """The tiny model in 4 bits by transformers and bitsandbytes alone."""
    kind: Any = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    more = {"num_labels": classes} if classes else {}
    whole = ["classifier", "pooler"] if classes else ["lm_head"]
    model = kind.from_pretrained(folder, dtype=torch.float32, **HERE.settings(whole), **more)
    keep_exact(model)
    return model.eval()


def unpacked(model: Any) -> Any:
    """The plain model of the very weights that the 4 bits stand for."""
    plain = AutoModelForCausalLM.from_config(model.config)
    for name in linear_names(plain):
        plain.get_submodule(name).weight.data = base_weight(model.get_submodule(name)).cpu().clone()
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in linear_names(plain):
            parameter.data = own[name].data.cpu().clone()
    return plain.eval()


def logits(model: Any, kind: str = "causal-lm") -> torch.Tensor:
    device = next(model.parameters()).device
    batch = {name: each.to(device) for name, each in tiny_batch(kind).items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits.cpu()


def words(folder: Path, **changes: Any) -> Path:
    """A causal language model's run with ranks that move after a few steps."""
    rows = [{"text": " ".join(WORDS[(i + j) % 30] for j in range(6))} for i in range(64)]
    path = write_rows(folder / "words.jsonl", rows)
    settings = {
        "model": str(save_model(folder / "llama", "llama")),
        "task": "causal-lm",
        "quantization": "4bit",
        "data": {"train": str(path), "text": "text"},
        "quality.adapt_steps": 2,
        "quality.fraction": 0.5,
        "ranks.min_rank": 1,
        "training.max_steps": 10,
        "training.learning_rate": 0.05,
    }
    return classification_run(folder, **{**settings, **changes})


@pytest.mark.parametrize("estimator", ["weight_gradient", "fisher"])
def test_sensitivity_is_that_of_the_dequantised_weights(folder: Path, estimator: str) -> None:
    model = packed(folder)
    rows = Dataset.from_list(rows_of(tiny_batch("causal-lm", samples=5)))
    got = layer_sensitivity(model, rows, collate, estimator, batch_size=3)
    reference = with_lora(unpacked(model), "causal-lm", random=False)
    expected = looped_sensitivity(reference, "causal-lm", collate(list(rows)), estimator)
    assert got.modules == pytest.approx(expected, rel=1e-4)
    assert got.shapes == {
        n: tuple(reference.get_submodule(f"base_model.model.{n}.base_layer").weight.shape)
        for n in got.modules
    }
    assert is_quantized(model.model.layers[0].mlp.up_proj), "measured in place"


def test_at_most_one_module_is_dequantised_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    import tsqlora.estimators as estimators

    alive: list[weakref.ref[torch.Tensor]] = []

    def counted(module: torch.nn.Module) -> torch.Tensor:
        assert not [ref for ref in alive if ref() is not None], "another weight is still there"
        weight = base_weight(module)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(estimators, "base_weight", counted)
    rows = Dataset.from_list(rows_of(tiny_batch("causal-lm")))
    assert layer_sensitivity(packed(folder), rows, collate).modules
    assert len(alive) > 10


def test_planned_trained_with_moving_ranks_exported_and_loaded_on_4_bits(tmp_path: Path) -> None:
    assert main(["train", str(words(tmp_path))]) == 0
    run = Run.open(tmp_path / "run")
    assert (tmp_path / "run/ranks.jsonl").read_text().strip(), "no rank moved"
    model = run.finished.model()
    assert is_quantized(model.base_model.model.model.layers[0].mlp.up_proj.base_layer)
    expected = logits(model)
    assert (logits(packed(tmp_path / "llama")) - expected).abs().max() > 100 * CLOSE
    for form in ("compact", "padded", "merged"):
        out = ["--format", form, "--out", str(tmp_path / form)]
        assert main(["export", str(tmp_path / "run"), *out]) == 0
    for form in ("compact", "padded"):
        loaded = PeftModel.from_pretrained(packed(tmp_path / "llama"), str(tmp_path / form))
        assert (logits(loaded) - expected).abs().max() < CLOSE
        for engine in ("vllm", "vllm-per-module"):
            plain = served(engine, tmp_path / form, unpacked(packed(tmp_path / "llama")))
            assert (logits(plain) - expected).abs().max() < CLOSE
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(is_quantized(module) for module in merged.modules())
    assert (logits(merged) - expected).abs().max() < CLOSE
    base = unpacked(packed(tmp_path / "llama"))
    assert (logits(served("llama.cpp", tmp_path / "padded", base)) - expected).abs().max() < CLOSE


def test_a_classifier_keeps_its_head_and_pooler_whole(tmp_path: Path) -> None:
    config = classification_run(tmp_path, quantization="4bit", **{"training.max_steps": 3})
    assert main(["train", str(config)]) == 0
    model = Run.open(tmp_path / "run").finished.model()
    kinds = {n: is_quantized(m) for n, m in model.named_modules() if n.endswith(".base_layer")}
    assert all(packed for name, packed in kinds.items() if ".pooler." not in name)
    assert not any(is_quantized(m) for n, m in model.named_modules() if "classifier" in n)
    expected = logits(model, "classification")
    loaded = PeftModel.from_pretrained(
        packed(tmp_path / "model", classes=3), str(tmp_path / "run/adapter")
    )
    assert (logits(loaded, "classification") - expected).abs().max() < CLOSE


def test_merging_by_hand_leaves_the_packed_model_as_it_is(folder: Path, tmp_path: Path) -> None:
    model = with_lora(packed(folder), "causal-lm", target_modules=["q_proj", "embed_tokens"])
    expected = logits(model)
    merged = export_adapter(model, tmp_path / "merged", "merged")
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - expected).abs().max() < CLOSE
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("missing", [True, False])
def test_what_cannot_be_had_is_refused_before_a_row_is_read(
    missing: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    else:
        monkeypatch.setattr(Quantization, "of", lambda config: Quantization("mps", torch.float32))
    config = words(tmp_path, **{"data.train": str(tmp_path / "nowhere.jsonl")})
    assert main(["plan", str(config)]) == 2
    said = capsys.readouterr().err
    assert ("pip install 'tsqlora[quantized]'" if missing else "4 bits on mps") in said
    assert "nowhere" not in said
    assert not list((tmp_path / "run").glob("*")), "nothing of a run but its claimed folder"


def test_a_merged_gpt2_has_its_transposed_layers_again(tmp_path: Path) -> None:
    model = with_lora(packed(save_model(tmp_path / "gpt2", "gpt2")), "causal-lm")
    merged = export_adapter(model, tmp_path / "merged", "merged")
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(loaded) - logits(model)).abs().max() < CLOSE


@pytest.mark.parametrize(("name", "said"), [("mixtral", True), ("llama", False)])
def test_experts_that_stay_whole_are_said(
    name: str, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(save_model(tmp_path / name, name))
    model = load_model(folder, AutoModelForCausalLM, load_config(folder), HERE)
    whole = [p for n, p in model.named_parameters() if ".experts." in n]
    assert all(p.dtype == torch.float32 for p in whole)
    share = 100 * sum(p.numel() for p in whole) / tiny_model(name).num_parameters()
    assert ("stacked experts" in caplog.text) == said
    assert not said or f"{share:.0f} % of the weights" in caplog.text


def test_weights_that_are_packed_for_inference_are_never_read_as_weights(folder: Path) -> None:
    model = packed(folder)
    module = model.model.layers[0].mlp.up_proj
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="load the model again"):
        base_weight(module)
    module.weight.quant_state.packing_format_for_cpu = False
    for each in model.modules():
        if hasattr(each, "support_avx512bf16_for_cpu"):
            each.support_avx512bf16_for_cpu = True  # as where the CPU has it
    rows = Dataset.from_list(rows_of(tiny_batch("causal-lm")))
    before = base_weight(module).clone()
    layer_sensitivity(model, rows, collate)
    assert torch.equal(base_weight(module), before)


def test_a_base_in_8_bits_is_measured_and_still_works_after(folder: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    packed = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=packed, device_map={"": HERE.device}
    )
    before = logits(model)
    for name in linear_names(plain)[:-1]:
        weight, own = base_weight(model.get_submodule(name)).cpu(), plain.get_submodule(name).weight
        most = own.abs().amax(1, keepdim=True)  # of 127 steps, and float16 before
        assert ((weight - own).abs() <= most * (0.5 / 127 + 2**-10)).all()
    rows = Dataset.from_list(rows_of(tiny_batch("causal-lm")))
    found = layer_sensitivity(model, rows, collate).modules
    expected = layer_sensitivity(plain, rows, collate).modules
    assert found == pytest.approx(expected, rel=0.1)
    assert torch.equal(logits(model), before)
    adapted = with_lora(model, "causal-lm")
    merged = export_adapter(adapted, tmp_path / "merged", "merged")
    error = logits(AutoModelForCausalLM.from_pretrained(merged)) - logits(adapted)
    assert error.abs().max() < 0.02, "what 8 bits round of the activations"


def test_only_4_bits_are_offered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization.*4bit"):
        Run.start(words(tmp_path, quantization="8bit"))
