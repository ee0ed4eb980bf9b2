"""A look at a data set, and what a configuration for it needs: columns, lengths, model, splits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value

from tsqlora.data import load_dataset, require_columns
from tsqlora.errors import DataError
from tsqlora.labels import class_names, label_name, label_notes
from tsqlora.lengths import lengths_of, templated, texts_of
from tsqlora.loading import load_tokenizer
from tsqlora.looking import LOOKED_AT, Chosen, Column, choose_columns, look, named_as_label
from tsqlora.packaged import NAME, default_encoder
from tsqlora.sources import Source, beside, listed

MANY = 20_000
"""Rows from which a larger model is worth its time."""
TENTH = 100
"""Rows from which a tenth is enough for validation; of fewer a fifth is taken."""
MODELS: Mapping[str, tuple[str, str, str]] = {
    "classification": (NAME, "answerdotai/ModernBERT-base", "FacebookAI/xlm-roberta-base"),
    "regression": (NAME, "answerdotai/ModernBERT-base", "FacebookAI/xlm-roberta-base"),
    "seq2seq": ("google/flan-t5-small", "google/flan-t5-base", "google/flan-t5-small"),
    "causal-lm": ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
}
"""For few rows, for many, and for text that is mostly not in the Latin script."""
INSTRUCTED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
"""For chats, and instructions with their answers: these have a chat template."""
LONGEST = {"classification": 512, "regression": 512, "seq2seq": 1024, "causal-lm": 2048}


@dataclass(frozen=True)
class Seen:
    """What was seen of a data set and chosen for it; `notes` are what a person should know."""

    source: Source
    rows: int
    columns: Sequence[Column]
    chosen: Chosen
    classes: tuple[str, ...]
    model: str
    lengths: tuple[int, int, int]
    counted: str
    validation: str | float | None
    test: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def max_length(self) -> int:
        """The 99th percentile of the lengths, rounded up to a multiple of 8."""
        return min(max(16, 8 * math.ceil(self.lengths[1] / 8)), LONGEST[self.chosen.task])

    @property
    def name(self) -> str:
        """A short name of the data set, for files."""
        first = re.split(r"[:\[]", listed(self.source)[0])[0].rstrip("/")
        return re.sub(r"[^\w.-]+", "-", Path(first).stem).strip("-.") or "data"

    def summary(self) -> dict[str, Any]:
        """For a person, and as JSON."""
        middle, high, most = self.lengths
        return {
            "rows": self.rows,
            "columns": {column.name: str(column) for column in self.columns},
            "task": self.chosen.task,
            **self.chosen.data,
            "why": self.chosen.why,
            **({"other candidates": list(self.chosen.others)} if self.chosen.others else {}),
            **({"classes": len(self.classes)} if self.classes else {}),
            self.counted: f"half up to {middle}, 99 in 100 up to {high}, the longest {most}",
            "max_length": self.max_length,
            "model": self.model,
            "validation": self.validation,
            **({"test": self.test} if self.test else {}),
            **({"note": " ".join(self.notes)} if self.notes else {}),
        }


def see(
    source: Source,
    task: str | None = None,
    text: str | Sequence[str] | None = None,
    target: str | None = None,
    model: str | None = None,
) -> Seen:
    """Look at a data set and choose for it what a configuration needs; what is given stays.

    Raises:
        DataError: it cannot be read, or holds nothing that can be trained on.
        ModelError: the tokenizer of a `model` that was given cannot be loaded.
    """
    dataset = load_dataset(source, "data.train")
    columns = look(dataset)
    chosen = choose_columns(columns, task, text, target)
    seen_rows = dataset.select(
        np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), LOOKED_AT)).astype(int))
    )
    texts = texts_of(seen_rows, chosen)
    suggested = model or _suggested(chosen, len(dataset), texts)
    here = model is not None or Path(suggested).is_dir()
    tokenizer = load_tokenizer(suggested, "model") if here else None
    chatty = tokenizer if tokenizer is not None and tokenizer.chat_template else None
    if chatty is not None or suggested in INSTRUCTED:
        chosen = _as_chat(chosen, text is not None)
    if chatty is not None and chosen.is_chat:
        texts = templated(seen_rows, chosen, chatty)
    lengths, counted = lengths_of(texts, chosen, tokenizer)
    notes = _notes(columns, chosen, dataset)
    if suggested in MODELS["seq2seq"] and _foreign(texts):
        notes.append(f"{suggested} knows the Latin script best: set a model of your language.")
    classes: tuple[str, ...] = ()
    if chosen.task == "classification":
        target = chosen.data["target"]
        classes = class_names(dataset, target, "data.train")
        notes.extend(label_notes(dataset, chosen.columns, target, classes))
        if target in classes:
            notes.append(
                f"{target!r} is the name of the column and of a class in it: if the file has no "
                "header give it one, as its first row is taken for that."
            )
    validation, test = _splits(source, len(dataset), chosen, classes, notes)
    return Seen(
        source, len(dataset), columns, chosen, classes, suggested, lengths, counted,
        validation, test, notes,
    )  # fmt: skip


def _suggested(chosen: Chosen, rows: int, texts: Sequence[tuple[str, str]]) -> str:
    few, many, other_script = MODELS[chosen.task]
    if chosen.is_chat or _instructs(chosen):
        return INSTRUCTED[rows >= MANY or _foreign(texts)]
    if _foreign(texts):
        return other_script
    suggested = many if rows >= MANY else few
    return default_encoder() if suggested == NAME else suggested


def _foreign(texts: Sequence[tuple[str, str]]) -> bool:
    """Whether three letters in ten are of another script than Latin."""
    letters = [x for text, target in texts[:200] for x in text + target if x.isalpha()]
    return sum(ord(letter) > 0x24F for letter in letters) > 0.3 * max(1, len(letters))


def _instructs(chosen: Chosen) -> bool:
    """Whether a text is asked for another one, which a chat model answers."""
    return chosen.task == "causal-lm" and "target" in chosen.data


def _as_chat(chosen: Chosen, given: bool) -> Chosen:
    """Text and target as turns; the line break that parts them in plain text is not asked for."""
    if not _instructs(chosen):
        return chosen
    text = str(chosen.data["text"])
    data = {**chosen.data, "text": text if given else text.rstrip("\n"), "chat": True}
    return replace(chosen, data=data)


def _splits(
    source: Source, rows: int, chosen: Chosen, classes: Sequence[str], notes: list[str]
) -> tuple[str | float | None, str | None]:
    """The validation and test that lie beside the source, or a share of its rows."""
    single = listed(source)
    there = beside(single[0]) if len(single) == 1 else {}
    usable = {}
    for split, found in there.items():
        if why := _unusable(found, f"data.{split}", chosen, classes):
            notes.append(f"{found} is not taken for {split}: {why}")
        else:
            usable[split] = found
    fraction: float | None = 0.1 if rows >= TENTH else 0.2
    if not 0 < round(0.2 * rows) < rows:
        fraction = 0.5 if rows > 1 else None
    return usable.get("validation", fraction), usable.get("test")


def _unusable(source: str, where: str, chosen: Chosen, classes: Sequence[str]) -> str:
    """Why a split cannot be measured on, or nothing."""
    try:
        rows = load_dataset(source, where)
        require_columns(rows, chosen.columns, where)
        return _bad_target(rows, chosen.data.get("target"), classes)
    except DataError as error:
        return str(error)


def _bad_target(rows: Dataset, target: Any, classes: Sequence[str]) -> str:
    if target not in rows.column_names:
        return ""
    values, numbered = rows[target][:], isinstance(rows.features[target], ClassLabel)
    if None in values or (numbered and -1 in values):
        return f"{target!r} is missing in some of its rows."
    if not classes or numbered:
        return ""
    new = set(map(label_name, values)) - {*classes}
    return f"{target!r} is {min(new)!r} in some of its rows, which training lacks." if new else ""


def _notes(columns: Sequence[Column], chosen: Chosen, dataset: Dataset) -> list[str]:
    used = chosen.columns
    missing = [
        f"{column.name!r} is missing in {column.missing} of {len(dataset)} rows: fill it in or "
        "drop these rows before training, which stops at them."
        for column in columns
        if column.name in used and column.missing
    ]
    alone = [spec for spec in (chosen.data.get("text"), chosen.data.get("target")) if spec in used]
    blank = [
        f"{name!r} is blank in {count} of {len(dataset)} rows: fill it in or drop these rows "
        "before training, which stops at them."
        for name in alone
        if (count := _blank(dataset, name))
    ]
    lists = [
        f"{column.name!r} holds lists, of which none is learnt: a target is one label, number or "
        "text a row."
        for column in columns
        if column.name not in used and named_as_label(column.name)
        if not isinstance(dataset.features[column.name], Value | ClassLabel)
    ]
    return missing + blank + lists


def _blank(dataset: Dataset, name: str) -> int:
    """Rows of a text column without anything but spaces in them."""
    if dataset.features[name] not in (Value("string"), Value("large_string")):
        return 0
    texts = dataset.select_columns([name]).with_format("arrow")[:][name]
    return pc.sum(pc.equal(pc.utf8_trim_whitespace(texts), "")).as_py() or 0
