"""Data sets: ids that stay with their rows, text that survives, and mistakes that are located."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqlora.data import (
    dataset_fingerprint,
    load_dataset,
    render,
    require_columns,
    spec_columns,
    split_validation,
)
from tsqlora.errors import ConfigError, DataError

texts = st.text(st.characters(exclude_categories=["Cs"]))
LINE_BREAKS = "a\u2028b\u2029c\x85d\x0be\rf\ng"
ROWS = [{"text": "one", "label": 1}, {"text": "two", "label": 0}, {"text": LINE_BREAKS, "label": 1}]
CHAT = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": LINE_BREAKS}],
    [{"role": "user", "content": "ünïcode 😀"}],
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


# What comes out is what was put in


@settings(max_examples=50)
@given(rows=st.lists(st.fixed_dictionaries({"text": texts, "n": st.none() | texts}), min_size=1))
def test_json_lines_keep_every_character(rows: list[dict[str, Any]], scratch: Path) -> None:
    dataset = load_dataset(write_lines(scratch / "any.jsonl", rows), "data.train")
    assert without_ids(dataset) == rows
    assert dataset["id"] == list(range(len(rows)))


@settings(max_examples=50)
@given(cells=st.lists(texts.map(lambda text: f"x{text}"), min_size=1))
def test_csv_keeps_every_character(cells: list[str], scratch: Path) -> None:
    path = scratch / "any.csv"
    quoted = "".join('"' + cell.replace('"', '""') + '",1.5\n' for cell in cells)
    path.write_text(f"text,label\n{quoted}", encoding="utf-8", newline="")
    assert without_ids(load_dataset(str(path), "data.train")) == [
        {"text": cell, "label": 1.5} for cell in cells
    ]


def as_jsonl(folder: Path) -> str:
    return write_lines(folder / "rows.jsonl", ROWS)


def as_json_array(folder: Path) -> str:
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return str(folder / "rows.json")


def as_json_lines_in_json(folder: Path) -> str:
    return write_lines(folder / "lines.json", ROWS)


def as_parquet(folder: Path) -> str:
    Dataset.from_list(ROWS).to_parquet(folder / "rows.PARQUET")
    return str(folder / "rows.PARQUET")


def as_saved_folder(folder: Path) -> str:
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_saved_split(folder: Path) -> str:
    splits = {"dev": Dataset.from_list(ROWS), "train": Dataset.from_list(ROWS[:1])}
    DatasetDict(splits).save_to_disk(folder / "splits")
    return f"{folder / 'splits'}:dev"


def as_glob(folder: Path) -> str:
    write_lines(folder / "part-1.jsonl", ROWS[:1])
    write_lines(folder / "part-2.jsonl", ROWS[1:])
    return str(folder / "part-*.jsonl")


KINDS = [
    as_jsonl, as_json_array, as_json_lines_in_json, as_parquet, as_saved_folder, as_saved_split,
    as_glob,
]  # fmt: skip


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_of_source_gives_the_same_rows(
    write: Callable[[Path], str], tmp_path: Path
) -> None:
    dataset = load_dataset(write(tmp_path), "data.train")
    assert without_ids(dataset) == ROWS
    assert dataset["id"] == [0, 1, 2]
    assert dataset.features["id"].dtype == "int64"


@pytest.mark.parametrize("write", KINDS)
def test_nothing_is_written_beside_the_files(write: Callable[[Path], str], tmp_path: Path) -> None:
    source = write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    load_dataset(source, "data.train").map(lambda row: {"upper": row["text"].upper()})
    assert sorted(tmp_path.rglob("*")) == before


def test_chats_survive(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": chat} for chat in CHAT])
    assert load_dataset(path, "data.train")["messages"][:] == CHAT


def test_a_key_that_a_row_lacks_is_none(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"b": "x"}, {"a": 2.5, "b": None}])
    assert without_ids(load_dataset(path, "data.train")) == [
        {"a": 1, "b": None}, {"a": None, "b": "x"}, {"a": 2.5, "b": None},
    ]  # fmt: skip


def test_a_byte_order_mark_carriage_returns_and_blank_lines_are_let_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert load_dataset(str(path), "data.train")["a"] == [1, 2]


@pytest.mark.parametrize(
    ("ending", "tab"), [("csv", ","), ("tsv", "\t"), ("csv", ";"), ("csv", "\t")]
)
def test_a_table_of_text_has_numbers_where_a_column_holds_nothing_else(
    tmp_path: Path, ending: str, tab: str
) -> None:
    path = tmp_path / f"a.{ending}"
    rows = [
        "word,count,score,zip,flag,empty",
        "NA,1,1,007,true,",
        "null,-2,1e3,10115,false,",
        ",,,,,",
    ]
    path.write_text("\ufeff" + "\n".join(row.replace(",", tab) for row in rows), encoding="utf-8")
    assert without_ids(load_dataset(str(path), "data.train")) == [
        {"word": "NA", "count": 1, "score": 1.0, "zip": "007", "flag": "true", "empty": None},
        {"word": "null", "count": -2, "score": 1e3, "zip": "10115", "flag": "false", "empty": None},
        dict.fromkeys(["word", "count", "score", "zip", "flag", "empty"]),
    ]


def test_a_comma_in_the_header_parts_it_whatever_else_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text;note,"a\n;b"\nx;y,1\n', encoding="utf-8")
    assert without_ids(load_dataset(str(path), "data.train")) == [{"text;note": "x;y", "a\n;b": 1}]
    path.write_text('"a, b";c\n"x; y";1,5\n', encoding="utf-8")
    assert without_ids(load_dataset(str(path), "data.train")) == [{"a, b": "x; y", "c": 1.5}]
    path.write_text('"a; b"\nx; y\n', encoding="utf-8")
    assert without_ids(load_dataset(str(path), "data.train")) == [{"a; b": "x; y"}]


def test_where_semicolons_part_a_table_the_comma_is_the_decimal_point(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a;b;c;d\n-1,5;1,5;007,5;3\n2;1,5,2;1;;\n".replace(";;", ";"), encoding="utf-8")
    assert without_ids(load_dataset(str(path), "data.train")) == [
        {"a": -1.5, "b": "1,5", "c": "007,5", "d": 3},
        {"a": 2.0, "b": "1,5,2", "c": "1", "d": None},
    ]
    path.write_text('a,b\n"1,5",x\n', encoding="utf-8")
    assert load_dataset(str(path), "data.train")["a"] == ["1,5"], "elsewhere it may be anything"


def test_parquet_categories_are_text(tmp_path: Path) -> None:
    table = pa.table({"label": pa.array(["a", "b", "a"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_dataset(str(tmp_path / "a.parquet"), "data.train")["label"] == ["a", "b", "a"]


# Ids


def test_ids_stay_with_their_rows(tmp_path: Path) -> None:
    dataset = load_dataset(write_lines(tmp_path / "a.jsonl", numbered(20)), "data.train")
    odd = dataset.filter(lambda row: row["n"] % 2).shuffle(seed=0).select(range(5))
    assert odd["id"] == odd["n"]


def test_a_column_id_of_the_data_is_kept_beside(tmp_path: Path) -> None:
    rows = [{"id": "train_7", "id_": 1}, {"id": "train_9", "id_": 2}]
    dataset = load_dataset(write_lines(tmp_path / "a.jsonl", rows), "data.train")
    assert (dataset["id"], dataset["id_"], dataset["id__"]) == (
        [0, 1],
        [1, 2],
        ["train_7", "train_9"],
    )


@given(rows=st.integers(2, 40), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1))
def test_a_split_parts_the_rows_the_same_way_every_time(
    rows: int, fraction: float, seed: int
) -> None:
    dataset = Dataset.from_dict({"id": list(range(rows))})
    if not 0 < round(rows * fraction) < rows:
        with pytest.raises(DataError, match=r"data\.validation: .* of \d+ rows leaves"):
            split_validation(dataset, fraction, seed)
        return
    train, validation = split_validation(dataset, fraction, seed)
    assert sorted([*train["id"], *validation["id"]]) == dataset["id"]
    assert len(validation) == round(rows * fraction)
    assert split_validation(dataset, fraction, seed)[1]["id"] == validation["id"]


def test_another_seed_gives_another_split() -> None:
    dataset = Dataset.from_list(numbered(100))
    first, second = (split_validation(dataset, 0.3, seed)[1]["n"] for seed in (0, 1))
    assert first != second


# Fingerprints


def test_equal_rows_have_one_fingerprint_wherever_they_come_from(tmp_path: Path) -> None:
    found = {dataset_fingerprint(load_dataset(write(tmp_path), "data.train")) for write in KINDS}
    assert len(found) == 1


def test_a_fingerprint_does_not_depend_on_how_the_rows_are_stored() -> None:
    dataset = Dataset.from_list(numbered(2500))
    chunked = Dataset(pa.concat_tables([dataset.data.table[:7], dataset.data.table[7:]]))
    picked = dataset.select([*range(2500)][::-1]).select([*range(2500)][::-1])
    reordered = dataset.select_columns(["text", "n"]).with_format("numpy")
    for same in (chunked, picked, reordered):
        assert dataset_fingerprint(same) == dataset_fingerprint(dataset)


@pytest.mark.parametrize(
    "other",
    [
        [{"a": 1, "b": "x"}],
        [{"a": 2, "b": "y"}, {"a": 1, "b": "x"}],
        [{"a": 1, "b": "x"}, {"a": 2, "b": "y "}],
        [{"a": 1, "b": "x"}, {"a": 2, "b": None}],
        [{"a": 1, "c": "x"}, {"a": 2, "c": "y"}],
        [{"a": 1.0, "b": "x"}, {"a": 2.0, "b": "y"}],
    ],
)
def test_other_rows_have_another_fingerprint(other: list[dict[str, Any]]) -> None:
    rows = Dataset.from_list([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
    assert dataset_fingerprint(Dataset.from_list(other)) != dataset_fingerprint(rows)


# Mistakes


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4.5, 5],
        [None, None, None, "x", "y"],
        [1, 2, 3, "x", 5],
        [1, "x", 3, 4, 5],
        [[1], [2], [3], [None], []],
        [{"a": 1}, {"a": 1}, {"b": 1}, {"a": 2}, {}],
    ],
)
def test_lines_read_in_parts_are_those_read_at_once(
    values: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"v": value} for value in values])
    found = []
    for at_once in (1000, 2):
        monkeypatch.setattr("tsqlora.table_files.ROWS_AT_ONCE", at_once)
        try:
            dataset = load_dataset(path, "data.train")
            found.append((dataset.features, dataset.to_list()))
        except DataError as error:
            found.append(str(error))
    assert found[0] == found[1]


BAD_FILES = [
    ("a.jsonl", b'{"a": 1}\n\n{"a": 2\n', "a.jsonl, line 3: not valid JSON, Expecting ','"),
    ("a.jsonl", b'{"a": 1}\n[2]\n', "a.jsonl, line 2: expected an object such as {...}, not [2]"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: JSON that cannot be read"),
    ("a.jsonl", b'{"a": 1}\n\n{"a": "x"}\n{"a": 2}', "a.jsonl, line 3: the value of 'a', 'x', "),
    ("a.jsonl", b'{"a": 9}\n{"a": ' + b"9" * 30 + b"}", "a.jsonl, line 2: the value of 'a', 999"),
    ("a.jsonl", b'{"a": "ok"}\n{"a": "\\ud800"}', "a.jsonl, line 2: the value of 'a', '\\ud800'"),
    ("a.jsonl", b'{"\\ud800": 1}', "a.jsonl cannot be read"),
    ("a.jsonl", b'{"a": "x"}\n{"a": "\xe9"}', "a.jsonl, line 2: not UTF-8 at byte 18 of the "),
    ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl, line 1: not UTF-8 at byte 0"),
    ("a.jsonl", b"", "a.jsonl holds no rows"),
    ("a.jsonl", b"\n\n", "a.jsonl holds no rows"),
    ("a.json", b"[]", "a.json holds no rows"),
    ("a.json", b'[{"a": 1},\n{"a": }]', "a.json, line 2: not valid JSON, Expecting value"),
    ("a.json", b'[{"a": 1}, 2]', "a.json, item 1: expected an object, not 2"),
    ("a.json", b'[{"a": 1}, {"a": [2]}]', "a.json, item 1: the value of 'a', [2], does not fit"),
    ("a.json", b"3", "a.json, line 1: expected an object such as {...}, not 3"),
    ("a.json", b'"rows"', "a.json, line 1: expected an object such as {...}, not 'rows'"),
    ("a.json", b'{"a": ' * 100_000, "a.json, line 1: JSON that cannot be read"),
    ("a.json", b'{"v": "1",\n"rows": [{"a": 1}]}', "a.json is one object, with 'rows' in it"),
    ("a.json", b'{"a": [1, 2], "b": {"0": 3}}', "one object, with 'a', 'b' in it, where"),
    ("a.csv", b"a,b\n1,2\n\n3\n", "a.csv, line 4: 1 fields where the header has 2"),
    ("a.csv", b"a;b\n1;2;3\n", "a.csv, line 2: 3 fields where the header has 2"),
    ("a.csv", b'a,b\n"1,2\n3,4\n', "a.csv, line 3: unexpected end of data"),
    ("a.csv", b'a,b\n"x" y,2\n', "a.csv, line 2: ',' expected after '\"'"),
    ("a.csv", b"a,b,a\n1,2,3\n", "a.csv, line 1: the column 'a' stands twice. Rename one"),
    ("a.csv", b"a,b\n", "a.csv holds no rows"),
    ("a.csv", b"", "a.csv holds no rows"),
    ("a.tsv", b"a\tb\nx\t\xff\n", "a.tsv, line 2: not UTF-8 at byte 6 of the file"),
    ("a.parquet", b"PAR1 no", "a.parquet"),
    ("a.txt", b"hello", "a.txt: unknown kind of file. Save or unpack it as one of .jsonl, .json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_located(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_dataset(str(tmp_path / name), "data.validation")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"data.validation: {tmp_path}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.jsonl", "there is no file nothing.jsonl (from "),
        ("no/part-*.csv", "there is no file no/part-*.csv"),
        ("./folder", "there is no file ./folder"),
        ("no-such-data-set", "there is no file or folder no-such-data-set, and the hub gives no"),
        ("glue:sst2:train", "Check the name and the network, or give a local file."),
        ("a:b:c:d", "for the hub write name[:config[:split]] or name:config[split]"),
        ("glue:sst2[train[:10]]", "the hub gives no data set of that name"),
        ("part-[0-9].jsonl", "there is no file part-[0-9].jsonl"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(source, "data.test")
    assert message in str(caught.value)
    assert str(caught.value).startswith("data.test: ")


@given(st.lists(st.integers(0, 9), min_size=6, max_size=40), st.integers(0, 99))
def test_of_every_class_a_row_stays_in_training(labels: list[int], seed: int) -> None:
    dataset = Dataset.from_dict({"id": [*range(len(labels))], "label": labels})
    drawn = split_validation(dataset, 0.3, seed)[1]["label"][:]
    if all(labels.count(label) == drawn.count(label) == 1 for label in drawn):
        with pytest.raises(DataError, match="the only one of its class"):
            split_validation(dataset, 0.3, seed, "label")
        return
    train, validation = split_validation(dataset, 0.3, seed, "label")
    assert {*train["label"]} == {*labels}
    assert sorted([*train["id"], *validation["id"]]) == dataset["id"][:]
    plain = split_validation(dataset, 0.3, seed)[1]["id"][:]
    moved = {*plain} - {*validation["id"]}
    assert {*validation["id"]} < {*plain} or not moved
    known = {labels[i] for i in range(len(labels)) if i not in plain}
    assert len(moved) == len({*labels} - known)


def test_a_split_leaves_lists_of_labels_to_the_check_that_names_them() -> None:
    dataset = Dataset.from_dict({"id": [*range(9)], "label": [[0, 1]] * 9})
    assert len(split_validation(dataset, 0.3, 0, "label")[1]) == 3


def test_a_slice_of_a_file_is_not_called_missing(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"leave them out, .* data\.max_train_samples"):
        load_dataset(f"{file}[:50]", "data.train")


def test_files_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "1.jsonl", [{"a": 1}])
    write_lines(tmp_path / "2.jsonl", [{"a": "x"}])
    with pytest.raises(DataError, match=r"1\.jsonl, .*2\.jsonl do not fit together: .* a "):
        load_dataset(str(tmp_path / "*.jsonl"), "data.train")


def test_a_folder_of_plain_files_asks_for_a_glob(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not one saved by datasets.*write a glob such as"):
        load_dataset(str(tmp_path), "data.train")


@pytest.mark.parametrize(
    ("where", "rows"), [("data.train", 3), ("data.test", 2), ("quality.reference", None)]
)
def test_a_folder_of_splits_gives_the_one_its_field_asks_for(
    tmp_path: Path, where: str, rows: int | None
) -> None:
    splits = {"train": Dataset.from_list(numbered(3)), "test": Dataset.from_list(numbered(2))}
    DatasetDict(splits).save_to_disk(tmp_path)
    if rows is not None:
        assert len(load_dataset(str(tmp_path), where)) == rows
        return
    with pytest.raises(DataError, match=re.escape("SPLIT with one of train, test")):
        load_dataset(str(tmp_path), where)


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path)
    assert len(load_dataset(str(tmp_path), "data.test")) == len(ROWS), "the only split will do"
    with pytest.raises(DataError, match=r"has no split dev\. Write .*:SPLIT with one of train, or"):
        load_dataset(f"{tmp_path}:dev", "data.test")


def test_streaming_is_refused() -> None:
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    for use in (
        lambda: split_validation(stream, 0.5, 0),
        lambda: dataset_fingerprint(stream),
        lambda: require_columns(stream, ["text"], "data.train"),
    ):
        with pytest.raises(DataError, match="Load it without streaming"):
            use()


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    dataset = load_dataset(write_lines(tmp_path / "a.jsonl", ROWS), "data.train")
    require_columns(dataset, ["text", "label"], "data.train")
    with pytest.raises(DataError) as caught:
        require_columns(dataset, ["txet", "zzz", "text"], "data.train")
    assert str(caught.value).splitlines() == [
        "- data.train: there is no column 'txet'; the columns are text, label. "
        "Did you mean 'text'?",
        "- data.train: there is no column 'zzz'; the columns are text, label.",
    ]


def test_a_column_id_of_the_data_is_not_confused_with_the_row_number(tmp_path: Path) -> None:
    dataset = load_dataset(write_lines(tmp_path / "a.jsonl", [{"id": "x"}]), "data.train")
    with pytest.raises(DataError, match="the column 'id' of the data is kept as 'id_'"):
        require_columns(dataset, ["id"], "data.train")


# Rows as text


@given(values=st.dictionaries(st.text("abc ", min_size=1), texts, min_size=1))
def test_a_template_is_str_format_without_its_conversions(values: dict[str, str]) -> None:
    spec = "{{x}} " + " | ".join(f"{{{name}}}" for name in values) + "\n"
    assert render(values, spec) == spec.format(**values)
    assert spec_columns(spec) == tuple(values)


@given(text=texts)
def test_a_column_is_rendered_as_it_stands(text: str) -> None:
    assert render({"a b": text}, "a b") == text
    assert spec_columns("a b") == ("a b",)


def test_a_column_used_twice_is_needed_once() -> None:
    assert spec_columns("{a} {b} {a}") == ("a", "b")


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (2.5, "2.5"), (True, "True")])
def test_numbers_become_text(value: object, text: str) -> None:
    assert render({"a": value}, "{a}") == text


@pytest.mark.parametrize("spec", ["answer", "Q {question} A {answer}"])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_missing_value_names_row_and_field(spec: str, value: object) -> None:
    row = {"id": 12, "question": "q", "answer": value}
    with pytest.raises(DataError, match=r"row 12: 'answer' is missing\. Fill it in or drop"):
        render(row, spec)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_what_is_not_text_names_row_and_field(value: object) -> None:
    with pytest.raises(DataError, match=r"row 3: 'a' holds a (list|dict|bytes), not text"):
        render({"id": 3, "a": value}, "a")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{a", "is broken"),
        ("{a}}", "is broken"),
        ("{}", "only plain {column} fields"),
        ("{a:>9}", "only plain {column} fields"),
        ("{a!r}", "only plain {column} fields"),
        ("{{a}}", "names no {column}"),
    ],
)
def test_a_template_holds_plain_fields_only(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec_columns(spec)
    assert message in str(caught.value)
    assert repr(spec) in str(caught.value)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["dialogsum", "g2p_en_gb", "gsm8k", "stsb"])
def test_real_files_hold_the_rows_that_their_lines_hold(shared: Path, name: str) -> None:
    path = shared / "data" / name / "test.jsonl"
    lines = path.read_bytes().decode("utf-8").rstrip("\n").split("\n")
    rows = [json.loads(line) for line in lines]
    dataset = load_dataset(str(path), "data.test")
    assert [
        {("id" if key == "id_" else key): value for key, value in row.items() if key != "id"}
        for row in dataset
    ] == rows


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"n": n, "text": f"row {n}"} for n in range(count)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as JSON Lines, their characters unescaped."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", newline="")
    return str(path)


def without_ids(dataset: Dataset) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "id"} for row in dataset]
