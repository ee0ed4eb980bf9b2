"""The demo's data: customer-support messages with intents, written by a seeded grammar.

The phrases stand in ``demo_grammar.yaml``. Validation and test use other fillers than train and
mostly other phrases. A message may mention a second intent in passing; its label is what it wants.

How hard it is: a logistic regression on the embeddings of all-MiniLM-L6-v2, trained on 1,500 rows,
gets 0.87 to 0.91 of the test right with clean labels, 0.82 to 0.85 with a fifth of them wrong.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, str]

CONFUSED = 0.25
"""The share of the wrong labels that are systematic: the intent that the true one is taken for."""
_WORDS = range(5, 46)  # the lengths, in words, that a message may have
_ASIDES = 0.15  # the share of messages that mention another intent in passing
_UNSEEN = 0.6  # the share of validation and test that says it in words that train never has


@dataclass(frozen=True)
class DemoData:
    """Rows ``{"text", "intent"}`` of the three splits, and what was planted in train.

    ``wrong`` holds the row numbers in train whose intent was replaced by another,
    ``duplicates`` those that are lightly edited copies of an earlier row.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    wrong: frozenset[int]
    duplicates: frozenset[int]


def intents() -> tuple[str, ...]:
    """The names of the intents, in the order of the grammar."""
    return tuple(_grammar()["intents"])


def make_demo_data(
    seed: int = 0,
    train: int = 4000,
    validation: int = 400,
    test: int = 1000,
    wrong_share: float = 0.2,
    duplicate_share: float = 0.1,
    validation_wrong_share: float = 0.0,
) -> DemoData:
    """Write the data set of ``seed``, the same on every machine and version of Python.

    Sizes are in rows. Of the wrong labels `CONFUSED` are the intent that the true one is mostly
    taken for, the others are drawn uniformly. The shares change nothing else: the texts
    of a seed are the same whatever share of the labels is wrong.

    Raises:
        ValueError: a share lies outside [0, 1].
    """
    shares = (wrong_share, duplicate_share, validation_wrong_share)
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"wrong and duplicate shares must lie in [0, 1], not {shares}")
    seen: set[str] = set()
    rows, duplicates = _write_train(seed, train, duplicate_share, seen)
    held_out = {
        split: list(_write(size, "held_out", random.Random(f"{seed}/{split}"), seen))
        for split, size in (("validation", validation), ("test", test))
    }
    wrong = _spoil_labels(rows, wrong_share, random.Random(f"{seed}/train labels"))
    _spoil_labels(
        held_out["validation"], validation_wrong_share, random.Random(f"{seed}/validation labels")
    )
    return DemoData(rows, held_out["validation"], held_out["test"], wrong, duplicates)


def write_demo_data(folder: str | Path, data: DemoData) -> None:
    """Write ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` and ``planted.json``.

    The last is ``{"wrong": [int], "duplicates": [int]}``, 0-based rows of train, ascending.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in getattr(data, split))
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    planted = {"wrong": sorted(data.wrong), "duplicates": sorted(data.duplicates)}
    (folder / "planted.json").write_text(json.dumps(planted) + "\n", encoding="utf-8")


@cache
def _grammar() -> Mapping[str, Any]:
    text = files("tsqlora").joinpath("demo_grammar.yaml").read_text(encoding="utf-8")
    grammar: dict[str, Any] = yaml.safe_load(text)
    return grammar


@cache
def _partners() -> Mapping[str, str]:
    """Each intent's most confusable other intent."""
    pairs = [pair for domain in _grammar()["domains"].values() for pair in domain]
    return {one: other for pair in pairs for one, other in (pair, pair[::-1])}


@cache
def _domain(intent: str) -> tuple[str, tuple[str, ...]]:
    """The name of the domain of ``intent``, and the other intents in it."""
    for name, pairs in _grammar()["domains"].items():
        members = [member for pair in pairs for member in pair]
        if intent in members:
            return name, tuple(member for member in members if member != intent)
    raise LookupError(f"demo_grammar.yaml puts the intent {intent} in no domain")


def _write_train(
    seed: int, size: int, duplicate_share: float, seen: set[str]
) -> tuple[list[Row], frozenset[int]]:
    rng = random.Random(f"{seed}/duplicates")
    count = min(round(duplicate_share * size), max(size - 1, 0))
    duplicates = frozenset(rng.sample(range(1, size), count)) if count else frozenset()
    unwritten = _write(size - count, "train", random.Random(f"{seed}/train"), seen)
    rows: list[Row] = []
    originals: list[Row] = []
    for number in range(size):
        if number in duplicates:
            source = rng.choice(originals)
            rows.append({**source, "text": _near_copy(source["text"], rng, seen)})
        else:
            originals.append(next(unwritten))
            rows.append(originals[-1])
    return rows, duplicates


def _write(size: int, split: str, rng: random.Random, seen: set[str]) -> Iterator[Row]:
    """``size`` rows whose texts are not in ``seen``, which they join."""
    for _ in range(size):
        intent = rng.choice(intents())
        text = _message(intent, split, rng)
        while text in seen or len(text.split()) not in _WORDS:
            text = _message(intent, split, rng)
        seen.add(text)
        yield {"text": text, "intent": intent}


def _spoil_labels(rows: list[Row], share: float, rng: random.Random) -> frozenset[int]:
    """Replace the intents of a share of the rows, in place; return their numbers."""
    wrong = rng.sample(range(len(rows)), round(share * len(rows)))
    for turn, number in enumerate(wrong):
        true = rows[number]["intent"]
        others = [intent for intent in intents() if intent != true]
        false = _partners()[true] if turn % round(1 / CONFUSED) == 1 else rng.choice(others)
        rows[number] = {**rows[number], "intent": false}
    return frozenset(wrong)


def _message(intent: str, split: str, rng: random.Random) -> str:
    grammar = _grammar()
    slots = {
        name: _expand(rng.choice(fillers[split]), {}, rng)
        for name, fillers in grammar["slots"].items()
    }
    phrases = grammar["intents"][intent]
    tone = rng.choice(("polite", "plain", "plain", "angry"))
    backgrounds = grammar["backgrounds"]["any"] + grammar["backgrounds"][_domain(intent)[0]]
    core = rng.choice(phrases["says"]["train" if rng.random() > _UNSEEN else split])
    aside = ""
    if rng.random() < _ASIDES:
        core, aside = _with_aside(core, _mention(intent, split, rng), rng)
    parts = [(0.3, grammar["openings"][tone]), (0.12, backgrounds), (1.0, [core]), (1.0, [aside])]
    parts += [(0.4, phrases["asks"][split]), (0.25, grammar["closings"][tone])]
    clauses = [rng.choice(options) for chance, options in parts if rng.random() < chance]
    return _blemish(_join(_expand(clause, slots, rng) for clause in clauses if clause), rng)


def _mention(intent: str, split: str, rng: random.Random) -> str:
    """A clause about another intent, by half the one that ``intent`` is easily taken for."""
    other = _partners()[intent] if rng.random() < 0.5 else rng.choice(_domain(intent)[1])
    mention: str = rng.choice(_grammar()["intents"][other]["mentions"][split])
    return mention


def _with_aside(core: str, mention: str, rng: random.Random) -> tuple[str, str]:
    """Put ``mention`` in front of ``core``, or into a sentence of its own behind it."""
    before, after = _grammar()["before"], _grammar()["after"]
    if rng.random() < 0.5:
        return f"{rng.choice(before).replace('{mention}', mention)} {core}", ""
    return core, rng.choice(after).replace("{mention}", mention)


def _expand(template: str, slots: Mapping[str, str], rng: random.Random) -> str:
    text = re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("|")), template)
    text = re.sub(r"\{(\w+)\}", lambda match: slots[match[1]], text)
    text = re.sub("#", lambda _: str(rng.randrange(10)), text)
    return " ".join(text.split())


def _join(clauses: Iterable[str]) -> str:
    """Clauses as sentences: each begins with a capital and ends with a mark."""
    text = ""
    for clause in clauses:
        begun = clause if text.endswith((",", ":")) else _capital(clause)
        ending = "" if clause[-1] in ".,:!?)" else "."
        text = f"{text} {begun}{ending}".strip()
    return text


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _blemish(text: str, rng: random.Random) -> str:
    """What hands do to a text: typing errors, all small or all capital letters, no full stops."""
    for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 2))):
        text = _typo(text, rng)
    if rng.random() < 0.1:
        text = re.sub(r"[.,!]+(?= |$)", "", text)
    casing = rng.random()
    if casing < 0.15:
        return text.lower()
    return text.upper() if casing > 0.96 else text


def _typo(text: str, rng: random.Random) -> str:
    """Swap, drop or double a letter inside a word of at least four letters."""
    places = [match.start() for match in re.finditer(r"(?<=\w)\w(?=\w\w)", text)]
    if not places:
        return text
    at = rng.choice(places)
    one, two = text[at], text[at + 1]
    return text[:at] + rng.choice((two + one, two, one + one + two)) + text[at + 2 :]


def _near_copy(text: str, rng: random.Random, seen: set[str]) -> str:
    """An edited ``text`` that is not in ``seen``, which it joins."""
    copy = text
    while copy in seen:
        edit = rng.choice(("typo", "typo", "greet", "thank", "unstop"))
        if edit == "typo":
            copy = _typo(copy, rng)
        elif edit == "greet":
            copy = f"Hi {copy}" if not copy.startswith("Hi") else copy
        elif edit == "thank":
            copy = f"{copy} Thanks" if not copy.endswith("Thanks") else copy
        else:
            copy = re.sub(r"[.,!]+(?= |$)", "", copy)
    seen.add(copy)
    return copy
