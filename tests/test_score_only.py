"""`tsqlora score` for people: without YAML, a ranked CSV, a cleaned data set."""

from __future__ import annotations

import csv
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from runs import causal_run, classification_run, write_rows
from tiny_text import CHAT_TEMPLATE, save_bert, save_llama
from tsqlora.cleaned import check_clean, write_clean
from tsqlora.cli import main
from tsqlora.credibility import Credibility
from tsqlora.data import load_dataset
from tsqlora.errors import DataError
from tsqlora.quality import QualityScores
from tsqlora.ranked import COLUMNS, cell, likely_wrong
from tsqlora.score_only import (
    BATCH,
    EPOCHS,
    LARGE,
    LARGE_EPOCHS,
    LEAST_STEPS,
    MOST_EPOCHS,
    MOST_STEPS,
    adaptation_steps,
    score_config,
)
from tsqlora.seeing import see

WORDS = ("film", "is", "was", "the", "very", "one", "two", "three", "red", "blue")


def reviews(rows: int = 160, wrong: int = 16) -> tuple[list[dict[str, Any]], set[int]]:
    """Rows whose label is told by a word, some of them wrong."""
    chance = random.Random(0)
    found, planted = [], set(chance.sample(range(rows), wrong))
    for i in range(rows):
        label = i % 2
        text = " ".join([*chance.choices(WORDS, k=4), ("bad", "good")[label]])
        found.append({"sentence": text, "label": label ^ (i in planted)})
    return found, planted


def ranked(run: Path) -> list[dict[str, str]]:
    with (run / "ranked.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_data_alone_are_scored_ranked_and_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, planted = reviews()
    file = write_rows(tmp_path / "data.jsonl", rows)
    model = save_bert(tmp_path / "model")
    arguments = ["score", "data.jsonl", "--text", "sentence", "--target", "label"]
    fast = ["--model", model, "--set", "training.learning_rate=0.02"]
    quiet = ["--set", "training.disable_tqdm=true"]
    assert main([*arguments, *fast, *quiet, "--write-clean", "out.jsonl", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    table = ranked(Path("runs/score-data"))
    assert tuple(table[0]) == COLUMNS
    assert (tmp_path / "runs/score-data/ranked.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    assert {int(row["id"]) for row in table} == set(range(160))
    first = {int(row["id"]) for row in table[: len(planted)]}
    assert len(first & planted) >= 12, "most of the planted ones come first"
    marked = [row["likely_wrong"] == "yes" for row in table]
    assert marked == sorted(marked, reverse=True)
    losses = [float(row["loss"]) for row in table if row["likely_wrong"]]
    assert losses == sorted(losses, reverse=True)
    assert table[0]["prediction"] != table[0]["target"]
    assert f"the model says {table[0]['prediction']}" in table[0]["why"]
    assert f"right with probability {float(table[0]['credibility']):.2f}" in table[0]["why"]
    scores = QualityScores.from_parquet("runs/score-data/scores.parquet")
    gone = set(scores.ids[likely_wrong(scores)].tolist())
    assert gone
    assert len(gone) == told["rows dropped"] == told["likely wrong"]
    lines = file.read_bytes().splitlines(keepends=True)
    kept = b"".join(line for i, line in enumerate(lines) if i not in gone)
    assert (tmp_path / "out.jsonl").read_bytes() == kept


def test_chats_are_judged_by_a_model_as_it_is_and_plain_texts_after_an_adaptation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    rows = [
        {name: " ".join(chance.choices(WORDS, k=5)) for name in ("instruction", "output")}
        for _ in range(60)
    ]
    write_rows(tmp_path / "asked.jsonl", rows)
    plain, chatty = save_llama(tmp_path / "plain"), save_llama(tmp_path / "chatty", CHAT_TEMPLATE)
    adapted = score_config(see("asked.jsonl", model=plain), None, [])
    as_it_is = score_config(see("asked.jsonl", model=chatty), None, [])
    assert (adapted.data.chat, as_it_is.data.chat) == (False, True)
    assert (adapted.quality.adapt_steps, as_it_is.quality.adapt_steps) == (adaptation_steps(60), 0)
    for config in (adapted, as_it_is):
        training = config.training
        at_once = training["per_device_train_batch_size"]
        assert at_once * training["gradient_accumulation_steps"] == BATCH
    assert main(["score", "asked.jsonl", "--model", chatty, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "the model does not know the task yet" in told["verdict"]
    assert told["likely wrong"] == 0
    cost = json.loads(Path("runs/score-asked/metrics.json").read_text())["cost"]
    assert cost["scoring_passes"] == len(rows), "two forwards each, and no step"


def test_a_configuration_leaves_a_ranked_csv_and_drops_so_many_rows_as_are_asked_for(
    tmp_path: Path,
) -> None:
    config = classification_run(tmp_path)
    out = tmp_path / "clean.parquet"
    drop = ["--write-clean", str(out), "--drop", "10%"]
    assert main(["score", str(config), *drop]) == 0
    table = ranked(tmp_path / "run")
    kept = pq.read_table(out)["text"].to_pylist()
    source = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").open()]
    gone = {int(row["id"]) for row in table[:12]}
    assert kept == [text for i, text in enumerate(source) if i not in gone]
    assert table[0]["target"].startswith("class ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.jsonl", "--write-clean", "train.jsonl"], "is the data set itself"),
        (["train.jsonl", "--write-clean", "linked.jsonl"], "is the data set itself"),
        (["*.jsonl", "--write-clean", "clean.jsonl"], "would be read as a part of"),
        (["train.jsonl", "--write-clean", "clean.xlsx"], "must end in .jsonl, .csv, .tsv"),
        (["train.jsonl", "--drop", "3"], "name its file"),
        (["train.jsonl", "--write-clean", "c.csv", "--drop", "x"], "a number of rows"),
        (["config.yaml", "--text", "text"], "--text is for data without a configuration"),
        (["config.yaml", "train.jsonl"], "one configuration, or data files alone"),
        (["train.jsonl", "--target", "lable"], "Did you mean 'label'"),
    ],
)
def test_mistakes_are_told_before_anything_long(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    classification_run(tmp_path)
    os.symlink("train.jsonl", "linked.jsonl")
    before = (tmp_path / "train.jsonl").read_bytes()
    model = [] if "config.yaml" in arguments else ["--model", str(tmp_path / "model")]
    assert main(["score", *arguments, *model]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert not (tmp_path / "runs").exists()


# A cell is never a formula


@pytest.mark.parametrize(
    "text", ["=1+1", "+SUM(A1)", "-2+3", "@x", "\t=1", " =cmd|' /C calc'!A0", "\r=1", "＝1", "\n=2"]
)
def test_what_a_spreadsheet_would_run_is_quoted(text: str) -> None:
    assert cell(text).startswith("'")


@pytest.mark.parametrize("text", ["plain", "-2.5", "+1e-3", "a=b", "", "'quoted"])
def test_what_it_would_not_run_stays(text: str) -> None:
    assert cell(text) == text


@given(st.text())
def test_no_cell_begins_as_a_formula_or_holds_what_a_sheet_cannot(text: str) -> None:
    made = cell(text)
    assert not made.lstrip().startswith(("=", "@"))
    assert "\x00" not in made
    assert len(cell("x" * 50_000)) < 32_767


# The other rows keep their bytes

ODD = 'text,label\r\n"a, ""b""\nc",1\n\nplain,2\n"\u2028 ü",3'


@pytest.mark.parametrize("ending", ["", "\n"])
def test_rows_of_csv_keep_their_quotes_line_breaks_and_order(tmp_path: Path, ending: str) -> None:
    source, out = tmp_path / "a.csv", tmp_path / "b.csv"
    source.write_bytes(b"\xef\xbb\xbf" + (ODD + ending).encode())
    assert write_clean(str(source), "train", [], out) == 3
    assert out.read_bytes() == source.read_bytes(), "nothing dropped, nothing changed"
    assert write_clean(str(source), "train", [0], out) == 2
    rest = ODD.replace('"a, ""b""\nc",1\n', "") + ending
    assert out.read_bytes() == b"\xef\xbb\xbf" + rest.encode()


def test_rows_of_a_csv_that_semicolons_part_keep_them(tmp_path: Path) -> None:
    source, out = tmp_path / "a.csv", tmp_path / "b.csv"
    source.write_bytes(b'text;label\r\n"a; ""b""\nc";1\r\nplain, yes;2\r\n')
    assert write_clean(str(source), "train", [0], out) == 1
    assert out.read_bytes() == b"text;label\r\nplain, yes;2\r\n"


@settings(max_examples=40)
@given(rows=st.lists(st.tuples(st.text(), st.integers()), min_size=1, max_size=12), data=st.data())
def test_the_rows_that_are_left_are_the_loaded_ones(
    rows: list[tuple[str, int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("clean")
    usable = [(text.encode("utf-8", "replace").decode(), n % 2**31) for text, n in rows]
    written = [{"text": text, "n": n} for text, n in usable]
    source = write_rows(folder / "a.jsonl", written)
    gone = data.draw(st.sets(st.integers(0, len(rows) - 1), max_size=len(rows) - 1))
    expected = [row for i, row in enumerate(written) if i not in gone]
    for name in ("b.jsonl", "b.parquet"):
        write_clean(str(source), "train", gone, folder / name)
        found = load_dataset(str(folder / name), "data.train").remove_columns("id")
        assert found.to_list() == expected


def test_parquet_keeps_types_and_metadata_and_files_become_one(tmp_path: Path) -> None:
    table = pa.table({"id": pa.array([5, 6], pa.int16()), "text": ["a", "b"]})
    table = table.replace_schema_metadata({"mine": "yes"})
    pq.write_table(table, tmp_path / "a.parquet")
    assert write_clean(str(tmp_path / "a.parquet"), "train", [0], tmp_path / "b.parquet") == 1
    assert pq.read_table(tmp_path / "b.parquet").equals(table.slice(1), check_metadata=True)
    for name, rows in (("1", "x,1\n"), ("2", "y,2\n")):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows)
    both = [str(tmp_path / "1.csv"), str(tmp_path / "2.csv")]
    assert write_clean(both, "train", [0], tmp_path / "all.csv") == 1
    assert (tmp_path / "all.csv").read_text() == "text,label\ny,2\n"
    (tmp_path / "2.csv").write_text("other,label\ny,2\n")
    with pytest.raises(DataError, match="has other columns than"):
        write_clean(both, "train", [], tmp_path / "all.csv")


def test_files_that_begin_with_a_mark_of_their_encoding_become_one(tmp_path: Path) -> None:
    for ending, rows in {
        "csv": ("text,label\na,1\n", "text,label\nb,2\nc,3\n"),
        "jsonl": (
            '{"text": "a", "label": 1}\n',
            '{"text": "b", "label": 2}\n{"text": "c", "label": 3}\n',
        ),
    }.items():
        both = [tmp_path / f"{name}.{ending}" for name in "12"]
        for path, text in zip(both, rows, strict=True):
            path.write_text(text, encoding="utf-8-sig")
        out = tmp_path / f"out.{ending}"
        assert write_clean([*map(str, both)], "train", [1], out) == 2
        assert load_dataset(str(out), "data.train")["text"][:] == ["a", "c"]


def test_csv_files_whose_columns_stand_in_another_order_become_one(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("text,label\na,x\n")
    (tmp_path / "2.csv").write_text("label,text\ny,b\nz,c\n")
    both = [str(tmp_path / "1.csv"), str(tmp_path / "2.csv")]
    assert write_clean(both, "train", [1], tmp_path / "all.csv") == 2
    assert (tmp_path / "all.csv").read_text() == "text,label\na,x\nc,z\n"


@pytest.mark.parametrize("blank", ["\u00a0", "\u3000", "\u0085", " \t"])
def test_a_line_of_any_space_is_no_row_to_either_side(tmp_path: Path, blank: str) -> None:
    lines = ['{"text": "a"}', blank, '{"text": "b"}', '{"text": "c"}']
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = load_dataset(str(source), "data.train")["text"][:]
    write_clean(str(source), "train", [1], tmp_path / "out.jsonl")
    kept = load_dataset(str(tmp_path / "out.jsonl"), "data.train")["text"][:]
    assert kept == [rows[0], *rows[2:]] == ["a", "c"]


def test_a_file_in_the_way_is_told_before_scoring(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "train.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"train\.jsonl is a file, not a folder"):
        check_clean(str(source), source / "clean.jsonl")


def test_a_saved_folder_is_written_with_its_records_and_own_ids(tmp_path: Path) -> None:
    rows = [{"id": 7, "pair": {"en": "a"}, "n": None}, {"id": 8, "pair": {"en": "b"}, "n": 1}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    write_clean(str(tmp_path / "saved"), "train", [1], tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").open()] == rows[:1]
    write_clean(str(tmp_path / "saved"), "train", [0], tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == 'id,pair,n\n8,"{""en"": ""b""}",1\n'


def test_a_name_that_differs_from_the_source_is_let_pass(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "train.jsonl", [{"a": 1}])
    check_clean(str(source), tmp_path / "clean.jsonl")
    check_clean("some/hub-name:config", tmp_path / "clean.jsonl")


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_larger_pool_is_never_adapted_to_for_fewer_steps(first: int, second: int) -> None:
    few, many = sorted((first, second))
    assert adaptation_steps(few) <= adaptation_steps(many)


@given(st.integers(1, 10**7))
def test_every_row_is_passed_once_at_least_and_a_few_times_at_most(rows: int) -> None:
    epoch = math.ceil(rows / BATCH)
    assert epoch <= adaptation_steps(rows) <= max(MOST_EPOCHS * epoch, LEAST_STEPS)


def test_small_pools_reach_the_least_steps_and_large_ones_get_an_epoch_more() -> None:
    assert adaptation_steps(20 * BATCH) == LEAST_STEPS
    assert adaptation_steps(100 * BATCH) == EPOCHS * 100
    assert adaptation_steps(LARGE) == LARGE_EPOCHS * LARGE // BATCH
    assert adaptation_steps(5000 * BATCH) == MOST_STEPS


def test_a_text_that_looks_wrong_is_said_to_go_with_other_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubted(own: np.ndarray, _: np.ndarray) -> Credibility:
        return Credibility(np.linspace(0, 1, len(own)), 0.5, "about 50% of the targets look wrong")

    monkeypatch.setattr("tsqlora.quality.from_pairs", doubted)
    config = causal_run(tmp_path, 100, **{"training.save_strategy": "no"})
    assert main(["score", str(config)]) == 0
    first, *_, last = ranked(tmp_path / "run")
    assert first["likely_wrong"] == "yes"
    told = f"right with probability {float(first['credibility']):.2f}"
    assert first["why"].endswith(f"{told}: it goes with other inputs as well")
    assert "inputs" not in last["why"]
