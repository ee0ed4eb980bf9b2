from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_text as tiny
from tsqlora.errors import DataError
from tsqlora.inputs import Inputs
from tsqlora.labels import label_notes

TEXTS = ["a good film", "bad", "the film was not very good", "dull dull dull one two"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 0, 1, 0], ("0", "1")),
        ([10, 9, 9, 2], ("2", "9", "10")),
        ([1.0, 0.0, 1.0, 0.0], ("0", "1")),
        (["pos", "neg", "neg", "pos"], ("neg", "pos")),
        ([True, False, True, False], ("False", "True")),
    ],
)
def test_classes_are_in_a_stable_order_whatever_the_rows_order(
    bert: str, values: list[Any], names: tuple[str, ...]
) -> None:
    data = {"text": "text", "target": "label"}
    train = tiny.rows(text=TEXTS, label=values)
    for order in (range(4), range(3, -1, -1)):
        task = tiny.task_of(bert, "classification", data, train.select(order))
        assert task.labels == names
        labels = task.encode(train, "data.train")["labels"]
        assert [names[i] for i in labels] == [
            str(int(v)) if isinstance(v, float) else str(v) for v in values
        ]


def test_a_class_label_feature_keeps_its_names_and_numbers(bert: str) -> None:
    train = tiny.rows(text=TEXTS, label=[2, 0, 2, 0])
    train = train.cast_column("label", ClassLabel(names=["zebra", "unused", "ant"]))
    task = tiny.task_of(bert, "classification", {"text": "text", "target": "label"}, train)
    assert task.labels == ("zebra", "unused", "ant")
    assert task.encode(train, "data.train")["labels"] == [2, 0, 2, 0]
    named = tiny.rows(text=TEXTS, label=["ant", "zebra", "unused", "ant"])
    assert task.encode(named, "data.test")["labels"] == [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1, 1], "two classes"),
        ([0.5, 1.5, 1.0], "task: regression"),
        ([i / 10 for i in range(150)], "150 different labels.*task: regression"),
        ([None, None], "no label at all"),
        ([["a"], ["b"]], "lists or records"),
    ],
)
def test_labels_that_make_no_classes_are_refused(
    bert: str, labels: list[Any], message: str
) -> None:
    train = tiny.rows(text=["a"] * len(labels), label=labels)
    with pytest.raises(DataError, match=message):
        tiny.task_of(bert, "classification", {"text": "text", "target": "label"}, train)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("no", "yes"), None),
        (("a b", "ab", "a-b"), None),
        (("0", "1", "10"), None),
        (("No", "no ", "yes"), "'No' / 'no '"),
        (("a  b", "A\u00a0B", "c", "C"), "'a  b' / 'A\\xa0B', 'c' / 'C'"),
        ([x for i in range(7) for x in (f"k{i}", f"K{i}")], "'k4' / 'K4' and 2 more"),
    ],
)
def test_classes_that_differ_in_case_or_spaces_alone_are_told(
    names: tuple[str, ...], told: str | None
) -> None:
    train = tiny.rows(text=[f"{i}" for i in range(len(names))], label=list(names))
    notes = label_notes(train, ["text"], "label", names)
    assert not notes if told is None else f"{told}. They are learnt as" in notes[0]


def test_a_run_warns_of_labels_that_contradict_each_other(
    bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tiny.rows(text=[*TEXTS, TEXTS[0]], label=["bad", "Bad ", "good", "good", "good"])
    rows.remove_columns("id").to_json(tmp_path / "train.jsonl")
    data = {"train": str(tmp_path / "train.jsonl"), "text": "text", "target": "label"}
    with caplog.at_level(logging.WARNING, "tsqlora"):
        task = Inputs(tiny.config(bert, "classification", data)).task
    assert task.labels == ("Bad ", "bad", "good"), "they are told of, not changed"
    assert "'Bad ' / 'bad'" in caplog.text
    assert "2 rows have an input that comes with another label too" in caplog.text


def test_a_blank_label_is_none(bert: str) -> None:
    train = tiny.rows(text=TEXTS, label=["no", "yes", " ", ""])
    task = tiny.task_of(bert, "classification", {"text": "text", "target": "label"}, train)
    assert task.labels == ("no", "yes")
    with pytest.raises(
        DataError, match=r"row 2: 'label' is missing.*\n.*row 3: 'label' is missing"
    ):
        task.encode(train, "data.train")


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([0, 1, 2] * 20 + [-1], True),
        ([0, 1, 2] * 20 + [-1, -1], False),  # more than a tenth of an even share
        ([0, 1] * 20 + [-1, -2], False),  # a scale
        ([0, 1] * 20 + [None], False),
        (["0", "1"] * 20 + ["-1"], False),  # a name
    ],
)
def test_a_rare_label_of_minus_one_is_told_of(labels: list[Any], told: bool) -> None:
    train = tiny.rows(text=[f"{i}" for i in range(len(labels))], label=labels)
    notes = label_notes(train, ["text"], "label", ["0", "1"])
    assert [f"-1 stands in {labels.count(-1)} rows" in note for note in notes] == [True] * told


@settings(max_examples=50)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["a", "b", "A"]), st.sampled_from("xy"), st.integers(-1, 2)),
        min_size=1,
    ),
    names=st.booleans(),
)
def test_inputs_that_come_with_several_labels_are_counted(
    rows: list[tuple[str, str, int]], names: bool
) -> None:
    one, two, n = (list(column) for column in zip(*rows, strict=True))
    train = tiny.rows(n=n, two=two, label_count=one)
    if names:
        train = train.cast_column("n", ClassLabel(names=["k0", "k1", "k2"]))
    labels: dict[tuple[str, str], list[int]] = {}
    for one, two, label in rows:
        if label >= 0 or not names:  # -1 is no label of a ClassLabel
            labels.setdefault((one, two), []).append(label)
    several = [found for found in labels.values() if len(set(found)) > 1]
    notes = label_notes(train, ["label_count", "two"], "n", ["k0", "k1", "k2"])
    note = next((note for note in notes if "an input" in note), "")
    assert bool(note) == bool(several)
    if several:
        said = f"{sum(map(len, several))} rows have an input that comes with another label too, "
        first = sorted(f"k{n}" if names else str(n) for n in set(several[0]))
        assert note.startswith(said)
        assert f"({', '.join(first)}): at most one" in note
