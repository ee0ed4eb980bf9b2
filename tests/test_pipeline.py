"""Whole runs on a tiny model: every artefact, resumable, loadable without tsqlora."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    TrainingArguments,
    get_scheduler,
)

from runs import class_rows, classification_run, write_rows
from tsqlora import QualityScores, RankPlan, checkpoints, train
from tsqlora.artefacts import read_lines
from tsqlora.checkpoints import InterruptCallback, whole_checkpoints
from tsqlora.cli import main
from tsqlora.config import AdapterConfig, RunConfig
from tsqlora.pipeline import Run
from tsqlora.training import training_arguments
from tsqlora.two_parts import first_steps, last_arguments


def test_a_run_leaves_every_artefact_in_its_format(tmp_path: Path) -> None:
    run = train(classification_run(tmp_path))
    scores = QualityScores.from_parquet(run / "scores.parquet")
    assert scores.ids.tolist() == list(range(120))
    assert scores.probability.sum() == pytest.approx(1)
    assert scores.selected.sum() == 60
    plan = RankPlan.load(run / "plan.json")
    assert 0 < plan.parameters <= plan.budget
    for line in (run / "ranks.jsonl").read_text().splitlines():
        move = json.loads(line)
        assert set(move) == {"step", "ranks", "pruned", "grown"}
    cost = json.loads((run / "metrics.json").read_text())["cost"]
    assert cost["scoring_passes"] == 4 * 8 + 1.5 * 120 + 1.5 * 60
    assert cost["training_passes"] == 2 * 60
    assert (run / "report.html").stat().st_size > 1000


def test_the_adapter_loads_without_tsqlora_and_gives_the_same_logits(tmp_path: Path) -> None:
    path = train(classification_run(tmp_path))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    plain = PeftModel.from_pretrained(base, str(path / "adapter")).eval()
    run = Run.open(path)
    batch = run.inputs.task.collate(list(run.inputs.splits.validation))
    batch.pop("labels")
    with torch.no_grad():
        expected = run.finished.model().eval()(**batch).logits
        assert (plain(**batch).logits - expected).abs().max() < 1e-5
        merged = plain.merge_and_unload()
        assert (merged(**batch).logits - expected).abs().max() < 1e-5
    names = {file.name for file in (path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert "tokenizer.json" in names


def test_stages_go_on_from_one_another_and_finished_ones_are_kept(tmp_path: Path) -> None:
    config = str(classification_run(tmp_path))
    assert main(["score", config]) == 0
    scores = (tmp_path / "run/scores.parquet").stat().st_mtime_ns
    assert main(["plan", config]) == 0
    assert main(["train", config]) == 0
    assert (tmp_path / "run/scores.parquet").stat().st_mtime_ns == scores
    out = ["--out", str(tmp_path / "padded")]
    assert main(["export", str(tmp_path / "run"), "--format", "padded", *out]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "train.jsonl")]) == 0


def test_no_rank_moves_beyond_the_highest_that_was_asked_for(tmp_path: Path) -> None:
    changes = {"ranks": {"mean_rank": 4, "max_rank": 4, "rule": "uniform"}}
    folder = train(classification_run(tmp_path, **changes))
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert max([config["r"], *config["rank_pattern"].values()]) == 4
    lines = (folder / "ranks.jsonl").read_text().splitlines()
    assert all(max(json.loads(line)["ranks"].values()) <= 4 for line in lines)


def test_other_test_rows_cost_an_evaluation_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = write_rows(tmp_path / "test.jsonl", class_rows(20, seed=3))
    config = classification_run(tmp_path, **{"data.test": str(test)})
    folder = train(config)
    before = json.loads((folder / "metrics.json").read_text())
    write_rows(test, class_rows(50, seed=4))

    def never(*_: Any) -> None:
        raise AssertionError("nothing else is to be done again")

    monkeypatch.setattr("tsqlora.pipeline.run_training", never)
    monkeypatch.setattr(Run, "_adapt", never)
    after = json.loads((train(config, resume=True) / "metrics.json").read_text())
    assert after["test"] != before["test"]
    assert after["validation"] == before["validation"]


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("evaluated", ["no", "epoch"])
def test_a_signal_saves_a_checkpoint_and_resume_goes_on_to_the_identical_adapter(
    evaluated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsaved = {"training.save_strategy": "no", "training.eval_strategy": evaluated}
    adapter = train(classification_run(tmp_path, **unsaved)) / "adapter/adapter_model.safetensors"
    run = tmp_path / "interrupted"
    config = str(classification_run(tmp_path, output=str(run), **unsaved))
    monkeypatch.setattr(checkpoints, "InterruptCallback", interrupted_at(2, signal.SIGINT))
    assert main(["train", config]) == 130
    assert whole_checkpoints(run / "checkpoints/adaptation") == ([ANY], {})
    monkeypatch.setattr(checkpoints, "InterruptCallback", interrupted_at(7, signal.SIGTERM))
    assert main(["train", config]) == 143
    assert whole_checkpoints(run / "checkpoints/train") == ([ANY], {})
    monkeypatch.undo()
    assert main(["train", config, "--resume"]) == 0
    resumed = run / "adapter/adapter_model.safetensors"
    assert resumed.read_bytes() == adapter.read_bytes()
    logs = [read_lines(folder / "train_log.jsonl") for folder in (tmp_path / "run", run)]
    once, again = ([line["step"] for line in log if "eval_loss" in line] for log in logs)
    assert once == again, "an epoch that was left in the middle is not evaluated there"


def interrupted_at(step: int, number: int) -> type[InterruptCallback]:
    """The callback, with the signal sent to this process while that step is taken."""

    class Interrupted(InterruptCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                signal.raise_signal(number)
            super().on_step_end(args, state, control, **kwargs)

    return Interrupted


def test_the_best_checkpoint_brings_its_ranks_and_the_record_says_so(tmp_path: Path) -> None:
    keys = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    keys |= {"load_best_model_at_end": True, "greater_is_better": True}  # the worst is the best
    run = train(classification_run(tmp_path, **{f"training.{k}": v for k, v in keys.items()}))
    moves = [json.loads(line)["ranks"] for line in (run / "ranks.jsonl").read_text().splitlines()]
    there = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in load_file(run / "adapter/adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert {name: rank for name, rank in moves[-1].items() if rank} == there
    assert moves[-2] != moves[-1]


def test_the_checkpoint_of_the_best_accuracy_is_kept_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    keys = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    keys |= {"learning_rate": 0.03}
    run = train(classification_run(tmp_path, **{f"training.{k}": v for k, v in keys.items()}))
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    curve = [line["eval_accuracy"] for line in log if "eval_accuracy" in line]
    kept = json.loads((run / "metrics.json").read_text())["validation"]["accuracy"]
    assert kept == max(curve) > min(curve)


def test_a_broken_state_of_the_adapted_model_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = classification_run(tmp_path)
    run = Run.start(config)
    run.warm_model  # noqa: B018
    state = run.folder.warmup / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    Run.start(config).warm_model  # noqa: B018
    assert state.read_bytes() == whole
    assert "warmup is made again: state.safetensors has" in caplog.text
    encoded = run.folder.encoded / "train.arrow"
    pool = encoded.read_bytes()
    encoded.write_bytes(pool[: len(pool) // 2])
    Run.start(config).inputs.splits  # noqa: B018
    assert encoded.read_bytes() == pool


def test_preset_paper_keeps_one_subset(tmp_path: Path) -> None:
    run = Run.start(classification_run(tmp_path, **{"quality.preset": "paper"}))
    scores = run.score()
    sampler = run._sampler(scores)
    first = sorted(sampler)
    sampler.set_epoch(1)
    assert sorted(sampler) == first == np.flatnonzero(scores.selected).tolist()


def test_scoring_pays_only_for_the_terms_that_have_a_weight(tmp_path: Path) -> None:
    names = ("gradient_norm", "loss_reduction", "convergence")
    for on, passes in (((), 0.5), (("gradient_norm",), 1.0), (("loss_reduction",), 1.5)):
        folder = tmp_path / ("-".join(on) or "none")
        folder.mkdir()
        weights = {f"quality.weights.{name}": float(name in on) for name in names}
        run = Run.start(classification_run(folder, **weights))
        scores = run.score()
        stages = json.loads(run.folder.metrics.read_text())["cost"]["stages"]
        assert stages["scores"]["passes"] == passes * 120
        assert np.isfinite(scores.loss).all()
        assert np.isfinite(scores.loss_reduction).all() == ("loss_reduction" in on)
        assert np.isnan(scores.convergence).all()


def test_by_default_the_pool_is_learnt_for_as_long_as_the_drawn_samples(tmp_path: Path) -> None:
    run = Run.start(classification_run(tmp_path, **{"quality.adapt_steps": None}))
    run.score()
    stages = json.loads(run.folder.metrics.read_text())["cost"]["stages"]
    assert stages["adaptation"]["passes"] == 2 * 60


@pytest.mark.parametrize("mode", ["online", "none"])
def test_a_new_head_learns_for_a_tenth_of_the_steps_before_layers_are_measured(
    mode: str, tmp_path: Path
) -> None:
    given = {"quality.mode": mode, "quality.adapt_steps": None, "training.max_steps": 30}
    config = RunConfig.from_yaml(classification_run(tmp_path, **given))
    assert first_steps(config, 120).steps == 3
    generates = dataclasses.replace(config, task="seq2seq")
    assert first_steps(generates, 120).steps == 0
    goes_on = dataclasses.replace(config, adapter=AdapterConfig(init="a"))
    assert first_steps(goes_on, 120).steps == 0


def test_the_rate_of_the_first_steps_rises_as_in_one_training_of_all_steps(tmp_path: Path) -> None:
    given = {"quality.adapt_steps": 10, "training.max_steps": 90, "training.warmup_steps": 0.06}
    config = RunConfig.from_yaml(classification_run(tmp_path, **given))
    first = first_steps(config, 120).arguments(tmp_path / "first", saving=False)
    whole = training_arguments({**config.training, "max_steps": 100}, tmp_path / "whole", 0)
    expected = rates(whole)[:7]
    assert rates(first)[:7] == pytest.approx(expected)
    assert expected == sorted(expected)
    assert rates(first)[7] < rates(first)[6]
    longer = dataclasses.replace(config, training={**config.training, "warmup_steps": 50})
    held = first_steps(longer, 120).arguments(tmp_path / "first", saving=False)
    assert rates(held)[9] == config.training["learning_rate"]


def test_the_rate_of_the_second_part_rises_to_where_the_first_part_ended(tmp_path: Path) -> None:
    given = {"quality.adapt_steps": 30, "training.max_steps": 90, "training.warmup_steps": 0.06}
    config = RunConfig.from_yaml(classification_run(tmp_path, **given))
    adaptation = first_steps(config, 120)
    first = rates(adaptation.arguments(tmp_path / "first", saving=False))
    second = rates(last_arguments(config, adaptation, tmp_path / "second"))
    fall = first[-2] - first[-1]
    assert 0 < fall < first[-1]
    assert max(second) == pytest.approx(first[-1] - fall)
    assert max(second) == pytest.approx(0.75 * config.training["learning_rate"])


def rates(arguments: TrainingArguments) -> list[float]:
    """The learning rate of every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], arguments.learning_rate)
    steps, kwargs = arguments.max_steps, arguments.lr_scheduler_kwargs or {}
    warmup = arguments.get_warmup_steps(steps)
    kind = arguments.lr_scheduler_type
    scheduler = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found
