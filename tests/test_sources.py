"""What a source names: lists, splits and slices, configurations, records, class names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Value
from datasets.arrow_writer import ArrowWriter

from runs import write_rows
from test_data import without_ids
from tsqlora.config import RunConfig
from tsqlora.data import load_dataset
from tsqlora.errors import DataError
from tsqlora.labels import class_names

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})


def numbered(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"text": f"row {i}", "label": i % 2} for i in range(start, stop)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set with two configurations as the hub's client leaves it in its cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sizes = {"plain": {"train": 10, "validation": 4}, "small": {"train": 3}}
    for config, splits in sizes.items():
        folder = tmp_path / "cache" / "some___reviews" / config / "0.0.0" / "abc"
        folder.mkdir(parents=True)
        info = DatasetInfo(features=FEATURES, config_name=config, version="0.0.0")
        info.splits = datasets.SplitDict()
        for split, rows in splits.items():
            file = folder / f"reviews-{split}.arrow"
            with ArrowWriter(path=str(file), features=FEATURES) as writer:
                for row in numbered(0, rows):
                    writer.write(row)
                writer.finalize()
            info.splits.add(datasets.SplitInfo(split, num_examples=rows, dataset_name="reviews"))
        info.write_to_directory(str(folder))
    return "some/reviews"


@pytest.mark.parametrize(
    ("rest", "where", "expected"),
    [
        (":plain", "data.train", range(10)),
        (":plain", "data.validation", range(4)),
        (":plain:validation", "data.train", range(4)),
        (":plain[validation]", "data.train", range(4)),
        (":plain[train[:30%]]", "data.train", range(3)),
        (":plain[train[-2:]+validation[1:3]]", "data.train", [8, 9, 1, 2]),
        (":small", "data.test", range(3)),
    ],
)
def test_a_hub_name_takes_configuration_split_and_slice(
    hub: str, rest: str, where: str, expected: Any
) -> None:
    dataset = load_dataset(hub + rest, where)
    assert dataset["text"][:] == [f"row {i}" for i in expected]
    assert dataset["id"][:] == list(range(len(expected)))
    assert class_names(dataset, "label", where) == ("negative", "positive")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (":plain", "some/reviews:plain has no split test. Write some/reviews:plain:SPLIT with one"),
        (":plain[dev]", "has no split dev"),
        (":plain[dev[:3]]", "names no rows of it"),
        (":plain[train[a]]", "write such as train[:1000]"),
        (":large", "the hub gives no data set of that name"),
    ],
)
def test_what_a_hub_name_lacks_is_named(hub: str, rest: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(hub + rest, "data.test")
    assert message in str(caught.value)


def test_a_list_is_its_sources_one_after_the_other(tmp_path: Path, hub: str) -> None:
    rows = numbered(0, 6)
    first = write_rows(tmp_path / "b.jsonl", rows[:2])
    (tmp_path / "a.csv").write_text("text,label\nrow 2,0\nrow 3,1\n")
    Dataset.from_list(rows[4:]).save_to_disk(tmp_path / "saved")
    files = load_dataset([str(first), str(tmp_path / "*.csv")], "data.train")
    assert without_ids(files) == rows[:4]
    saved = load_dataset(
        [str(first), str(tmp_path / "a.csv"), str(tmp_path / "saved")], "data.train"
    )
    assert without_ids(saved) == rows
    assert saved["id"][:] == list(range(6))


def test_a_list_of_sources_that_do_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    Dataset.from_list([{"label": "x"}]).save_to_disk(tmp_path / "saved")
    file = write_rows(tmp_path / "a.jsonl", numbered(0, 2))
    with pytest.raises(DataError, match=r"data\.train: .*a\.jsonl, .*saved do not fit together"):
        load_dataset([str(file), str(tmp_path / "saved")], "data.train")
    with pytest.raises(DataError, match=r"there is no file .*none\.jsonl"):
        load_dataset([str(file), str(tmp_path / "none.jsonl")], "data.train")


def test_a_configuration_takes_lists_and_writes_them_again(tmp_path: Path) -> None:
    data = {"train": ["~/a.jsonl", "b.csv"], "validation": ["c.csv"], "text": "t", "target": "l"}
    config = RunConfig.from_dict(
        {"model": "m", "task": "classification", "data": data, "output": "o"}
    )
    assert config.data.train == (str(Path("~/a.jsonl").expanduser()), "b.csv")
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert RunConfig.from_yaml(tmp_path / "c.yaml") == config


def test_a_saved_folder_takes_splits_and_slices_in_brackets(tmp_path: Path) -> None:
    splits = {"train": Dataset.from_list(numbered(0, 5)), "dev": Dataset.from_list(numbered(5, 8))}
    DatasetDict(splits).save_to_disk(tmp_path / "all")
    texts = load_dataset(f"{tmp_path / 'all'}[dev+train[:1]]", "data.test")["text"][:]
    assert texts == ["row 5", "row 6", "row 7", "row 0"]


def test_fields_of_records_are_columns_of_their_own(tmp_path: Path) -> None:
    rows = [{"id": i, "translation": {"en": f"one {i}", "de": f"eins {i}"}} for i in range(3)]
    (tmp_path / "wmt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(str(tmp_path / "wmt.jsonl"), "data.train")
    assert set(dataset.column_names) == {"id", "id_", "translation.en", "translation.de"}
    assert dataset["translation.de"][:] == ["eins 0", "eins 1", "eins 2"]


def test_class_names_come_with_a_parquet_file_that_datasets_wrote(tmp_path: Path) -> None:
    made = Dataset.from_list(numbered(0, 4), features=FEATURES)
    made.to_parquet(str(tmp_path / "a.parquet"))
    found = load_dataset(str(tmp_path / "a.parquet"), "data.train")
    assert class_names(found, "label", "data.train") == ("negative", "positive")
