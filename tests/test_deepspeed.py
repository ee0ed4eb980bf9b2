"""DeepSpeed's ZeRO against one process: `pytest -s -m deepspeed tests/test_deepspeed.py`.

Needs `pip install deepspeed` and a C++ compiler, with which DeepSpeed builds its extension for CPUs
at the first start. One launch of two processes over gloo does it all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launched import Launch, launched_twice, without_dropout
from runs import classification_run
from test_parallel import as_texts, noting
from tsqlora import dynamic_rank, processes
from tsqlora.adapter import active
from tsqlora.artefacts import read_json
from tsqlora.dynamic_rank import DynamicRank
from tsqlora.errors import ConfigError
from tsqlora.pipeline import Run

pytestmark = pytest.mark.deepspeed
pytest.importorskip("deepspeed", reason="pip install deepspeed")

SAMPLES, BATCH = 98, 8
CLIP = 0.1
"""Below nearly every gradient's norm here, so that every step is clipped."""
STAGES: dict[str, dict[str, Any]] = {
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero0": {"zero_optimization": {"stage": 0}},
}
HALVES = ("bf16-2", "bf16-1")
RESUMED = ("zero2",)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"zero_optimization": {"stage": 2, "stages": 1}}, "stages"),
    "batch": ({"zero_optimization": {}, "train_micro_batch_size_per_gpu": 77}, "77"),
}
ADAPTER = "adapter_model.safetensors"

SCRIPT = """
import sys
from pathlib import Path
from test_deepspeed import launched

launched(Path(sys.argv[1]))
"""


class watching:
    """Inside, what must hold of pruned components, copies and growth is looked at, each step.

    `wrong` has what did not; `seen` counts what was looked at.
    """

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.seen = {"steps": 0, "pruned": 0, "grown": 0}

    def __enter__(self) -> watching:
        self.kept = (DynamicRank.step, dynamic_rank.grow)
        stepped, grown = self.kept

        def step(ranks: DynamicRank) -> Any:
            if ranks.taken:
                self._look(ranks)
            self.model = ranks.model
            found = stepped(ranks)
            self._budget(ranks)
            return found

        def grow(*inputs: Any) -> None:
            before = self._output()
            grown(*inputs)
            self.seen["grown"] += 1
            if not torch.equal(before, self._output()):
                self.wrong.append("growth changed the function")

        DynamicRank.step, dynamic_rank.grow = step, grow  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        DynamicRank.step, dynamic_rank.grow = self.kept  # type: ignore[method-assign]

    def _output(self) -> torch.Tensor:
        ids = torch.tensor([[1, 5, 9, 17, 2]])
        with torch.no_grad():
            return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    def _budget(self, ranks: DynamicRank) -> None:
        used = sum(int(active(m).sum()) * sum(m.shape) for m in ranks.modules)
        if used > ranks.budget:
            self.wrong.append(f"{used} parameters of {ranks.budget} at step {ranks.taken}")

    def _look(self, ranks: DynamicRank) -> None:
        """By DeepSpeed's own functions, not by ours."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self.seen["steps"] += 1
        for module in ranks.modules:
            pruned = ~active(module)
            self.seen["pruned"] += int(pruned.sum())
            for name, weight, dim in (("A", module.a.weight, 0), ("B", module.b.weight, 1)):
                found = {"parameter": weight.detach().float()}
                if hasattr(weight, "_hp_mapping"):
                    copy = safe_get_full_fp32_param(weight)
                    found["copy"] = copy
                    if not torch.equal(copy.to(weight.dtype), weight.detach()):
                        self.wrong.append(f"{module.name}.{name}: its fp32 copy differs")
                    linked = weight._hp_mapping is None or weight._hp_mapping.optim_fragment
                    if processes.total(float(bool(linked))) == processes.count():
                        for key in ("exp_avg", "exp_avg_sq"):
                            found[key] = safe_get_full_optimizer_state(weight, key)
                else:
                    state = ranks.optimizer.optimizer.state[weight]  # type: ignore[attr-defined]
                    found |= {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
                for key, tensor in found.items():
                    rest = tensor.index_select(dim, pruned.nonzero().flatten())
                    if rest.any():
                        self.wrong.append(f"{module.name}.{name}: {key} at step {ranks.taken}")


def refusal(config: Path) -> str | None:
    """What a run that cannot be is told."""
    try:
        Run.start(config).train()
    except ConfigError as error:
        return str(error)
    return None


def launched(home: Path) -> None:
    """What each of the two processes does."""
    import shutil
    import signal

    from tsqlora.global_batches import GlobalBatchTrainer

    def note(name: str, what: Any) -> None:
        (home / f"{name}-{processes.index()}.json").write_text(json.dumps(what))

    def train(name: str, resume: bool = False) -> None:
        with watching() as watched, noting() as noted:
            run = Run.start(home / f"{name}.yaml", resume)
            run.train()
            run.evaluate()
        note(name, {**noted, "wrong": watched.wrong, "seen": watched.seen})

    training_step = GlobalBatchTrainer.training_step
    sent: list[int] = []

    def interrupting(self: Any, *inputs: Any) -> Any:
        if self.state.global_step == 5 and processes.index() == 1 and not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, *inputs)

    for name in (*STAGES, *HALVES):
        train(name)
        if name not in RESUMED:
            continue
        whole, copy = home / name, home / f"{name}-again"
        if processes.is_main():
            shutil.copytree(whole, copy)
            shutil.rmtree(copy / "checkpoints" / "train")
            shutil.rmtree(copy / "adapter")
        processes.wait()
        GlobalBatchTrainer.training_step = interrupting  # type: ignore[method-assign]
        try:
            train(f"{name}-again")
            stopped = None
        except KeyboardInterrupt:
            folder = home / f"{name}-again/checkpoints/train"
            stopped = sorted(path.name for path in folder.glob("checkpoint-*"))
        GlobalBatchTrainer.training_step = training_step  # type: ignore[method-assign]
        processes.wait()
        note(f"{name}-stopped", stopped)
        train(f"{name}-again", resume=True)
    for name in WRONG:
        note(name, refusal(home / f"{name}.yaml"))


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    home = tmp_path_factory.mktemp("deepspeed")

    def config(name: str, **changes: Any) -> Path:
        given = {"output": str(home / name), "training.save_steps": 3}
        given |= {"training.save_strategy": "steps", "training.max_grad_norm": CLIP, **changes}
        return classification_run(home, SAMPLES, **given).rename(home / f"{name}.yaml")

    quarter = {
        "training.per_device_train_batch_size": BATCH // 4,
        "training.gradient_accumulation_steps": 2,
    }
    half = {"training.bf16": True, "training.use_cpu": True}
    one, other = config("one"), config("half", **half)
    for name, given in STAGES.items():
        for again in ("", "-again"):
            config(name + again, **quarter, **{"training.deepspeed": given})
    for name in HALVES:
        given = {"zero_optimization": {"stage": int(name[-1])}}
        config(name, **quarter, **half, **{"training.deepspeed": given})
    for name, (given, _) in WRONG.items():
        config(name, **quarter, **{"training.deepspeed": given})
    without_dropout(home / "model")
    with noting() as alone:
        run = Run.start(one)
        run.train()
        run.evaluate()
    Run.start(other).train()
    done = launched_twice(home, SCRIPT, 900, DS_ACCELERATOR="cpu")
    return Launch(home, run, alone, done.returncode, done.stdout + done.stderr)


@pytest.mark.parametrize("name", STAGES)
def test_batches_plan_ranks_losses_and_adapter_are_those_of_one_process(
    launch: Launch, name: str
) -> None:
    first, second = (launch.note(name, process) for process in (0, 1))
    for one, other, alone in zip(first["ids"], second["ids"], launch.alone["ids"], strict=True):
        assert sorted(as_texts(one + other)) == sorted(as_texts(alone))
    assert first["ranks"] == second["ranks"] == launch.alone["ranks"]
    assert sum(move is not None for move in first["ranks"]) >= 3
    one, two = launch.one.folder, launch.run(name).folder
    assert two.plan.read_bytes() == one.plan.read_bytes()
    assert two.ranks.read_bytes() == one.ranks.read_bytes()
    log, reference = (f.train_log.read_text().splitlines() for f in (two, one))
    furthest = 0.0
    for line, expected in zip(map(json.loads, log), map(json.loads, reference), strict=True):
        assert line["step"] == expected["step"]
        furthest = max(furthest, abs(line["loss"] / expected["loss"] - 1))
        if name != "zero0":  # whose engine does not tell
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            assert expected["grad_norm"] > CLIP
    whole, pieced = (load_file(folder.adapter / ADAPTER) for folder in (one, two))
    assert {n: t.shape for n, t in whole.items()} == {n: t.shape for n, t in pieced.items()}
    apart = max(float((pieced[key] - tensor).abs().max()) for key, tensor in whole.items())
    print(f"{name}: losses within {furthest:.1e} of their size, weights within {apart:.1e}")
    assert furthest < 1e-5
    assert apart < 1e-5


@pytest.mark.parametrize("name", [*STAGES, *HALVES])
def test_pruned_stays_zero_growth_changes_nothing_and_the_budget_holds(
    launch: Launch, name: str
) -> None:
    for process in (0, 1):
        noted = launch.note(name, process)
        assert not noted["wrong"], noted["wrong"][:5]
        assert noted["seen"]["steps"] > 10
        assert noted["seen"]["pruned"] > 0
        assert noted["seen"]["grown"] > 0


@pytest.mark.parametrize("name", HALVES)
def test_in_16_bits_processes_agree_and_learn_what_one_learns(launch: Launch, name: str) -> None:
    first, second = (launch.note(name, process) for process in (0, 1))
    assert first["ranks"] == second["ranks"]
    log, reference = (
        [json.loads(line)["loss"] for line in run.folder.train_log.read_text().splitlines()]
        for run in (launch.run(name), launch.run("half"))
    )
    print(f"{name}: losses {log}, of one process in 16 bits {reference}")
    assert log == pytest.approx(reference, rel=0.02)


@pytest.mark.parametrize("name", WRONG)
def test_what_deepspeed_refuses_is_said_before_anything_long(launch: Launch, name: str) -> None:
    for process in (0, 1):
        said = launch.note(name, process)
        assert said.startswith("training.deepspeed: ")
        assert WRONG[name][1] in said
    assert not (launch.home / name / "scores.parquet").exists()


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_before_a_move_and_resumed_it_ends_in_the_same_bytes(
    launch: Launch, name: str
) -> None:
    for process in (0, 1):
        assert launch.note(f"{name}-stopped", process)[-1] == "checkpoint-6"
        again = launch.note(f"{name}-again", process)
        assert not again["wrong"], again["wrong"][:5]
        assert again["ranks"][0] is not None  # the first resumed step moves ranks
    whole, again = (launch.run(n).folder for n in (name, f"{name}-again"))
    assert (again.adapter / ADAPTER).read_bytes() == (whole.adapter / ADAPTER).read_bytes()
    assert again.ranks.read_bytes() == whole.ranks.read_bytes()


def test_the_metrics_are_those_of_one_process(launch: Launch) -> None:
    one = read_json(launch.one.folder.metrics)["validation"]
    for name in STAGES:
        two = read_json(launch.run(name).folder.metrics)["validation"]
        for key, value in one.items():
            np.testing.assert_allclose(two[key], value, rtol=1e-5, err_msg=f"{name} {key}")
