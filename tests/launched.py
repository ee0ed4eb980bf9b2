"""Two processes of one launch over gloo, and what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqlora.pipeline import Run

TWO_PROCESSES = (
    *("-m", "torch.distributed.run", "--nproc_per_node", "2"),
    *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
)
"""Python's arguments before a script; a port that the launcher itself binds, so no other test's."""


@dataclass(frozen=True)
class Launch:
    """What two processes left, and one beside it."""

    home: Path
    one: Run
    alone: dict[str, list[Any]]
    status: int
    said: str

    def note(self, name: str, process: int) -> Any:
        left = self.home / f"{name}-{process}.json"
        assert left.exists(), self.said[-5000:]
        return json.loads(left.read_text())

    def run(self, name: str) -> Run:
        return Run.open(self.home / name)


def launched_twice(
    home: Path, script: str, seconds: int, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`script` with `home` as its argument, in two processes that find this folder's modules."""
    (home / "main.py").write_text(script)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *TWO_PROCESSES, str(home / "main.py"), str(home)],
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
    )


def without_dropout(model: Path) -> None:
    """A saved BERT, its dropout off."""
    settings = model / "config.json"
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **dropout}))
