"""What a data set looks like: what each column holds, and which are the input and the target.

The rules, in this order; `choose_columns` says which one it went by.

1. A column of lists of messages (`role` and `content`, or `from` and `value`) is a chat; one named
   as a prompt and one as an answer are a chat together.
2. Beside an instruction, prompt or question, a text column that is named as an answer is
   (`ANSWERS`) is a target to write, for causal-lm.
3. A column that is named as a label is (`TARGETS`: label, class, intent, rating, ...), and holds
   classes or numbers, is the target of a classification or a regression. A name that ends in such a
   word (coarse_label) comes after one that is it; of equals the first column.
4. A text column that is named as an answer, beside other text, is a target to write: for causal-lm,
   or for seq2seq where the name says that it is a summary or translation.
5. A column of classes, whatever its name, is the target; of several the last.
6. Of just two columns of text the second is written from the first.
7. Numbers, whatever the column's name, are the target of a regression; of several the last.
8. Text alone is for a causal language model.

The input is the known pair of columns if there is one (`PAIRS`), else the text column with the
first of the names in `TEXTS`, else the one with the longest texts. Numbers of rows (id, index, a
whole number that no two rows share and that is not named as a label) and columns without a value
are left aside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from tsqlora.chats import as_turn
from tsqlora.data import spec_columns
from tsqlora.errors import DataError
from tsqlora.labels import is_label

TARGETS = (
    "label", "target", "class", "category", "intent", "sentiment", "emotion", "topic", "stance",
    "polarity", "rating", "score", "stars", "grade", "similarity", "type", "tag", "y",
)  # fmt: skip
WRITTEN = (
    "summary", "highlights", "translation", "phonemes", "pronunciation", "reference", "paraphrase",
    "correction", "tgt",
)  # fmt: skip
ANSWERS = ("output", "response", "completion", "answer", "reply", "solution", "chosen", *WRITTEN)
TEXTS = (
    "text", "sentence", "utterance", "content", "review", "comment", "tweet", "message", "query",
    "instruction", "prompt", "question", "problem", "dialogue", "dialog", "document", "article",
    "passage", "body", "source", "src", "input", "title", "word",
)  # fmt: skip
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("text1", "text2"), ("text_a", "text_b"), ("question", "sentence"), ("query", "passage"),
    ("query", "document"), ("question", "passage"),
)  # fmt: skip
BEFORE = ("context", "input", "passage", "history", "system")
"""Columns that belong to an instruction or question beside them."""
ASKED = ("instruction", "prompt", "question", "problem")
CHATS = ("message", "conversation", "chat")
NUMBERED = ("id", "id_", "idx", "index", "uid", "uuid", "guid")
LOOKED_AT = 5000
"""Rows, spread evenly, that lengths and the kinds of columns are told from."""
MOST_CLASSES = 100
LABEL_LENGTH = 60

CHAT, CLASSES, NUMBERS, TEXT, OTHER = "chat", "classes", "numbers", "text", "other"


@dataclass(frozen=True)
class Column:
    """What a column holds: its kind, how many different values, rows without one, mean words."""

    name: str
    kind: str
    distinct: int
    missing: int
    words: float

    def __str__(self) -> str:
        about = {
            CLASSES: f"{self.distinct} classes",
            TEXT: f"text, {self.words:.0f} words on average",
        }
        missing = f", missing in {self.missing} rows" if self.missing else ""
        return about.get(self.kind, self.kind) + missing


@dataclass(frozen=True)
class Chosen:
    """Task, columns as in a configuration's `data`, the rule they were found by, others."""

    task: str
    data: Mapping[str, Any]
    why: str
    others: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether turns are learnt, by a chat template."""
        return bool({"messages", "chat"} & self.data.keys())

    @property
    def columns(self) -> list[str]:
        """The columns that the choice reads."""
        specs = [self.data.get(key) for key in ("text", "target", "messages")]
        flat = [s for spec in specs if spec for s in ([spec] if isinstance(spec, str) else spec)]
        return list(dict.fromkeys(name for spec in flat for name in spec_columns(spec)))


def look(dataset: Dataset) -> list[Column]:
    """What each column but our `id` holds, from at most `LOOKED_AT` rows."""
    every = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), LOOKED_AT)).astype(int))
    seen = dataset.select(every)
    return [_column(dataset, name, seen[name][:]) for name in dataset.column_names if name != "id"]


def _column(dataset: Dataset, name: str, values: Sequence[Any]) -> Column:
    there = [value for value in values if value is not None and value == value]
    missing = dataset.data.column(name).null_count
    if not there:
        return Column(name, OTHER, 0, missing, 0.0)
    if not all(isinstance(value, str | int | float | Decimal) for value in there):
        return _of_lists(dataset, name, there, missing)
    distinct, words = len(set(there)), 0.0
    if isinstance(there[0], str):
        words = sum(len(value.split()) for value in there) / len(there)
    kind = TEXT if isinstance(there[0], str) else NUMBERS
    if isinstance(dataset.features[name], ClassLabel) or isinstance(there[0], bool):
        kind = CLASSES
    elif 2 <= distinct <= min(MOST_CLASSES, max(2, len(there) // 4)) and _could_be_names(there):
        kind, distinct = CLASSES, sum(map(is_label, dataset.unique(name)))
    elif kind == NUMBERS and distinct == len(there) and isinstance(there[0], int):
        kind = NUMBERS if named_as_label(name) else OTHER  # numbers of rows
    return Column(name, kind, distinct, missing, words)


def _of_lists(dataset: Dataset, name: str, there: Sequence[Any], missing: int) -> Column:
    """A column of chats, of which empty ones are missing, or of what is neither text nor number."""
    said = [value for value in there if value != []]
    if not said or not _is_chat(said):
        return Column(name, OTHER, len(there), missing, 0.0)
    lengths = pc.list_value_length(dataset.data.column(name).combine_chunks())
    return Column(name, CHAT, len(said), missing + pc.sum(pc.equal(lengths, 0)).as_py(), 0.0)


def _could_be_names(values: Sequence[Any]) -> bool:
    if isinstance(values[0], str):
        return all(len(value) <= LABEL_LENGTH for value in values)
    return all(float(value).is_integer() for value in values)


def _is_chat(values: Sequence[Any]) -> bool:
    return all(
        isinstance(value, list)
        and value
        and all(as_turn(message) and {"content", "value"} & message.keys() for message in value)
        for value in values
    )


def choose_columns(
    columns: Sequence[Column],
    task: str | None = None,
    text: str | Sequence[str] | None = None,
    target: str | None = None,
) -> Chosen:
    """Task, input and target by the rules above; what is given (`task`, `text`, `target`) stays.

    Raises:
        DataError: no column will do for it.
    """
    usable = [c for c in columns if c.kind != OTHER and c.name.lower() not in NUMBERED]
    chats = [c for c in usable if c.kind == CHAT]
    if chats and target is None and text is None and task in (None, "causal-lm"):
        return _chat(chats)
    chosen, kind, why, others = _target(usable, columns, task, target, text)
    if chosen is None and task not in (None, "causal-lm"):
        raise DataError(f"no column of {_said(columns)} looks like a target of {task}. {_NAME_IT}")
    given = (text,) if isinstance(text, str) else tuple(text or ())
    inputs = given or _inputs(usable, kind, chosen)
    if not inputs:
        raise DataError(f"no column of {_said(columns)} looks like text. {_NAME_IT}")
    data: dict[str, Any] = {"text": text if given else _spec(inputs, kind, chosen)}
    for name in () if given else inputs:
        if set("{}") & set(name) or (set("[:!") & set(name) and data["text"] not in inputs):
            raise DataError(f"the column {name!r} cannot stand in a template: rename it.")
    if chosen is not None:
        data["target"] = chosen
    return Chosen(kind, data, why, others)


def _chat(chats: Sequence[Column]) -> Chosen:
    asked, answers = (_named(chats, names, (CHAT,)) for names in (ASKED, ANSWERS))
    if asked and answers:
        pair = (asked[0].name, answers[0].name)
        why = f"the messages of {pair[0]!r}, and those of {pair[1]!r} after them"
        return Chosen("causal-lm", {"messages": list(pair)}, why, _names(answers[1:]))
    first, *others = dict.fromkeys([*_named(chats, (*CHATS, *ANSWERS), (CHAT,)), *chats])
    why = f"{first.name!r} holds lists of messages with role and content"
    return Chosen("causal-lm", {"messages": first.name}, why, _names(others))


_NAME_IT = "Name it by --text and --target, and the task by --task."


def _target(
    usable: Sequence[Column],
    columns: Sequence[Column],
    task: str | None,
    target: str | None,
    text: str | Sequence[str] | None,
) -> tuple[str | None, str, str, tuple[str, ...]]:
    """Name, task, reason and other candidates."""
    if target is not None:
        known = {column.name: column for column in columns}
        named = known.get(target) or Column(target, TEXT, 0, 0, 0.0)
        return target, task or _task_of(named), "as given", ()
    taken = {text} if isinstance(text, str) else set(text or ())
    free = [c for c in usable if c.name not in taken]
    for found, why in _rules(usable, free):
        if fitting := [c for c in found if task is None or _fits(c, task)]:
            first = fitting[0]
            return (
                first.name,
                task or _task_of(first),
                f"{first.name!r}: {why}",
                _names(fitting[1:]),
            )
    return None, task or "causal-lm", "there is text alone", ()


def _rules(usable: Sequence[Column], free: Sequence[Column]) -> list[tuple[list[Column], str]]:
    """Rules 2 to 7: the columns that each finds, the best first, and its reason."""
    texts = [c for c in usable if c.kind == TEXT]
    answers = _named(free, ANSWERS, (TEXT,)) if len(texts) > 1 or len(free) < len(usable) else []
    asked = _named(usable, ASKED, (TEXT,))
    second = [c for c in texts[1:] if c in free] if len(texts) == 2 else []
    return [
        (answers if asked else [], f"an answer to {asked[0].name!r}" if asked else ""),
        (_named(free, TARGETS, (CLASSES, NUMBERS)), "its name is a label's"),
        (answers, "its name is that of an answer"),
        ([c for c in free if c.kind == CLASSES][::-1], "it holds few different values"),
        (second, "it is the second of two columns of text"),
        ([c for c in free if c.kind == NUMBERS][::-1], "it holds numbers"),
    ]


def _fits(column: Column, task: str) -> bool:
    kinds = {"classification": (CLASSES,), "regression": (NUMBERS, CLASSES)}
    return column.kind in kinds.get(task, (TEXT,))


def _task_of(column: Column) -> str:
    if column.kind != TEXT:
        return "classification" if column.kind == CLASSES else "regression"
    if _ends(column.name) in WRITTEN or "." in column.name or _ends(column.name) not in ANSWERS:
        return "seq2seq"
    return "causal-lm"


def _inputs(usable: Sequence[Column], task: str, target: str | None) -> tuple[str, ...]:
    spoken = [c for c in usable if c.words and c.name != target]
    # few different short texts look like classes
    texts = {c.name.lower(): c.name for c in spoken if c.kind == TEXT or len(spoken) == 1}
    if task in ("classification", "regression"):
        for first, second in PAIRS:
            if first in texts and second in texts:
                return texts[first], texts[second]
    named = _named([c for c in usable if c.name in texts.values()], TEXTS, (TEXT, CLASSES))
    longest = sorted((c for c in usable if c.name in texts.values()), key=lambda c: -c.words)
    first_ones = [c.name for c in named or longest][:1]
    if task not in ("causal-lm", "seq2seq") or target is None or not first_ones:
        return tuple(first_ones)
    full = {c.name for c in usable if not c.missing}
    more = [texts[b] for b in BEFORE if texts.get(b) in full and texts[b] not in first_ones]
    return (*first_ones, *more[:1])


def _spec(inputs: Sequence[str], task: str, target: str | None) -> Any:
    """A column, a pair, or (for generation) a template of them."""
    if task in ("classification", "regression"):
        return inputs[0] if len(inputs) == 1 else list(inputs)
    if len(inputs) == 1 and (task == "seq2seq" or target is None):
        return inputs[0]
    return "\n".join("{" + name + "}" for name in inputs) + "\n" * (task == "causal-lm")


def _named(columns: Sequence[Column], names: Sequence[str], kinds: Sequence[str]) -> list[Column]:
    """Those of the kinds with one of `names`, in that order, then those that end in one."""
    fitting = [c for c in columns if c.kind in kinds]
    whole = sorted(
        (c for c in fitting if _single(c.name.lower()) in names),
        key=lambda c: names.index(_single(c.name.lower())),
    )
    ending = [c for c in fitting if c not in whole and _ends(c.name) in names]
    return [*whole, *ending]


def _ends(name: str) -> str:
    return _single(re.split(r"[\W_]+", name.lower().strip("_"))[-1])


def _single(name: str) -> str:
    """labels, answers to label, answer."""
    known = {*TARGETS, *ANSWERS, *TEXTS, *CHATS}
    return name[:-1] if name.endswith("s") and name[:-1] in known else name


def named_as_label(name: str) -> bool:
    """Whether the name is that of a label (`TARGETS`), or ends in one."""
    return _ends(name) in TARGETS


def _names(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(c.name for c in columns)


def _said(columns: Sequence[Column]) -> str:
    return ", ".join(f"{c.name} ({c})" for c in columns) or "none"
