"""An adapter that is there already: planned and moved in Python, gone on from by `adapter.init`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import tsqlora as tsq
from runs import WORDS, classification_run, save_model, write_rows
from tiny import collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.cli import main
from tsqlora.dynamic_rank import RankSchedule
from tsqlora.initial import InitialAdapter
from tsqlora.lora_layers import lora_modules
from tsqlora.pasting import paste
from tsqlora.pipeline import Run

CLOSE = 1e-5
PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3},
    "alpha_pattern": {"v_proj": 5},
}


def brought_in(kind: str) -> Any:
    if kind == "several":
        model = with_lora(tiny_model("llama"), "causal-lm", 2)
        targets = ["q_proj", "down_proj"]
        model.add_adapter("mine", LoraConfig(r=3, lora_alpha=7, target_modules=targets))
        model.set_adapter("mine")
        return model
    return with_lora(tiny_model("llama"), "causal-lm", 4, **(PATTERNS if kind == "rslora" else {}))


def logits(model: Any) -> torch.Tensor:
    batch = tiny_batch("causal-lm")
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


def scales(model: Any) -> dict[str, float]:
    return {m.name: m.scale for m in lora_modules(model)}


@pytest.mark.parametrize("kind", ["plain", "rslora", "several"])
def test_plan_and_dynamics_keep_every_modules_scale_and_the_budget(
    kind: str, tmp_path: Path
) -> None:
    model = brought_in(kind)
    before, function = scales(model), logits(model)
    pool = Dataset.from_list(rows_of(tiny_batch("causal-lm", samples=8)))
    sensitivity = tsq.layer_sensitivity(model, pool, collate)
    assert set(sensitivity.modules) == set(before)
    assert torch.equal(logits(model), function)
    plan = tsq.allocate_ranks(sensitivity, mean_rank=2, max_rank=4)
    moving = tsq.DynamicRankCallback(
        schedule=RankSchedule(start=0.3, moves=2, move_share=0.5), headroom=2
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=0.05,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=pool, data_collator=collate, callbacks=[moving]).train()
    assert moving.ranks is not None
    assert moving.ranks.history, "no rank moved"
    assert scales(model) == before
    costs = {m.name: sum(m.shape) for m in lora_modules(model)}
    for move in moving.ranks.history:
        assert sum(rank * costs[n] for n, rank in move.ranks.items()) <= moving.ranks.budget
    assert plan.parameters <= plan.budget
    expected = logits(model)
    for form in ("compact", "padded"):
        tsq.export_adapter(model, tmp_path / form, form)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / form))
        assert (logits(loaded) - expected).abs().max() < CLOSE


def test_a_plan_moves_an_adapter_in_a_loop_of_ones_own() -> None:
    model = brought_in("rslora").train()
    before = scales(model)
    pool = Dataset.from_list(rows_of(tiny_batch("causal-lm", samples=8)))
    sensitivity = tsq.layer_sensitivity(model, pool, collate)
    held = sum(m.rank * sum(m.shape) for m in lora_modules(model))
    plan = tsq.allocate_ranks(sensitivity, parameters=held // 2, min_rank=1, max_rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ranks = tsq.DynamicRank(
        model, optimizer, 12, plan, RankSchedule(start=0.2, end=0.9, moves=4, move_share=1.0)
    )
    for _ in range(12):
        model(**collate(list(pool))).loss.backward()
        ranks.step()
        optimizer.step()
        optimizer.zero_grad()
    assert ranks.history
    assert scales(model) == before


def words_run(folder: Path, init: Path | None, **changes: Any) -> Path:
    rows = [{"text": " ".join(WORDS[(i + j) % 30] for j in range(6))} for i in range(64)]
    path = write_rows(folder / "words.jsonl", rows)
    model = folder / "llama"
    settings = {
        "model": str(model if model.exists() else save_model(model, "llama")),
        "task": "causal-lm",
        "data": {"train": str(path), "text": "text"},
        "quality.adapt_steps": 2,
        "training.max_steps": 3,
        **({"adapter.init": str(init)} if init else {}),
    }
    return classification_run(folder, **{**settings, **changes})


def saved(folder: Path, **settings: Any) -> Path:
    """An adapter of the tiny Llama that PEFT alone wrote."""
    model = AutoModelForCausalLM.from_pretrained(save_model(folder / "llama", "llama"))
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    made = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    made.save_pretrained(str(folder / "theirs"))
    return folder / "theirs"


def test_the_first_model_of_a_run_is_the_adapter_itself_on_the_runs_scale(tmp_path: Path) -> None:
    init = saved(tmp_path, **PATTERNS, lora_dropout=0.5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    expected = logits(PeftModel.from_pretrained(base, str(init)))
    run = Run.start(words_run(tmp_path, init, **{"quality.adapt_steps": 0}))
    model = run.warm_model
    assert set(scales(model).values()) == {5.0}, "16 over the mean rank of 3, whole"
    assert (logits(model) - expected).abs().max() < CLOSE
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == {True}


def test_a_run_plans_over_the_adapters_modules_and_begins_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    init = saved(tmp_path, **PATTERNS, modules_to_save=["lm_head"])
    more = {"ranks.mean_rank": 4, "ranks.min_rank": 4, "ranks.max_rank": 4}
    config = words_run(tmp_path, init, **more, **{"quality.adapt_steps": 0})
    run = Run.start(config)
    plan = run.plan()
    assert set(plan.ranks) == set(InitialAdapter.read(str(init)).shapes)
    with caplog.at_level("INFO", "tsqlora"):
        model = run._planned_model(plan)
    assert "keeps 100.0 %" in caplog.text
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    expected = logits(PeftModel.from_pretrained(base, str(init)))
    assert (logits(model) - expected).abs().max() < 1e-4  # through singular values
    assert main(["train", str(config)]) == 0
    said = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert said["modules_to_save"] == ["lm_head"]


def test_another_adapter_in_the_same_folder_is_another_run(tmp_path: Path) -> None:
    init = saved(tmp_path)
    before = Run.start(words_run(tmp_path, init)).inputs.digest("adaptation")
    saved(tmp_path, lora_alpha=3)
    assert Run.start(words_run(tmp_path, init)).inputs.digest("adaptation") != before


def other_base(folder: Path) -> Path:
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"]))
    model.save_pretrained(str(folder / "theirs"))
    return folder / "theirs"


def wider_base(folder: Path) -> Path:
    init = saved(folder)
    path = init / "adapter_model.safetensors"
    state = {n: torch.cat([t, t], -1) if "lora_A" in n else t for n, t in load_file(path).items()}
    save_file(state, path)
    return init


def without(folder: Path, name: str) -> Path:
    init = saved(folder)
    (init / name).unlink()
    return init


def said(folder: Path, **changes: Any) -> Path:
    init = saved(folder)
    path = init / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return init


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no folder": (lambda folder: folder / "nowhere", {}, "holds no adapter_config.json"),
    "no weights": (lambda f: without(f, "adapter_model.safetensors"), {}, "holds no adapter_model"),
    "another model": (other_base, {}, "has no module transformer.h.0.attn.c_attn: wrong base"),
    "other shapes": (wider_base, {}, "wrong base"),
    "DoRA": (lambda folder: saved(folder, use_dora=True), {}, "DoRA"),
    "an embedding": (lambda f: saved(f, target_modules=["embed_tokens"]), {}, "embedding"),
    "PiSSA": (lambda f: said(f, init_lora_weights="pissa"), {}, "changed its base"),
    "LoRA-GA": (lambda f: said(f, init_lora_weights="lora_ga"), {}, "changed its base"),
    "trained tokens": (lambda f: said(f, trainable_token_indices=[1, 2]), {}, "trained tokens"),
    "another task": (lambda f: said(f, task_type="SEQ_CLS"), {}, "was trained as SEQ_CLS"),
    "no head": (
        lambda f: said(f, task_type="CAUSAL_LM"),
        {"task": "classification", "metrics": None, "data.target": "text"},
        "not for classification",
    ),
    "no task": (
        lambda f: said(f, task_type=None),
        {"task": "classification", "metrics": None, "data.target": "text"},
        "holds no head for classification",
    ),
    "IA3": (lambda f: said(f, peft_type="IA3"), {}, "is IA3"),
    "broken": (lambda f: said(f, peft_type=None), {}, "is None"),
    "targets": (
        lambda folder: saved(folder, target_modules=["q_proj"]),
        {"adapter.target_modules": ["q_proj", "up_proj"]},
        "differ in 2 modules",
    ),
    "modules": (saved, {"adapter.modules_to_save": ["lm_head"]}, "lacks lm_head"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_that_does_not_fit_is_refused_before_a_row_is_read(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, changes, message = WRONG[case]
    init = make(tmp_path)
    config = words_run(tmp_path, init, **{"data.train": str(tmp_path / "no.jsonl"), **changes})
    assert main(["plan", str(config)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "no.jsonl" not in said
    assert said.count("wrong base?") <= 3
    assert not list((tmp_path / "run").glob("*")), "nothing of a run but its claimed folder"


def ranks_and_scales(model: Any) -> dict[str, tuple[int, float]]:
    """By PEFT's own attributes."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in found.items()
    }


@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_what_plan_prints_is_the_plan_in_plain_peft(scale: float, tmp_path: Path) -> None:
    config = words_run(tmp_path, None, **{"adapter.scale": scale, "ranks.mean_rank": 2})
    plan = Run.start(config).plan()
    wanted = {name: (rank, pytest.approx(scale)) for name, rank in plan.adapted.items()}
    assert len({rank for rank, _ in wanted.values()}) > 1

    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "llama")

    text = paste(plan, "peft", tmp_path)
    made = eval(text, {"LoraConfig": LoraConfig})
    assert ranks_and_scales(get_peft_model(plain(), made)) == wanted
    said = yaml.safe_load(paste(plan, "axolotl", tmp_path))
    made = LoraConfig(  # as axolotl/loaders/adapter.py makes it
        r=said["lora_r"],
        lora_alpha=said["lora_alpha"],
        target_modules=said["lora_target_modules"],
        rank_pattern=said.get("lora_rank_pattern") or {},
        alpha_pattern=said.get("lora_alpha_pattern") or {},
    )
    assert ranks_and_scales(get_peft_model(plain(), made)) == wanted
    assert ("whole alphas" in paste(plan, "axolotl", tmp_path)) == (scale == 0.3)


def test_what_plan_prints_trains_the_head_and_what_is_trained_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"adapter.modules_to_save": ["pooler"], "adapter.dropout": 0.1}
    config = classification_run(tmp_path, **changes)
    assert main(["plan", str(config), "--format", "peft"]) == 0
    text = capsys.readouterr().out
    made = eval(text[text.index("LoraConfig(") :], {"LoraConfig": LoraConfig})
    assert made.lora_dropout == 0.1
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    model = get_peft_model(base, made)
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    whole = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert any("classifier" in name for name in whole), trained
    assert any("pooler" in name for name in whole)
    assert main(["plan", str(config), "--format", "axolotl", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "lora_modules_to_save:" in said
    assert "lora_dropout: 0.1" in said


@pytest.mark.parametrize("trainer", ["axolotl", "llamafactory"])
def test_trainers_without_patterns_get_the_plan_as_an_untrained_adapter(
    trainer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = words_run(tmp_path, None, **{"ranks.mean_rank": 2})
    assert main(["plan", str(config), "--format", trainer]) == 0
    out = capsys.readouterr().out
    folder = str(tmp_path / "run/untrained")
    assert folder in out
    said = yaml.safe_load(out)
    if trainer == "llamafactory":
        assert said["adapter_name_or_path"] == folder
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    function = logits(base)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)  # as both trainers do
    plan = tsq.RankPlan.load(tmp_path / "run/plan.json")
    assert ranks_and_scales(model) == {name: (rank, 8.0) for name, rank in plan.adapted.items()}
    assert torch.equal(logits(model), function)
    assert all(m.a.weight.any() for m in lora_modules(model))
    assert main(["plan", str(config), "--json"]) == 0, "the folder is no other run's"
