"""The whole way in two processes: DistributedDataParallel and FSDP2, interrupted, resumed, failing.

One launch does it all, as a process takes several seconds to start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from launched import Launch, launched_twice, without_dropout
from runs import causal_run, classification_run
from test_early_learning import labels_alone, trained
from test_online import trainer_of
from test_pairs import small
from tsqlora import LayerSensitivity, QualityScores, scoring
from tsqlora.artefacts import read_json
from tsqlora.credibility import Credibility
from tsqlora.dynamic_rank import DynamicRank
from tsqlora.global_batches import SPARE, GlobalBatchTrainer
from tsqlora.online_training import OnlineTrainer
from tsqlora.pipeline import Run
from tsqlora.training import PoolTrainer

SAMPLES, BATCH = 98, 8
"""49 samples an epoch: the last step has a sample for one of two processes only."""
KINDS = ("ddp", "fsdp")

SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
from test_parallel import early, few_at_once, noting, online, small_parts
from torch.distributed.distributed_c10d import _get_default_store
from tsqlora import cli, processes
from tsqlora.errors import TrainingError
from tsqlora.global_batches import GlobalBatchTrainer
from tsqlora.pipeline import Run

home = Path(sys.argv[1])

def note(name, what):
    (home / f"{name}-{processes.index()}.json").write_text(json.dumps(what))

def train(config, resume=False):
    with noting() as noted:
        run = Run.start(config, resume)
        run.train()
        run.evaluate()
    return noted

def again(kind):
    whole, copy = home / kind, home / f"{kind}-again"
    if processes.is_main():
        shutil.copytree(whole, copy)
        shutil.rmtree(copy / "checkpoints" / "train")
        shutil.rmtree(copy / "adapter")
    processes.wait()

class Interrupted(GlobalBatchTrainer):
    pass

for kind in ("ddp", "fsdp"):
    note(kind, train(home / f"{kind}.yaml"))
    again(kind)
    step = GlobalBatchTrainer.training_step
    def interrupting(self, *inputs):
        if self.state.global_step == 4 and processes.index() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *inputs)
    GlobalBatchTrainer.training_step = interrupting
    config = home / f"{kind}-again.yaml"
    try:
        train(config)
        stopped = None
    except KeyboardInterrupt:
        stopped = sorted(p.name for p in (home / f"{kind}-again/checkpoints/train").glob("check*"))
    GlobalBatchTrainer.training_step = step
    processes.wait()
    note(f"{kind}-stopped", stopped)
    note(f"{kind}-again", train(config, resume=True))

with few_at_once():
    Run.start(home / "texts.yaml").score()
with small_parts() as written:
    Run.start(home / "plan.yaml").plan()
note("parts", written)
note("online", online(home / "online-two", 2))
note("early", early(home / "early-two", 2))

note("mistake", cli.main(["train", str(home / "mistake.yaml")]))
processes.wait()
_get_default_store().set("tsqlora/failed", "0")

def failing(self, *inputs):
    if self.state.global_step == 2 and processes.index() == 1:
        raise TrainingError("only the second process knows")
    return step(self, *inputs)
GlobalBatchTrainer.training_step = failing
raise SystemExit(cli.main(["train", str(home / "failing.yaml")]))
"""


class noting:
    """Inside, the tokens of each step and the ranks that move are noted."""

    def __enter__(self) -> dict[str, list[Any]]:
        self.kept = (GlobalBatchTrainer.get_batch_samples, DynamicRank.step)
        taken, moved = self.kept
        noted: dict[str, list[Any]] = {"ids": [], "ranks": []}

        def get_batch_samples(trainer: Any, *inputs: Any) -> Any:
            batches, count = taken(trainer, *inputs)
            if isinstance(trainer, PoolTrainer):  # not the adaptation, which one process does
                own = [batch["input_ids"] for batch in batches if SPARE not in batch]
                noted["ids"].append([row.tolist() for ids in own for row in ids])
            return batches, count

        def step(ranks: DynamicRank) -> Any:
            found = moved(ranks)
            noted["ranks"].append(found.ranks if found else None)
            return found

        GlobalBatchTrainer.get_batch_samples = get_batch_samples  # type: ignore[assignment,method-assign]
        DynamicRank.step = step  # type: ignore[method-assign]
        return noted

    def __exit__(self, *_: object) -> None:
        GlobalBatchTrainer.get_batch_samples, DynamicRank.step = self.kept  # type: ignore[method-assign]


@contextmanager
def few_at_once() -> Iterator[None]:
    """Inside, texts are asked for in small blocks, and those after the first as well; credibility
    says what each costs after another input."""
    with pytest.MonkeyPatch.context() as patched:
        small(patched, wrong=True)
        patched.setattr("tsqlora.quality.from_pairs", _as_told)
        yield


def _as_told(own: Any, mismatched: Any) -> Credibility:
    return Credibility(np.exp(-mismatched), 0.1, "said so")


@contextmanager
def small_parts() -> Iterator[list[int]]:
    """Inside, scores are written two batches at a time; gives the numbers of the parts that this
    process writes."""
    write, numbers = scoring.Parts.write, list[int]()

    def noted(parts: Any, number: int, *rest: Any) -> None:
        numbers.append(number)
        write(parts, number, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scoring, "PART", 2)
        patched.setattr(scoring.Parts, "write", noted)
        yield numbers


def online(folder: Path, batch: int) -> list[list[float]]:
    """What a training of two epochs recorded, and what is drawn and scored by it."""
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": batch}
    trainer = trainer_of("bert", folder, True, **settings)
    assert isinstance(trainer, OnlineTrainer)
    trainer.train()
    scores, drawn = trainer.scores(), trainer.sampler.probability
    norms = trainer.visits.column("gradient_norm")
    return [norms.tolist(), drawn.tolist(), scores.quality.tolist()]


def early(folder: Path, batch: int, held: bool = True) -> list[float]:
    """The weights after a training of five epochs, `held` to what was predicted early."""
    settings = {"num_train_epochs": 5, "per_device_train_batch_size": batch}
    return trained(labels_alone(folder, held, **settings))


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    home = tmp_path_factory.mktemp("parallel")

    def config(name: str, output: str, **changes: Any) -> Path:
        written = classification_run(
            home, SAMPLES, **{"output": str(home / output), "training.save_steps": 3, **changes}
        )
        return written.rename(home / f"{name}.yaml")

    half = {"training.per_device_train_batch_size": BATCH // 2}
    one = config("one", "one")
    for kind, more in zip(KINDS, ({}, {"training.fsdp": True}), strict=True):
        for again in ("", "-again"):
            config(kind + again, kind + again, **half, **more)
    config("failing", "failing", **half)
    config("mistake", "mistake", **{"data.text": "no such column"})
    for name in ("plan-one", "plan"):
        config(name, name, **{"quality.reference": "validation"})
    without_dropout(home / "model")
    (home / "of-texts").mkdir()
    for name in ("texts-one", "texts"):
        written = causal_run(home / "of-texts", 40, output=str(home / name))
        written.rename(home / f"{name}.yaml")
    with few_at_once():
        Run.start(home / "texts-one.yaml").score()
    with noting() as alone:
        run = Run.start(one)
        run.train()
        run.evaluate()
    with small_parts():
        Run.start(home / "plan-one.yaml").plan()
    done = launched_twice(home, SCRIPT, 300)
    return Launch(home, run, alone, done.returncode, done.stderr)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_what_one_takes_in_the_same_steps(launch: Launch, kind: str) -> None:
    first, second = (launch.note(kind, process)["ids"] for process in (0, 1))
    assert len(first) == len(second) == len(launch.alone["ids"])
    for one, other, alone in zip(first, second, launch.alone["ids"], strict=True):
        assert as_texts(one + other) == as_texts(alone)
    assert any(not one for one in first)  # a process without a sample


def as_texts(batch: list[list[int]]) -> list[list[int]]:
    return [[token for token in row if token] for row in batch]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_plan_ranks_and_loss_are_those_of_one_process(launch: Launch, kind: str) -> None:
    one, two = launch.one.folder, launch.run(kind).folder
    alone, together = (QualityScores.from_parquet(f.scores) for f in (one, two))
    for name in ("loss", "gradient_norm", "loss_reduction", "convergence"):
        terms = (getattr(scores, name) for scores in (together, alone))
        np.testing.assert_allclose(*terms, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(together.selected, alone.selected)
    for name, value in read_json(one.sensitivity)["modules"].items():
        assert read_json(two.sensitivity)["modules"][name] == pytest.approx(value, rel=1e-6)
    assert two.plan.read_bytes() == one.plan.read_bytes()
    assert two.ranks.read_bytes() == one.ranks.read_bytes()
    for process in (0, 1):
        assert launch.note(kind, process)["ranks"] == launch.alone["ranks"]
    assert any(launch.alone["ranks"])
    log, reference = (f.train_log.read_text().splitlines() for f in (two, one))
    assert [json.loads(line)["step"] for line in log] == [10, 14]
    for line, expected in zip(log, reference, strict=True):
        for key, value in json.loads(expected).items():
            assert json.loads(line)[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_whole_and_that_of_one_process(launch: Launch, kind: str) -> None:
    name = "adapter_model.safetensors"
    one, two = (
        load_file(folder.adapter / name) for folder in (launch.one.folder, launch.run(kind).folder)
    )
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in two.items()}
    for key, tensor in one.items():
        np.testing.assert_allclose(two[key], tensor, rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_counted_once(launch: Launch, kind: str) -> None:
    alone, together = (
        read_json(f.metrics)["cost"] for f in (launch.one.folder, launch.run(kind).folder)
    )
    for key in ("scoring_passes", "training_passes", "trainable_parameters"):
        assert together[key] == alone[key]


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_to_one_stops_all_and_they_go_on_to_the_same_bytes(
    launch: Launch, kind: str
) -> None:
    stopped = [launch.note(f"{kind}-stopped", process) for process in (0, 1)]
    assert stopped[0] == stopped[1] == ["checkpoint-5"]
    whole, again = (launch.run(name).folder.adapter for name in (kind, f"{kind}-again"))
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_texts_asked_for_by_two_are_judged_as_by_one(launch: Launch) -> None:
    one, two = (launch.run(name).folder for name in ("texts-one", "texts"))
    found = [QualityScores.from_parquet(folder.scores) for folder in (one, two)]
    assert (found[0].credibility < 1).sum() > 12, "the first block, and others"
    for name in ("loss", "credibility"):
        np.testing.assert_allclose(*(getattr(each, name) for each in found), rtol=0, atol=1e-6)
    costs = [read_json(folder.metrics)["cost"]["scoring_passes"] for folder in (one, two)]
    assert costs[0] == costs[1]


def test_two_processes_give_the_scores_and_the_plan_of_one_to_the_last_byte(
    launch: Launch,
) -> None:
    first, second = (launch.note("parts", process) for process in (0, 1))
    assert first
    assert second
    assert not set(first) & set(second)
    one, two = (launch.run(name).folder for name in ("plan-one", "plan"))
    for name in ("scores", "plan"):
        assert getattr(two, name).read_bytes() == getattr(one, name).read_bytes()
    warm = "state.safetensors"
    assert (two.warmup / warm).read_bytes() == (one.warmup / warm).read_bytes()
    found, wanted = (LayerSensitivity.load(folder.sensitivity) for folder in (two, one))
    assert found.modules == wanted.modules, "to the last bit, as batches are added in their order"
    for name, values in wanted.spectrum.items():  # of sketches, added up by process
        # a singular value is known to the rounding of the largest one (Weyl), in float32
        np.testing.assert_allclose(found.spectrum[name], values, rtol=1e-5, atol=1e-7 * values[0])


def test_two_processes_record_together_and_draw_the_same(launch: Launch) -> None:
    first, second = (launch.note("online", process) for process in (0, 1))
    assert first == second
    for one, two in zip(online(launch.home / "online-one", 4), first, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


def test_two_processes_hold_to_what_both_have_seen(launch: Launch) -> None:
    first, second = (launch.note("early", process) for process in (0, 1))
    assert first == second
    alone = early(launch.home / "early-one", 4)
    plain = early(launch.home / "plain", 4, held=False)
    np.testing.assert_allclose(first, alone, rtol=1e-3, atol=1e-5)
    assert not np.allclose(plain, alone, rtol=1e-3, atol=1e-5)


def test_what_is_wrong_is_said_once(launch: Launch) -> None:
    assert [launch.note("mistake", process) for process in (0, 1)] == [2, 2]
    assert launch.status != 0
    said = [line for line in launch.said.splitlines() if line.startswith("tsqlora: ")]
    assert len(said) == 2, launch.said[-3000:]
    assert "no such column" in said[0]
    assert said[-1] == "tsqlora: only the second process knows"
    assert "Traceback" not in launch.said.split(said[-1])[0]
