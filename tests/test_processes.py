"""Scoring in two processes, and after the process has been killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launched import TWO_PROCESSES
from runs import classification_run
from tsqlora import LayerSensitivity, QualityScores, processes, scoring
from tsqlora.pipeline import Run

SMALL_PARTS = "from tsqlora import scoring; scoring.PART = 2\n"


def score_in_subprocess(
    folder: Path, config: Path, script: str, *launcher: str, verb: str = "score"
) -> subprocess.CompletedProcess[str]:
    main = folder / "main.py"
    main.write_text(f"{script}from tsqlora.cli import main\nraise SystemExit(main())\n")
    command = [sys.executable, *launcher, str(main), verb, str(config), "--json"]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_two_processes_give_the_scores_and_the_plan_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PART", 2)
    config = classification_run(tmp_path, 80, **{"quality.reference": "validation"})
    run = Run.start(config)
    alone = run.score()
    run.plan()
    warm = (run.folder.warmup / "state.safetensors").read_bytes()
    config = classification_run(
        tmp_path, 80, **{"quality.reference": "validation", "output": str(tmp_path / "two")}
    )
    script = f"""{SMALL_PARTS}
from tsqlora import processes
write = scoring.Parts.write
def noted(*written):
    open(f"{tmp_path}/{{processes.index()}} of {{processes.count()}} took part", "w")
    write(*written)
scoring.Parts.write = noted
"""
    done = score_in_subprocess(tmp_path, config, script, *TWO_PROCESSES, verb="plan")
    assert done.returncode == 0, done.stderr[-5000:]
    assert len(list(tmp_path.glob("[01] of 2 took part"))) == 2
    two = Run.open(tmp_path / "two")
    assert (two.folder.warmup / "state.safetensors").read_bytes() == warm
    together = QualityScores.from_parquet(two.folder.scores)
    for name in ("ids", "loss", "gradient_norm", "loss_reduction", "convergence"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), rtol=0, atol=1e-6)
    np.testing.assert_allclose(together.quality, alone.quality, rtol=0, atol=1e-6)
    np.testing.assert_allclose(together.probability, alone.probability, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(together.selected, alone.selected)
    for name in ("scores", "plan"):
        assert getattr(two.folder, name).read_bytes() == getattr(run.folder, name).read_bytes()
    found, wanted = (LayerSensitivity.load(each.folder.sensitivity) for each in (two, run))
    assert found.modules == wanted.modules, "to the last bit, as batches are added in their order"
    for name, values in wanted.spectrum.items():  # of sketches, added up by process
        # a singular value is known to the rounding of the largest one (Weyl), in float32
        np.testing.assert_allclose(found.spectrum[name], values, rtol=1e-5, atol=1e-7 * values[0])


def test_scoring_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = classification_run(tmp_path, 80)
    run = Run.start(config)
    run.score()
    whole = run.folder.scores.read_bytes()
    run.folder.scores.unlink()
    script = (
        SMALL_PARTS
        + """
import os, signal
replace = os.replace
def killed(written, path):
    if str(path).endswith("part-000002.parquet"):
        os.kill(os.getpid(), signal.SIGKILL)  # written, but not yet in its place
    replace(written, path)
os.replace = killed
"""
    )
    assert score_in_subprocess(tmp_path, config, script).returncode == -signal.SIGKILL
    left = {file.name for file in (run.folder.measured / "quality").iterdir()}
    assert {"part-000000.parquet", "part-000001.parquet"} < left
    assert "part-000002.parquet" not in left
    assert any(name.endswith(".tmp") for name in left)
    monkeypatch.setattr(scoring, "PART", 2)
    Run.start(config).score()
    assert run.folder.scores.read_bytes() == whole


def test_alone_hides_the_launcher_and_shows_it_again() -> None:
    os.environ["WORLD_SIZE"] = "2"
    try:
        with processes.alone():
            assert "WORLD_SIZE" not in os.environ
        assert os.environ["WORLD_SIZE"] == "2"
    finally:
        del os.environ["WORLD_SIZE"]
    assert (processes.index(), processes.count()) == (0, 1)
