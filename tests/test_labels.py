from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel

import tiny_text as tiny
from tsqlora.errors import DataError

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
