"""Scoring after the process has been killed; out of a launcher's sight. Of two: test_parallel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runs import classification_run
from tsqlora import processes, scoring
from tsqlora.pipeline import Run

SMALL_PARTS = "from tsqlora import scoring; scoring.PART = 2\n"


def score_in_subprocess(
    folder: Path, config: Path, script: str
) -> subprocess.CompletedProcess[str]:
    main = folder / "main.py"
    main.write_text(f"{script}from tsqlora.cli import main\nraise SystemExit(main())\n")
    command = [sys.executable, str(main), "score", str(config), "--json"]
    return subprocess.run(command, check=False, capture_output=True, text=True)


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
