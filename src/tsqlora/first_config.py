"""A commented starting configuration, so that nobody writes YAML from nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tsqlora.artefacts import atomic_write_text
from tsqlora.config import RunConfig
from tsqlora.data import spec_columns
from tsqlora.errors import ConfigError
from tsqlora.packaged import NAME, default_encoder
from tsqlora.schema import parse_yaml
from tsqlora.seeing import INSTRUCTED, MODELS, Seen
from tsqlora.sources import Source, said

STEPS = 300
"""Optimizer steps that a small data set's epochs come to at least."""
RATES = {"classification": 1e-3, "regression": 1e-3, "seq2seq": 1e-3, "causal-lm": 5e-4}
BATCH = {"classification": 32, "regression": 32, "seq2seq": 16, "causal-lm": 8}


def write(seen: Seen, path: Path, force: bool) -> RunConfig:
    """Write the configuration; it is read again as a run would read it.

    Raises:
        ConfigError: there is a file already, and no `force`.
    """
    if path.exists() and not force:
        raise ConfigError(
            f"{path} is there already: name another file by --out, or write over it with --force."
        )
    text = configuration(seen, path.stem)
    checked = RunConfig.from_dict(parse_yaml(text))
    atomic_write_text(path, text)
    return checked


def configuration(seen: Seen, name: str) -> str:
    """The YAML, with what was seen and other choices as comments."""
    task, rows = seen.chosen.task, seen.rows
    low, high, most = seen.lengths
    lines = [
        _remark(f"Written by `tsqlora init` for {said(seen.source)}: {rows} rows."),
        *(_remark(f"  {column.name}: {column}") for column in seen.columns),
        *(_remark(f"NOTE: {note}") for note in seen.notes),
        "# Train: tsqlora train THIS_FILE. Which labels look wrong: tsqlora score THIS_FILE.",
        "",
        *_remarked(f"model: {_yaml(seen.model)}", _about_model(seen)),
        *_remarked(f"task: {task}", _about_task(seen)),
        "data:",
        f"  train: {_yaml(_plain(seen.source))}",
        *_split_lines(seen),
        *(f"  {key}: {_yaml(value)}" for key, value in seen.chosen.data.items()),
        *_other_lines(seen),
        f"  # {seen.counted}: half of the rows have up to {low}, 99 in 100 up to {high}, the "
        f"longest {most}",
        f"  max_length: {seen.max_length}",
        "quality: {mode: online}  # targets are judged while training; upfront: before; none: not",
        "# reference: trusted.jsonl in it takes rows that you know to be right, apart from train",
        "ranks: {mean_rank: 8}  # the budget: as many parameters as LoRA of rank 8 everywhere",
        "training:  # any key of transformers.TrainingArguments",
        f"  learning_rate: {RATES[task]:.1e}",
        f"  num_train_epochs: {_epochs(rows, BATCH[task])}",
        f"  per_device_train_batch_size: {BATCH[task]}  # lower it if memory runs out",
        f"output: {_yaml('runs/' + name)}",
        "seed: 0",
    ]
    return "\n".join(lines) + "\n"


def _split_lines(seen: Seen) -> list[str]:
    lines = []
    if isinstance(seen.validation, float):
        held = round(seen.validation * seen.rows)
        lines.append(f"  validation: {seen.validation}  # {held} rows of train, by the seed")
    elif seen.validation is not None:
        lines.append(f"  validation: {_yaml(seen.validation)}")
    if seen.test is not None:
        lines.append(f"  test: {_yaml(seen.test)}")
    return lines


def _other_lines(seen: Seen) -> list[str]:
    others, data = seen.chosen.others, seen.chosen.data
    key = "messages" if "messages" in data else "target"
    lines = ["  " + _remark(f"{key}: {seen.chosen.why}")]
    if others:
        lines.append("  " + _remark(f"or {key}: {' | '.join(map(_yaml, others))}"))
    used = str(list(data.values()))
    texts = [c.name for c in seen.columns if c.words > 1 and c.name not in used]
    if texts and isinstance(data.get("text"), str):
        several = (*spec_columns(data["text"]), texts[0])
        template = "\\n".join("{" + name + "}" for name in several)
        lines.append(
            "  " + _remark(f'other text: {", ".join(texts)}; text: "{template}" takes both')
        )
    return lines


def _about_task(seen: Seen) -> str:
    about = {
        "classification": f"{len(seen.classes)} classes: {', '.join(seen.classes[:8])}"
        + (", ..." if len(seen.classes) > 8 else ""),
        "regression": "a number; where numbers stand for kinds: classification",
        "seq2seq": "text to text, by an encoder and a decoder; or causal-lm",
        "causal-lm": _about_text(seen.chosen.data),
    }
    return about[seen.chosen.task]


def _about_text(data: Mapping[str, Any]) -> str:
    if "chat" in data:
        return "a chat by the model's template: text asks, target answers; or chat: false"
    return "a chat" if "messages" in data else "text that goes on"


def _about_model(seen: Seen) -> str:
    few, many, _ = MODELS[seen.chosen.task]
    if seen.model == default_encoder() != NAME:
        return f"{NAME}, which is installed here; stronger: {many}"
    if seen.model in (few, INSTRUCTED[0]):
        return "small and quick; stronger: " + (INSTRUCTED[1] if seen.model != few else many)
    return ""


def _epochs(rows: int, batch: int) -> int:
    """3, or as many (at most 10) as it takes to come to `STEPS`."""
    return int(np.clip(math.ceil(STEPS * batch / max(rows, 1)), 3, 10))


def _plain(source: Source) -> Any:
    return source if isinstance(source, str) else list(source)


def _yaml(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, str) and not value.isprintable():
        return yaml.safe_dump(value, default_style='"', width=math.inf).strip()  # not folded
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.strip().removesuffix("...").strip()


def _remark(text: str) -> str:
    """A comment of one line, whatever the data holds."""
    return "# " + "".join(each if each.isprintable() else " " for each in text)[:300]


def _remarked(line: str, remark: str) -> list[str]:
    """A line under its remark."""
    return [_remark(remark), line] if remark else [line]
