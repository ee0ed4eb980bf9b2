"""Scores from the training itself: what is recorded, what is drawn by it, and what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file
from transformers import TrainerCallback

from reference import looped_gradients, loss_of, one_by_one
from runs import causal_run, class_rows, classification_run, seq2seq_run, write_rows
from test_per_sample_grads import checkpointed
from tiny import KINDS, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora import QualityScores
from tsqlora.cli import main
from tsqlora.config import QualityConfig, QualityWeights, RunConfig
from tsqlora.errors import ModelError
from tsqlora.losses import CLASSIFICATION
from tsqlora.online import OnlineScorer
from tsqlora.online_training import STATE_FILE, OnlineTrainer
from tsqlora.pipeline import Run, train
from tsqlora.preflight import check_recordable
from tsqlora.scoring import Scorer
from tsqlora.selection import QualitySampler, draw, unscored
from tsqlora.training import PoolTrainer, training_arguments
from tsqlora.visits import Visits

TERMS = QualityWeights(gradient_norm=1.0, convergence=1.0)
ONLINE = QualityConfig(mode="online", fraction=1.0, weights=TERMS, rare_classes="as_found")
SAMPLES = 10


def trainer_of(
    name: str, folder: Path, recorded: bool, terms: bool = True, **settings: Any
) -> PoolTrainer:
    """A training of 10 samples in batches of 4, dropout off."""
    kind = KINDS[name]
    rows = Dataset.from_list(rows_of(tiny_batch(kind, samples=SAMPLES)))
    model = with_lora(tiny_model(name), kind)
    checkpointed(model, reentrant=False)
    model.gradient_checkpointing_disable()
    quiet = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = training_arguments(
        {**quiet, "per_device_train_batch_size": 4, "num_train_epochs": 1, **settings},
        folder,
        seed=0,
    )
    sampler = QualitySampler(unscored(np.arange(SAMPLES), 1.0, 0, ""), 1.0, seed=0)
    named: dict[str, Any] = {
        "model": model, "args": arguments, "train_dataset": rows, "data_collator": collate,
    }  # fmt: skip
    if recorded:
        quality = ONLINE if terms else replace(ONLINE, weights=QualityWeights(0.0, 0.0, 0.0))
        return OnlineTrainer(sampler, Scorer(collate, quality), **named)
    return PoolTrainer(sampler, **named)


@pytest.mark.parametrize("name", ["bert", "bart", "llama"])
def test_what_a_still_training_records_is_what_a_loop_measures(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, True, learning_rate=0.0, gradient_accumulation_steps=2)
    trainer.train()
    assert isinstance(trainer, OnlineTrainer)
    trainer.visits.settle()
    assert trainer.visits.seen.tolist() == list(range(SAMPLES))
    batch, model = tiny_batch(KINDS[name], samples=SAMPLES), trainer.model.eval()
    gradients = looped_gradients(model, KINDS[name], batch)
    norms = [torch.cat([g.flatten() for g in own.values()]).norm().item() for own in gradients]
    losses = [loss_of(model, KINDS[name], sample).item() for sample in one_by_one(batch)]
    np.testing.assert_allclose(trainer.visits.column("gradient_norm"), norms, rtol=2e-5)
    np.testing.assert_allclose(trainer.visits.column("loss"), losses, rtol=1e-5)


def gradients_of(trainer: PoolTrainer) -> list[torch.Tensor]:
    """Those of every step of a whole training, clipped."""
    gradients: list[torch.Tensor] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, **named: Any) -> None:
            every = [p.grad for p in named["model"].parameters() if p.grad is not None]
            gradients.extend(gradient.clone() for gradient in every)

    trainer.add_callback(Keep())
    trainer.train()
    return gradients


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-9


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_recording_changes_nothing_that_is_trained(
    name: str, smoothing: float, tmp_path: Path
) -> None:
    """Heads that are saved whole, accumulation and clipping included."""
    settings = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.05,
        "label_smoothing_factor": smoothing,
    }
    found = [gradients_of(trainer_of(name, tmp_path, on, **settings)) for on in (False, True)]
    assert_alike(*found)


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_next_to_no_label_smoothing_is_next_to_none(name: str, tmp_path: Path) -> None:
    """And a decoder goes on from its targets, not from the source, smoothed or not."""
    smoothed = trainer_of(name, tmp_path, False, label_smoothing_factor=1e-7)
    assert_alike(gradients_of(smoothed), gradients_of(trainer_of(name, tmp_path, False)))


def visited(positions: list[int], losses: list[float], labels: list[int]) -> dict[str, np.ndarray]:
    outputs = np.zeros((len(positions), 2), np.float32)
    outputs[range(len(positions)), labels] = np.asarray(losses) * -1
    return {
        "position": np.asarray(positions),
        "loss": np.asarray(losses, np.float32),
        "gradient_norm": np.asarray(losses, np.float32) + 1,
        "length": np.ones(len(positions), np.int64),
        "label": np.asarray(labels),
        "output": outputs,
    }


def test_the_last_visit_counts_and_the_state_comes_back_the_same() -> None:
    visits = Visits(6)
    visits.add(0, visited([4, 1], [1.0, 2.0], [0, 1]))
    visits.add(0, visited([2], [float("nan")], [0]))
    visits.add(1, visited([1, 0], [3.0, 4.0], [1, 0]))
    visits.settle()
    assert visits.seen.tolist() == [0, 1, 4]
    assert visits.last.tolist() == [2, 2, 0, 0, 1, 0]
    assert visits.column("loss").tolist() == [4.0, 3.0, 1.0]
    other = Visits(6)
    other.load(visits.state())
    assert other.names == visits.names
    for name in visits.names:
        (positions, values), (same, again) = next(visits.blocks(name)), next(other.blocks(name))
        np.testing.assert_array_equal(positions, same)
        np.testing.assert_array_equal(values, again)


def test_those_never_drawn_have_the_highest_score_and_nothing_else() -> None:
    rows = Dataset.from_dict({"id": np.arange(30) * 2})
    quality = QualityConfig(mode="online", weights=TERMS, fraction=0.2)
    visits = Visits(30)
    found = OnlineScorer(Scorer(collate, quality), rows, CLASSIFICATION).scores(
        visits, tiny_model("bert")
    )
    assert found.probability == pytest.approx(np.full(30, 1 / 30))
    seen = np.arange(0, 30, 2)
    visits.add(0, visited(seen.tolist(), np.linspace(0, 3, 15).tolist(), [0, 1, 0] * 5))
    visits.settle()
    model = with_lora(tiny_model("bert"), "classification")
    found = OnlineScorer(Scorer(collate, quality), rows, CLASSIFICATION).scores(visits, model)
    missed = np.setdiff1d(np.arange(30), seen)
    assert found.ids.tolist() == rows["id"][:]
    assert (found.quality[missed] == found.quality[seen].max()).all()
    assert np.allclose(found.probability[missed], found.probability.max())
    assert np.isnan(found.loss[missed]).all()
    assert np.isfinite(found.loss[seen]).all()
    assert found.probability.sum() == pytest.approx(1)
    assert found.prediction is not None
    assert (found.prediction[missed] == -1).all()
    assert (found.prediction[seen] >= 0).all()
    assert "15 of 30 samples were never drawn" in found.verdict
    assert found.selected.sum() == 6


def fifth_wrong(count: int, among: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Visits of a model that knows four classes, to so many of a pool of `among`, of which the
    first fifth has wrong labels; and which of the pool those are."""
    random = np.random.default_rng(0)
    true, wrong = random.integers(0, 4, among), np.arange(among) < among // 5
    label = np.where(wrong, (true + random.integers(1, 4, among)) % 4, true)
    output = random.normal(0, 1, (among, 4)).astype(np.float32)
    output[np.arange(among), true] += 4
    loss = np.log(np.exp(output).sum(1)) - output[np.arange(among), label]
    order = random.permutation(among)[:count]
    columns = {
        "position": order,
        "loss": loss.astype(np.float32)[order],
        "length": np.ones(count, np.int64),
        "label": label[order],
        "output": output[order],
    }
    return columns, wrong


def online_scorer(samples: int, fraction: float = 1.0) -> OnlineScorer:
    nothing = QualityWeights(0.0, 0.0, 0.0)
    quality = QualityConfig(mode="online", weights=nothing, fraction=fraction)
    rows = Dataset.from_dict({"id": np.arange(samples)})
    return OnlineScorer(Scorer(collate, quality), rows, CLASSIFICATION)


def test_labels_are_judged_by_the_outputs_of_their_own_visits() -> None:
    visits, scorer = Visits(600), online_scorer(600)
    columns, wrong = fifth_wrong(600, 600)
    visits.add(0, columns)
    visits.settle()
    model = with_lora(tiny_model("bert"), "classification")
    assert not scorer.window_is_over(599)
    assert scorer.window_is_over(600)
    scorer.close_window(visits, model)
    found = scorer.scores(visits, model)
    assert found.wrong_share == pytest.approx(0.2, abs=0.04)
    assert found.verdict.startswith("about 2")
    assert found.credibility[wrong].mean() < 0.2 < 0.9 < found.credibility[~wrong].mean()


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("samples", [300, 700])
def test_every_epoch_of_a_small_pool_is_judged_though_a_few_were_not_in_it(
    samples: int, fraction: float
) -> None:
    """Near-duplicates leave each other out of a round; of a few rows nothing is said."""
    scorer, model = online_scorer(samples, fraction), with_lora(tiny_model("bert"), CLASSIFICATION)
    epoch = round(fraction * samples)
    for visited, windows in ((epoch // 4, 0), (epoch - epoch // 50, 1)):
        visits = Visits(samples)
        visits.add(0, fifth_wrong(visited, samples)[0])
        visits.settle()
        scorer.close_window(visits, model)
        assert scorer.judge.windows == windows
    assert scorer.judge.judged.sum() == visited


def online_run(folder: Path, **changes: Any) -> Path:
    settings = {
        "quality.mode": "online",
        "quality.fraction": 0.5,
        "training.num_train_epochs": 3,
        "training.save_strategy": "steps",
        "training.save_steps": 3,
    }
    return classification_run(folder, 60, **settings, **changes)


def test_a_run_draws_by_what_it_has_seen_and_leaves_its_scores(whole: Path) -> None:
    folder = whole
    scores = QualityScores.from_parquet(folder / "scores.parquet")
    assert np.isnan(scores.loss_reduction).all()
    assert 0 < np.isnan(scores.gradient_norm).sum() < 30, "two thirds and more are drawn once"
    assert np.isfinite(scores.convergence[np.isfinite(scores.gradient_norm)]).all()
    run = Run.open(folder)
    first, later = (
        load_file(folder / f"checkpoints/train/checkpoint-{n}/{STATE_FILE}") for n in (9, 12)
    )
    assert len(np.unique(first["probability"])) > 2
    drawn = [draw(first["probability"], 0.5, 0, 2)]
    assert (later["last"][drawn[0]] == 3).all(), "the last epoch was drawn by the state"
    cost = json.loads((folder / "metrics.json").read_text())["cost"]
    assert cost["stages"]["scores"]["passes"] == 0, "of classes the null is free"
    assert cost["training_passes"] == 90
    assert run.score().verdict == "quality.mode: online"
    assert "never drawn" in (folder / "report.html").read_text()


class Killed(Exception):
    """As good as a kill: only what is on the disk is left."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(online_run(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Trains by a configuration until it is killed after a step."""

    def run(config: Path, at: int) -> None:
        class Kill(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
                if state.global_step == at:
                    raise Killed

        original = OnlineTrainer.__init__

        def started(self: OnlineTrainer, *given: Any, **settings: Any) -> None:
            original(self, *given, **settings)
            self.add_callback(Kill())

        with monkeypatch.context() as patched:
            patched.setattr(OnlineTrainer, "__init__", started)
            with pytest.raises(Killed):
                train(config)

    return run


def assert_same_bytes(resumed: Path, whole: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", "scores.parquet"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("at", [4, 6, 9])
def test_a_killed_run_goes_on_to_the_same_bytes(
    at: int, whole: Path, tmp_path: Path, killed: Callable[[Path, int], None]
) -> None:
    """From within the first epoch, from within the second, and from the last step of the second."""
    config = online_run(tmp_path)
    killed(config, at)
    assert_same_bytes(train(config, resume=True), whole)


@pytest.mark.parametrize("made", [causal_run, seq2seq_run])
def test_generation_pays_for_a_null_each_epoch_and_goes_on_to_the_same_bytes(
    made: Callable[..., Path], tmp_path: Path, killed: Callable[[Path, int], None]
) -> None:
    def config(name: str) -> Path:
        (tmp_path / name).mkdir()
        settings = {
            "quality.mode": "online",
            "quality.fraction": 0.5,
            "training.num_train_epochs": 3,
        }
        return made(
            tmp_path / name, 100, **settings, **{"training.per_device_train_batch_size": 25}
        )

    folder = train(config("whole"))
    scores = QualityScores.from_parquet(folder / "scores.parquet")
    seen = np.isfinite(scores.gradient_norm)
    assert 50 < seen.sum() <= 100
    assert np.isfinite(scores.convergence[seen]).all()
    assert "no wrong ones to compare" not in scores.verdict
    cost = json.loads((folder / "metrics.json").read_text())["cost"]["stages"]
    assert 0 < cost["scores"]["passes"] <= 40, "in its one window 40 pairs at most, both ways"
    assert cost["training"]["passes"] == 150
    interrupted = config("killed")
    killed(interrupted, 5)
    assert_same_bytes(train(interrupted, resume=True), folder)
    resumed = json.loads((tmp_path / "killed/run/metrics.json").read_text())["cost"]["stages"]
    assert resumed["scores"]["passes"] == cost["scores"]["passes"]


def found_by(trainer: PoolTrainer) -> list[list[float]]:
    """What was recorded, and what is drawn and scored by it, after the training."""
    assert isinstance(trainer, OnlineTrainer)
    trainer.train()
    scores, drawn = trainer.scores(), trainer.sampler.probability
    norms = trainer.visits.column("gradient_norm")
    return [norms.tolist(), drawn.tolist(), scores.quality.tolist()]


def test_mode_none_scores_nothing_and_draws_all(tmp_path: Path) -> None:
    folder = train(classification_run(tmp_path, 60, **{"quality.mode": "none"}))
    assert not (folder / "scores.parquet").exists()
    cost = json.loads((folder / "metrics.json").read_text())["cost"]
    assert "scores" not in cost["stages"]
    assert cost["training_passes"] == 120
    assert "all are drawn alike" in (folder / "report.html").read_text()
    assert (folder / "plan.json").exists()


@pytest.mark.parametrize("mode", ["online", "none"])
def test_scores_are_taken_upfront_where_nothing_but_them_is_asked_for(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"quality.mode": mode, "quality.adapt_steps": None}
    assert main(["score", str(classification_run(tmp_path, 60, **settings))]) == 0
    scores = QualityScores.from_parquet(tmp_path / "run/scores.parquet")
    assert np.isfinite(scores.loss).all()
    stages = json.loads((tmp_path / "run/metrics.json").read_text())["cost"]["stages"]
    assert stages["adaptation"]["passes"] == 120, "as many first steps as the training would have"


def test_scores_alone_are_taken_beside_a_reference_that_a_training_would_train_on(
    tmp_path: Path,
) -> None:
    trusted = write_rows(tmp_path / "trusted.jsonl", class_rows(40, seed=5))
    settings = {"adapt_steps": 4, "reference": str(trusted)}
    config = classification_run(tmp_path, 60, quality=settings)
    assert RunConfig.from_yaml(config).quality.mode == "online"
    assert main(["score", str(config)]) == 0
    assert len(QualityScores.from_parquet(tmp_path / "run/scores.parquet").ids) == 60
    assert len((tmp_path / "run/ranked.csv").read_text().splitlines()) == 61


def test_plain_text_is_not_said_to_be_sound(tmp_path: Path) -> None:
    changes = {"data.text": "text", "data.target": None, "metrics": None}
    quiet = {"quality": {"mode": "online"}, "training.num_train_epochs": 3}
    folder = train(causal_run(tmp_path, 400, **changes, **quiet))
    verdict = QualityScores.from_parquet(folder / "scores.parquet").verdict
    assert verdict.startswith("targets are not judged: no input can be paired")


@pytest.mark.parametrize("name", ["deberta", "qwen2-moe"])
def test_without_terms_any_model_can_be_judged_while_it_trains(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, True, terms=False)
    trainer.train()
    assert isinstance(trainer, OnlineTrainer)
    assert np.isfinite(trainer.scores().loss).all()


@pytest.mark.parametrize("name", ["deberta", "xlnet"])
def test_a_model_whose_samples_cannot_be_told_apart_is_refused_before_training(name: str) -> None:
    kind = KINDS[name]
    rows = Dataset.from_list(rows_of(tiny_batch(kind)))
    with pytest.raises(ModelError, match="cannot be told apart"):
        check_recordable(with_lora(tiny_model(name), kind), kind, rows, collate)
