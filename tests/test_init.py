"""`tsqlora init`: the columns it chooses, and that what it writes trains as it is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from runs import write_rows
from tiny_text import CHAT_TEMPLATE, save_bart, save_bert, save_llama
from tsqlora.cli import main
from tsqlora.config import RunConfig
from tsqlora.data import load_dataset
from tsqlora.errors import DataError
from tsqlora.first_config import _yaml
from tsqlora.labels import label_name
from tsqlora.looking import choose_columns, look

Rows = list[dict[str, Any]]
WORDS = ("a good bad film is was the not very dull fine one two three red blue yes no").split()  # noqa: SIM905


def said(chance: random.Random, words: int = 6) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def labelled(chance: random.Random, i: int) -> dict[str, Any]:
    return {"sentence": said(chance), "label": ("good", "bad")[i % 2], "note": said(chance, 2)}


def rated(chance: random.Random, i: int) -> dict[str, Any]:
    return {"sentence1": said(chance), "sentence2": said(chance), "score": chance.random()}


def translated(chance: random.Random, i: int) -> dict[str, Any]:
    return {"id": f"r{i}", "dialogue": said(chance, 9), "summary": said(chance, 3)}


def instructed(chance: random.Random, i: int) -> dict[str, Any]:
    topic = ("red", "blue")[i % 2]
    return {
        "instruction": said(chance),
        "input": said(chance) * (i % 3 == 0),
        "output": said(chance),
        "category": topic,
    }


def chatted(chance: random.Random, i: int) -> dict[str, Any]:
    turns = [("user", said(chance)), ("assistant", said(chance))]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def plain(chance: random.Random, i: int) -> dict[str, Any]:
    return {"text": said(chance, 12)}


def made(make: Callable[[random.Random, int], dict[str, Any]], rows: int = 40) -> Rows:
    chance = random.Random(0)
    return [make(chance, i) for i in range(rows)]


def chatty_llama(folder: Path) -> str:
    return save_llama(folder, CHAT_TEMPLATE)


KINDS = [
    (labelled, save_bert, "classification"),
    (rated, save_bert, "regression"),
    (translated, save_bart, "seq2seq"),
    (instructed, save_llama, "causal-lm"),
    (instructed, chatty_llama, "causal-lm"),
    (chatted, chatty_llama, "causal-lm"),
    (plain, save_llama, "causal-lm"),
]


@pytest.mark.parametrize(("make", "save", "task"), KINDS)
def test_what_init_writes_trains_as_it_is(
    make: Any, save: Any, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "mine.jsonl", made(make))
    model = save(tmp_path / "model")
    assert main(["init", "mine.jsonl", "--model", model]) == 0
    assert RunConfig.from_yaml("mine.yaml").task == task
    fast = ["training.max_steps=2", "quality.adapt_steps=1", "training.disable_tqdm=true"]
    settings = [word for setting in fast for word in ("--set", setting)]
    assert main(["train", "mine.yaml", *settings]) == 0
    assert (tmp_path / "runs/mine/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("row", "task", "data"),
    [
        (labelled, "classification", {"text": "sentence", "target": "label"}),
        (rated, "regression", {"text": ["sentence1", "sentence2"], "target": "score"}),
        (translated, "seq2seq", {"text": "dialogue", "target": "summary"}),
        (instructed, "causal-lm", {"text": "{instruction}\n{input}\n", "target": "output"}),
        (chatted, "causal-lm", {"messages": "messages"}),
        (
            lambda c, i: {
                "id": str(i),
                "conversations": [
                    {"from": "human", "value": said(c)},
                    {"from": "gpt", "value": said(c)},
                ],
            },
            "causal-lm",
            {"messages": "conversations"},
        ),
        (
            lambda c, i: {
                "rejected": [{"role": "assistant", "content": said(c)}],
                "chosen": [{"role": "assistant", "content": said(c)}],
                "prompt": [{"role": "user", "content": said(c)}],
            },
            "causal-lm",
            {"messages": ["prompt", "chosen"]},
        ),
        (plain, "causal-lm", {"text": "text"}),
        (
            lambda c, i: {"text": said(c), "number": 7 * i, "score": 10 * i},
            "regression",
            {"text": "text", "target": "score"},
        ),
        (
            lambda c, i: {"fine_label": i % 8, "coarse_label": i % 2, "text": said(c)},
            "classification",
            {"text": "text", "target": "fine_label"},
        ),
        (
            lambda c, i: {"idx": i, "y": i % 3, "title": said(c, 3), "blurb": said(c, 20)},
            "classification",
            {"text": "title", "target": "y"},
        ),
        (
            lambda c, i: {"blurb": said(c, 20), "other": said(c, 8), "kind": i % 3},
            "classification",
            {"text": "blurb", "target": "kind"},
        ),
        (
            lambda c, i: {"translation": {"en": said(c), "de": said(c)}},
            "seq2seq",
            {"text": "translation.en", "target": "translation.de"},
        ),
    ],
)
def test_columns_are_chosen_by_the_documented_rules(
    row: Any, task: str, data: dict[str, Any], tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", made(row))
    chosen = choose_columns(look(load_dataset(str(file), "data.train")))
    assert (chosen.task, chosen.data) == (task, data)


def test_other_candidates_are_named_in_a_comment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": said(random.Random(i)), "b_label": i % 4, "a_label": i % 2} for i in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["init", "rows.jsonl", "--model", save_bert(tmp_path / "model")]) == 0
    text = (tmp_path / "rows.yaml").read_text()
    assert "# or target: a_label" in text
    assert main(["init", "rows.jsonl", "--target", "a_label", "--out", "a.yaml"]) == 0
    assert RunConfig.from_yaml("a.yaml").data.target == "a_label"


def test_a_file_that_is_there_is_kept_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", made(labelled))
    (tmp_path / "rows.yaml").write_text("mine")
    model = save_bert(tmp_path / "model")
    assert main(["init", "rows.jsonl", "--model", model]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "rows.yaml").read_text() == "mine"
    assert main(["init", "rows.jsonl", "--model", model, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "label"
    assert RunConfig.from_yaml("rows.yaml").data.target == "label"


def test_lengths_are_the_tokenizer_s_and_classes_and_files_beside_are_found(tmp_path: Path) -> None:
    from tsqlora.seeing import see

    rows = made(labelled, 200)
    for name in ("train", "dev", "test"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    seen = see(str(tmp_path / "train.jsonl"), model=save_bert(tmp_path / "model"))
    assert seen.lengths == (8, 8, 8), "six words between <s> and </s>"
    assert seen.classes == ("bad", "good")
    assert (seen.validation, seen.test) == (
        str(tmp_path / "dev.jsonl"),
        str(tmp_path / "test.jsonl"),
    )


def test_splits_that_cannot_be_measured_on_are_not_taken(tmp_path: Path) -> None:
    from tsqlora.seeing import see

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = [{"text": said(random.Random(i)), "label": i % 2} for i in range(40)]
    hidden = [{**row, "label": -1} for row in rows]
    splits = {"train": rows, "validation": rows, "test": hidden}
    DatasetDict(
        {name: Dataset.from_list(each, features=features) for name, each in splits.items()}
    ).save_to_disk(tmp_path / "glue")
    seen = see(str(tmp_path / "glue"), model=save_bert(tmp_path / "model"))
    assert (seen.validation, seen.test) == (f"{tmp_path / 'glue'}[validation]", None)
    assert "is not taken for test" in seen.notes[0]


def test_hostile_names_and_texts_stay_in_their_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, label = "te\nxt: {x", "label\u2028\n: #"
    rows = [
        {text: f"{said(random.Random(i))}\nmodel: evil", label: f"a\nb: {i % 2}"} for i in range(40)
    ]
    write_rows(tmp_path / "odd.jsonl", rows)
    model = save_bert(tmp_path / "model")
    assert main(["init", "odd.jsonl", "--model", model, "--text", label, "--target", label]) == 0
    found = RunConfig.from_yaml("odd.yaml")
    assert (found.model, found.data.target) == (model, label)


def test_missing_values_are_a_note(tmp_path: Path) -> None:
    from tsqlora.first_config import configuration
    from tsqlora.seeing import see

    rows = [*made(labelled), {"sentence": "a film", "label": None, "note": ""}]
    rows[3]["sentence"] = " \t"
    write_rows(tmp_path / "rows.jsonl", rows)
    seen = see(str(tmp_path / "rows.jsonl"), model=save_bert(tmp_path / "model"))
    text = configuration(seen, "rows")
    assert "# NOTE: 'label' is missing in 1 of 41 rows" in text
    assert "# NOTE: 'sentence' is blank in 1 of 41 rows" in text
    assert yaml.safe_load(text)["data"]["target"] == "label"


def test_a_table_without_a_header_and_several_labels_a_row_are_notes(tmp_path: Path) -> None:
    from tsqlora.seeing import see

    model = save_bert(tmp_path / "model")
    rows = [f"{said(random.Random(i))},{'bad' if i % 2 else 'good'}" for i in range(41)]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    seen = see(str(tmp_path / "rows.csv"), model=model)
    assert (seen.rows, seen.chosen.task) == (40, "classification")
    assert [
        note for note in seen.notes if "'good' is the name of the column and of a class" in note
    ]
    several = [{"text": said(random.Random(i)), "labels": ["a", "b"][: i % 3]} for i in range(40)]
    write_rows(tmp_path / "rows.jsonl", several)
    seen = see(str(tmp_path / "rows.jsonl"), model=save_llama(tmp_path / "llama"))
    assert [note for note in seen.notes if "'labels' holds lists" in note]


def test_classes_spelt_in_two_ways_are_a_note(tmp_path: Path) -> None:
    from tsqlora.seeing import see

    rows = [
        {"sentence": said(random.Random(i)), "label": "bad" if i % 2 else "Bad"} for i in range(40)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    seen = see(str(tmp_path / "rows.jsonl"), model=save_bert(tmp_path / "model"))
    assert [note for note in seen.notes if "'Bad' / 'bad'" in note]


def test_data_without_text_is_refused_with_what_is_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"a": i % 2, "b": i / 7} for i in range(20)])
    with pytest.raises(
        DataError, match=r"no column of a \(2 classes\), b \(numbers\) looks like text"
    ):
        choose_columns(look(load_dataset(str(tmp_path / "rows.jsonl"), "data.train")))


def test_instructions_and_answers_are_a_chat_where_the_model_has_a_template(tmp_path: Path) -> None:
    from tsqlora.first_config import configuration
    from tsqlora.seeing import see

    file = str(write_rows(tmp_path / "rows.jsonl", made(instructed)))
    plain = {"text": "{instruction}\n{input}\n", "target": "output"}
    chat = {"text": "{instruction}\n{input}", "target": "output", "chat": True}
    llama, chatty = save_llama(tmp_path / "plain"), chatty_llama(tmp_path / "chat")
    with_template = see(file, model=chatty)
    assert see(file, model=llama).chosen.data == plain
    assert with_template.chosen.data == chat
    assert yaml.safe_load(configuration(with_template, "rows"))["data"]["chat"] is True
    own = see(file, text="{instruction}: ", model=chatty).chosen.data
    assert own == {"text": "{instruction}: ", "target": "output", "chat": True}
    suggested = see(file)
    assert suggested.model.endswith("-Instruct")
    assert suggested.chosen.data == chat
    labelled_too = see(file, task="classification", target="category").chosen.data
    assert labelled_too.keys() == {"text", "target"}
    foreign = [{"prompt": f"что это {i} {said(c)}", "completion": "это не то" * (i + 1)} for i, c in
               enumerate(map(random.Random, range(40)))]  # fmt: skip
    other = see(str(write_rows(tmp_path / "foreign.jsonl", foreign)))
    assert other.model == "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize("make", [instructed, chatted])
def test_of_a_chat_the_template_s_own_words_count_as_length(make: Any, tmp_path: Path) -> None:
    from tsqlora.encoding import encode_chats, render_chat
    from tsqlora.lengths import templated
    from tsqlora.loading import load_tokenizer
    from tsqlora.seeing import see

    file = str(write_rows(tmp_path / "rows.jsonl", made(make)))
    model = chatty_llama(tmp_path / "chat")
    seen, tokenizer = see(file, model=model), load_tokenizer(model, "model")
    texts = templated(load_dataset(file, "data.train"), seen.chosen, tokenizer)
    exact = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text, _ in texts)
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "is good"}]
    (row,) = encode_chats(tokenizer, [render_chat(tokenizer, turns)], 999)
    assert isinstance(row, dict)
    assert exact <= seen.lengths[2] <= exact + 2, "start and end"
    assert len(row["input_ids"]) > len(tokenizer("the film is good")["input_ids"])


def test_dates_are_shown_and_left_aside(tmp_path: Path) -> None:
    days = [datetime(2026, 1, 1 + i % 7) for i in range(60)]
    texts = [f"a text of {i} words" for i in range(60)]
    rows = {"text": texts, "label": ["a", "b"] * 30, "created": days}
    Dataset.from_dict(rows).to_parquet(str(tmp_path / "reviews.parquet"))
    dataset = load_dataset(str(tmp_path / "reviews.parquet"), "data.train")
    chosen = choose_columns(look(dataset))
    assert (chosen.task, chosen.data) == ("classification", {"text": "text", "target": "label"})


def test_whole_decimals_are_class_labels_as_whole_floats_are() -> None:
    assert [label_name(value) for value in (Decimal("3"), Decimal("3.00"), 3.0)] == ["3"] * 3
    for none in (Decimal("3.5"), Decimal("Infinity"), float("inf")):
        with pytest.raises(DataError, match="no class label"):
            label_name(none)


@given(st.text(min_size=1))
def test_any_name_of_a_column_is_one_line_that_yaml_reads_back(name: str) -> None:
    line = _yaml(name)
    assert "\n" not in line
    assert yaml.safe_load(f"text: {line}") == {"text": name}


def test_whole_numbers_written_as_floats_are_the_classes_of_training(tmp_path: Path) -> None:
    rows = [{"text": f"some text {i}", "label": i % 2} for i in range(60)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(
        tmp_path / "test.jsonl", [{**row, "label": float(i % 2)} for i, row in enumerate(rows)]
    )
    out, model = tmp_path / "mine.yaml", save_bert(tmp_path / "model")
    train = str(tmp_path / "train.jsonl")
    assert main(["init", train, "--model", str(model), "--out", str(out)]) == 0
    assert RunConfig.from_yaml(out).data.test is not None


def test_an_empty_chat_is_a_missing_one_and_hides_no_column() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    dataset = Dataset.from_dict({"messages": [turns, [], turns]})
    (column,) = look(dataset)
    assert (column.kind, column.missing) == ("chat", 1)


@pytest.mark.parametrize("name", ["Question: what", "q {en}", "a[0]"])
def test_a_column_that_no_template_can_hold_is_named(name: str) -> None:
    rows = {
        name: [f"what is {i} and why" for i in range(9)],
        "answer": [f"it is {i}" * 3 for i in range(9)],
    }
    with pytest.raises(DataError, match="cannot stand in a template: rename it"):
        choose_columns(look(Dataset.from_dict(rows)), "causal-lm")


def test_test_rows_of_a_class_that_training_lacks_are_not_taken(tmp_path: Path) -> None:
    rows = [{"text": f"some text {i}", "label": i % 2} for i in range(60)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", [{**row, "label": -1} for row in rows])
    model = save_bert(tmp_path / "model")
    out = tmp_path / "mine.yaml"
    assert (
        main(["init", str(tmp_path / "train.jsonl"), "--model", str(model), "--out", str(out)]) == 0
    )
    assert RunConfig.from_yaml(out).data.test is None
    assert "which training lacks" in out.read_text()
