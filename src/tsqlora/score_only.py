"""Scoring alone: a configuration without YAML, and what it leaves for people: a ranked CSV, a
cleaned data set."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqlora.cleaned import write_clean
from tsqlora.config import RunConfig, override
from tsqlora.errors import ConfigError
from tsqlora.pipeline import Run
from tsqlora.quality import QualityScores
from tsqlora.ranked import likely_wrong, ranking, write_ranked
from tsqlora.seeing import Seen

EPOCHS, MOST_EPOCHS, LEAST_STEPS = 3, 6, 100
"""Of the adaptation before rows are judged: after more epochs a wrong label is known by heart, and
after fewer steps than these nothing is known; a small pool is passed up to six times for them."""
LARGE, LARGE_EPOCHS, MOST_STEPS = 20_000, 4, 8500
"""Of so many rows fewer are known by heart, so one epoch more; and the steps after which a large
pool's adaptation ends, though never before one epoch (benchmarks/LOG.md)."""
BATCH, RATE, LAST_RATE = 32, 1e-3, 0.1
"""Samples a step, the learning rate, and the share of it that is left at the end."""
AT_ONCE = {"causal-lm": 8}
"""Of a step's samples: the logits of texts are as wide as the vocabulary, for every token."""


def score_config(seen: Seen, output: str | None, overrides: Sequence[str]) -> RunConfig:
    """A configuration that judges the targets: long adaptation, losses alone, no gradient term.

    Of chats none: a model with a chat template can tell answers that go with any question from
    others before it has seen these (benchmarks/LOG.md, 2026-11-27).
    """
    steps = 0 if seen.chosen.is_chat else adaptation_steps(seen.rows)
    at_once = AT_ONCE.get(seen.chosen.task, BATCH)
    mapping: dict[str, Any] = {
        "model": seen.model,
        "task": seen.chosen.task,
        "data": {
            "train": seen.source if isinstance(seen.source, str) else list(seen.source),
            **seen.chosen.data,
            "max_length": seen.max_length,
        },
        "quality": {"mode": "upfront", "adapt_steps": steps},
        "training": {
            "learning_rate": RATE,
            "max_steps": max(1, math.ceil(steps * LAST_RATE / (1 - LAST_RATE))),
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": BATCH // at_once,
            "train_sampling_strategy": "group_by_length",
        },
        "output": output or f"runs/score-{seen.name}",
    }
    for each in overrides:
        override(mapping, each)
    return RunConfig.from_dict(mapping)


def adaptation_steps(rows: int) -> int:
    """How long a model is adapted to a pool of so many rows before it judges them."""
    epoch = math.ceil(rows / BATCH)
    epochs = LARGE_EPOCHS if rows >= LARGE else EPOCHS
    steps = max(epochs * epoch, min(LEAST_STEPS, MOST_EPOCHS * epoch))
    return min(steps, max(MOST_STEPS, epoch))


def drop_count(given: str | None) -> float | int | None:
    """Of --drop: a number of rows, or a share of them written as 10%; None: those likely wrong.

    Raises:
        ConfigError: it is neither.
    """
    if given is None:
        return None
    if not re.fullmatch(r"\d+(\.\d+)?%|\d+", given):
        raise ConfigError(f"--drop {given}: write a number of rows, such as 200, or a share: 10%.")
    share = float(given[:-1]) / 100 if given.endswith("%") else None
    if share is not None and share >= 1:
        raise ConfigError(f"--drop {given} leaves no row.")
    return int(given) if share is None else share


def leave_files(
    run: Run, scores: QualityScores, clean: Path | None, drop: float | int | None
) -> dict[str, Any]:
    """Write `ranked.csv`, and the cleaned data set where one is wanted; what a person is told."""
    rows, config = run.inputs.raw["train"], run.config
    write_ranked(run.folder.ranked, scores, rows, config, run.inputs.task.labels)
    told = {"ranked": str(run.folder.ranked), "likely wrong": int(likely_wrong(scores).sum())}
    if clean is None:
        return told
    gone = scores.ids[dropped(scores, drop)]
    written = write_clean(config.data.train, "train", gone.tolist(), clean)
    return {**told, "clean": str(clean), "rows kept": written, "rows dropped": len(gone)}


def dropped(scores: QualityScores, drop: float | int | None) -> NDArray[np.int64]:
    """Positions of the rows to leave out: the likely wrong, or so many of the first ranked."""
    if drop is None:
        return np.flatnonzero(likely_wrong(scores))
    count = round(drop * len(scores.ids)) if isinstance(drop, float) else drop
    if count >= len(scores.ids):
        raise ConfigError(f"--drop {count} leaves none of the {len(scores.ids)} rows.")
    return ranking(scores)[:count]
