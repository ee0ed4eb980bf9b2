"""What a training reports beside its loss reaches whatever `training.report_to` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from runs import causal_run, classification_run
from tsqlora import QualityScores, RankPlan
from tsqlora.artefacts import read_json, read_lines
from tsqlora.callback import DynamicRankCallback
from tsqlora.dynamic_rank import DynamicRank, Reallocation
from tsqlora.pipeline import Run
from tsqlora.reported import of_ranks, of_samples
from tsqlora.selection import draw, unscored
from tsqlora.training import PoolTrainer

EACH, MEAN, LEAST, MOST = "rank/", "ranks/mean", "ranks/min", "ranks/max"
USED, SHARE, CREDIBLE = "ranks/budget_used", "quality/selected_share", "quality/mean_credibility"
FAST = {"training.logging_steps": 2, "training.num_train_epochs": 3}


class Fake(TrainerCallback):
    """An integration, as wandb's or trackio's: (step, what was logged)."""

    seen: list[tuple[int, dict[str, Any]]]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


Seen = list[tuple[int, dict[str, Any]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What `training.report_to: fake` receives."""
    Fake.seen = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", Fake)
    return Fake.seen


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Seen]:
    """A run whose ranks move, and what `training.report_to: fake` received of it."""
    Fake.seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", Fake)
        folder = tmp_path_factory.mktemp("moving")
        run = trained(causal_run(folder, **FAST, **{"training.report_to": "fake"}))
    return run, Fake.seen


def trained(config: Path) -> Run:
    run = Run.start(config)
    run.train()
    return run


def ranks_after(run: Run, step: int) -> dict[str, int]:
    """The ranks that plan.json and ranks.jsonl say there are after a step."""
    moves = [m for m in read_lines(run.folder.ranks) if m["step"] <= step]
    return read_json(run.folder.plan)["ranks"] | (moves[-1]["ranks"] if moves else {})


def test_ranks_and_samples_are_beside_every_loss_as_the_artefacts_have_them(
    moving: tuple[Run, Seen],
) -> None:
    run, seen = moving
    plan, scores = RankPlan.load(run.folder.plan), QualityScores.from_parquet(run.folder.scores)
    losses = [(step, logs) for step, logs in seen if "loss" in logs]
    assert len(losses) > 5
    for step, logs in losses:
        ranks = ranks_after(run, step)
        used = sum(rank * sum(plan.shapes[name]) for name, rank in ranks.items())
        values = list(ranks.values())
        expected = (np.mean(values), min(values), max(values), used / plan.budget)
        assert [logs[name] for name in (MEAN, LEAST, MOST, USED)] == pytest.approx(expected)
        assert logs[SHARE] == 0.5
        assert logs[CREDIBLE] == pytest.approx(scores.credibility.mean())
        assert {type(value) for value in logs.values()} <= {int, float}


def test_every_modules_rank_is_reported_at_first_and_when_one_has_moved(
    moving: tuple[Run, Seen],
) -> None:
    run, seen = moving
    moved = [line["step"] for line in read_lines(run.folder.ranks)]
    assert moved, "this training moves ranks"
    before = None
    for step, logs in seen:
        if "loss" not in logs:
            continue
        each = {k.removeprefix(EACH): v for k, v in logs.items() if k.startswith(EACH)}
        if before is None or any(before < at <= step for at in moved):
            assert each == ranks_after(run, step)
        else:
            assert not each
        before = step


def test_a_fixed_plan_is_reported_too(tmp_path: Path, seen: Seen) -> None:
    fixed = {"ranks.dynamic": False, "training.report_to": "fake", "quality.mode": "none"}
    run = trained(classification_run(tmp_path, **fixed))
    plan, (_, first) = RankPlan.load(run.folder.plan), seen[0]
    assert first[USED] == plan.parameters / plan.budget
    assert {k: v for k, v in first.items() if k.startswith(EACH)} == {
        f"{EACH}{name}": rank for name, rank in plan.ranks.items()
    }
    assert first[SHARE] == 1.0
    assert CREDIBLE not in first, "nothing was scored"


def test_online_scores_report_their_credibility_once_there_is_one_and_after_a_resume(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = {"quality.mode": "online", "training.report_to": "fake", **FAST}
    steps = {"training.save_strategy": "steps", "training.save_steps": 10}
    config = classification_run(tmp_path, **online, **steps)
    whole = trained(config)
    first_epoch = [logs for _, logs in seen if "loss" in logs and logs["epoch"] <= 1]
    later = [logs for _, logs in seen if "loss" in logs and logs["epoch"] > 1]
    assert not any(CREDIBLE in logs for logs in first_epoch)
    assert all(0 < logs[CREDIBLE] <= 1 for logs in later)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 13:
                raise KeyboardInterrupt

    again = classification_run(tmp_path, **online, **steps, output=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fake", Stop)
        with pytest.raises(KeyboardInterrupt):
            trained(again)
    resumed = Run.start(again, resume=True)
    resumed.train()
    assert read_lines(resumed.folder.train_log) == read_lines(whole.folder.train_log)


def test_what_is_reported_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    log = PoolTrainer.log

    def noted(self: PoolTrainer, logs: dict[str, float], *rest: Any) -> None:
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__"):
                patch.setattr(torch.Tensor, name, None)
            reported.append(self.reported.beside(self.state.log_history))
        log(self, logs, *rest)

    monkeypatch.setattr(PoolTrainer, "log", noted)
    trained(classification_run(tmp_path))
    assert reported
    assert MEAN in reported[0]


def test_a_share_of_the_budget_and_the_ranks_of_none() -> None:
    shapes = {"a": (3, 5), "b": (2, 2)}
    assert of_ranks({"a": 2, "b": 0}, shapes, 32, each=True) == {
        MEAN: 1.0, LEAST: 0.0, MOST: 2.0, USED: 0.5, f"{EACH}a": 2.0, f"{EACH}b": 0.0,
    }  # fmt: skip
    assert of_ranks({}, {}, 0, each=True) == {MEAN: 0.0, LEAST: 0.0, MOST: 0.0, USED: 0.0}


def test_the_selected_share_is_of_different_samples() -> None:
    scores = unscored(np.arange(10), 1.0, 0, "")
    scores.probability[4:] = 0
    drawn = draw(scores.probability, 0.8, seed=0)
    assert len(drawn) == 8
    assert of_samples(scores, len(drawn))[SHARE] == len(set(drawn)) / 10 == 0.4


def test_a_callback_without_a_plan_knows_ranks_once_there_is_a_training() -> None:
    assert DynamicRankCallback().figures() == {}
    plan = RankPlan({"a": 2, "b": 0}, {"a": (3, 5), "b": (2, 2)}, 2.0, 40)
    callback = DynamicRankCallback(plan)
    assert callback.figures() == of_ranks(plan.ranks, plan.shapes, 40, each=True)
    assert callback.figures(since=3) == of_ranks(plan.ranks, plan.shapes, 40, each=False)
    callback.ranks = _moved({"a": 1}, step=4)
    assert callback.figures(since=3) == of_ranks({"a": 1, "b": 0}, plan.shapes, 40, each=True)
    assert callback.figures(since=4) == of_ranks({"a": 1, "b": 0}, plan.shapes, 40, each=False)


def _moved(ranks: dict[str, int], step: int) -> DynamicRank:
    moving = DynamicRank.__new__(DynamicRank)
    moving.modules, moving.planned = [], {}
    moving.history = [Reallocation(step, ranks, {}, {})]
    return moving


def test_tensorboards_events_hold_ranks_and_samples_beside_the_loss(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {**FAST, "training.report_to": "tensorboard"}
    run = trained(classification_run(tmp_path, **settings))
    assert not list(run.folder.checkpoints.rglob("events.out*")), "they lie in the run folder"
    events = accumulators.EventAccumulator(str(run.folder.tensorboard)).Reload()
    logged = [line for line in read_lines(run.folder.train_log) if "loss" in line]
    for name in ("loss", MEAN, LEAST, MOST, USED, SHARE, CREDIBLE):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(line["step"], pytest.approx(line[name])) for line in logged], name
    for name, rank in ranks_after(run, logged[0]["step"]).items():
        assert events.Scalars(f"train/{EACH}{name}")[0].value == rank
