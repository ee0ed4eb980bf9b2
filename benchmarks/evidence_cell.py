"""One cell of the evidence: its data, its budget, its configuration, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from common import minilm
from evidence_data import MINILM, SHARED, TOKENIZERS, CellData, Task

from tsqlora.config import RunConfig
from tsqlora.training import GROUPED

RANK = 8
SCALE = 2.0
"""alpha / r of plain LoRA and its kin; of rank 4 too, where twice as much is no better (LOG.md)."""


@dataclass(frozen=True)
class Cell:
    """One cell: what is trained on what, by which method, at which rate."""

    task: Task
    condition: str
    method: str
    seed: int
    data: CellData
    folder: Path
    rate: float
    epochs: float | Fraction

    @property
    def budget(self) -> int:
        """Sample passes in all."""
        return math.ceil(self.epochs * len(self.data.train))

    @property
    def steps(self) -> int:
        """Optimizer steps that the budget pays for, where nothing else is done."""
        return math.ceil(self.budget / self.task.batch)

    @property
    def model(self) -> str:
        """The model's folder or name."""
        return str(minilm()) if self.task.model == MINILM else _shared(self.task.model)

    def config(self, **sections: Any) -> RunConfig:
        """The run's configuration; `sections` replace ours key by key."""
        task, data, settings = self.task, self.folder / "data", dict(self.task.settings)
        settings |= {name: _shared(settings[name]) for name in TOKENIZERS if name in settings}
        base: dict[str, Any] = {
            "model": self.model,
            "task": task.kind,
            "data": {
                "train": str(data / "train.jsonl"),
                "validation": str(data / "validation.jsonl"),
                "test": str(data / "test.jsonl"),
                "text": task.text,
                "target": task.target,
                "max_length": task.max_length,
            },
            "ranks": {"mean_rank": RANK},
            "metrics": [task.metric],
            "training": {
                "learning_rate": self.rate,
                "max_steps": self.steps,
                "per_device_train_batch_size": task.batch,
                "train_sampling_strategy": "random" if task.kind == "seq2seq" else GROUPED,
                "save_strategy": "no",
                "disable_tqdm": True,
            },
            "output": str(self.folder / "run"),
            "seed": self.seed,
        }
        merged = {**base, **settings}
        for name, section in sections.items():
            merged[name] = {**merged.get(name, {}), **section}
        return RunConfig.from_dict(merged)


def _shared(name: str) -> str:
    """A folder of shared/models, or the name as it is."""
    folder = SHARED / "models" / name
    return str(folder) if folder.exists() else name


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: metrics by split, passes and seconds in all, adapter parameters."""

    metrics: dict[str, dict[str, float]]
    passes: float
    seconds: float
    parameters: int
    notes: dict[str, Any] = field(default_factory=dict)
