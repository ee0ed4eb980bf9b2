"""A cell of the evidence measured and written down, and what was written read again."""

from __future__ import annotations

import platform
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from common import read_lines
from evidence_cell import Cell, Outcome
from evidence_data import Task, make_cell, write_cell
from evidence_methods import METHODS

from tsqlora import __version__
from tsqlora.artefacts import digest

RESULTS = Path(__file__).resolve().parent / "results"
CELLS = "evidence.jsonl"

Key = tuple[str, str, str, int]


def measured(
    kind: Task, condition: str, method: str, seed: int, rate: float, epochs: float | None = None
) -> dict[str, Any]:
    """A cell's line."""
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        data = make_cell(kind, condition, seed)
        write_cell(data, Path(folder) / "data")
        cell = Cell(kind, condition, method, seed, data, Path(folder), rate, epochs or kind.epochs)
        outcome = METHODS[method](cell)
        config = cell.config().to_dict()
    rare = {"rare": round(points(outcome, "rare", kind.of_rare), 3)} if data.rare else {}
    return {
        "task": kind.name,
        "condition": condition,
        "method": method,
        "seed": seed,
        "metric_name": kind.metric,
        "metric": round(points(outcome, "test", kind.metric), 3),
        "validation": round(points(outcome, "validation", kind.metric), 3),
        **rare,
        "cost": round(outcome.passes / cell.budget, 4),
        "seconds": round(outcome.seconds, 1),
        "adapter_parameters": outcome.parameters,
        "notes": outcome.notes,
        "config": {
            "learning_rate": rate,
            "epochs": cell.epochs,
            "samples": len(data.train),
            "batch": kind.batch,
            "digest": digest({**config, "output": None, "data": None, "model": None})[:16],
        },
        "versions": versions(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def points(outcome: Outcome, split: str, metric: str) -> float:
    """In points of 100; a loss as it is, with its sign turned so that more is better."""
    value = outcome.metrics[split][metric]
    return -value if metric == "loss" else 100 * value


def versions() -> dict[str, str]:
    """What it ran on."""
    return {
        "tsqlora": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "machine": "cuda" if torch.cuda.is_available() else platform.machine(),
    }


@cache
def _commit() -> str:
    """Of the code that was run, with -dirty where it was not committed; empty without git."""
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_cells(results: Path = RESULTS) -> list[dict[str, Any]]:
    """All finished cells."""
    return read_lines(results / CELLS)


def key(line: dict[str, Any]) -> Key:
    """What tells a cell from the others."""
    return line["task"], line["condition"], line["method"], line["seed"]
