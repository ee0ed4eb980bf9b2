"""What a source names, files, a folder saved by `datasets` or a hub data set, and which rows of it.

Files are read into memory and nothing is written beside them.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDatasetDict, ReadInstruction

from tsqlora.errors import DataError
from tsqlora.mapped import as_dataset
from tsqlora.table_files import READERS, read_tables

Source = str | Sequence[str]
"""One source, or several whose rows follow one another."""

BESIDE = {"validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}
"""What the splits for validation and test may be called."""


def load_source(source: Source, split: str | None) -> Dataset:
    """The rows of `source`; where it holds several splits and names none, those of `split`.

    Raises:
        DataError: there is nothing there, or something in it cannot be read; with file and line.
    """
    named = [os.path.expanduser(each) for each in listed(source)]
    files = [found for each in named for found in source_files(each)]
    if len(named) == 1 or all(source_files(each) for each in named):
        return _typed(said(source), read_tables(files)) if files else _load(named[0], split)
    parts = [load_source(each, split) for each in named]
    try:
        return datasets.concatenate_datasets(parts)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{said(source)} do not fit together: {_first_line(error)}. Let a column hold one "
            "type, and give sets of the same columns."
        ) from None


def listed(source: Source) -> list[str]:
    """The single sources, in their order."""
    return [source] if isinstance(source, str) else list(source)


def said(source: Source) -> str:
    """`source` as messages name it."""
    return ", ".join(listed(source))


def source_files(source: str) -> list[str]:
    """The files that a path or glob names, in the order of their names; none if it names none."""
    if os.path.isfile(source):
        return [source]
    return sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))


def beside(source: str) -> dict[str, str]:
    """Sources of validation and test beside a training file, or among a data set's splits.

    A file with `train` in its name is looked for under the names in `BESIDE` in its place.
    """
    source = os.path.expanduser(source)
    if os.path.isfile(source):
        stem = Path(source).stem
        named = {
            name: str(
                Path(source).with_name(re.sub("train(ing)?", name, stem) + Path(source).suffix)
            )
            for names in BESIDE.values()
            for name in names
        }
        there = [name for name, path in named.items() if path != source and os.path.isfile(path)]
    elif source_files(source) or _parts(source)[1] is not None:
        return {}
    else:
        loaded = _load_saved(source) if os.path.isdir(source) else _load_hub(source, source)
        there = (
            [name for name in loaded if name != "train"] if isinstance(loaded, DatasetDict) else []
        )
        named = {name: f"{source}[{name}]" for name in there}
    found = {}
    for split, names in BESIDE.items():
        if first := [named[name] for name in names if name in there]:
            found[split] = first[0]
    return found


def _load(source: str, split: str | None) -> Dataset:
    name, asked = _parts(source)
    if os.path.isdir(name):
        return _choose_split(_load_saved(name), name, asked, split)
    if asked is not None and Path(name).is_file():
        raise DataError(
            f"{source}: brackets choose rows of a hub data set or a saved folder; of a file leave "
            "them out, and take fewer rows by data.max_train_samples."
        )
    looks_like_path = name.startswith((".", os.sep)) or name.count(os.sep) > 1
    if looks_like_path or Path(name).suffix.lower() in READERS or glob.has_magic(name):
        raise DataError(f"there is no file {name} (from {os.getcwd()}). Check the path.")
    if asked is None and name.count(":") == 2:
        name, _, asked = name.rpartition(":")
    return _choose_split(_load_hub(source, name), name, asked, split)


def _parts(source: str) -> tuple[str, str | None]:
    """What is before a split in brackets (or, of a folder, after a colon), and that split."""
    if found := re.fullmatch(r"(.+?)\[([^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*)\]", source):
        if not os.path.isdir(source):
            return found[1], found[2]
    elif not os.path.isdir(source):
        folder, _, split = source.rpartition(":")
        if folder and os.path.isdir(folder):
            return folder, split
    return source, None


def _load_saved(folder: str) -> Any:
    try:
        return datasets.load_from_disk(folder)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        raise DataError(
            f"{folder} is a folder, but not one saved by datasets (save_to_disk) that can be read. "
            f"For the files in it write a glob such as {os.path.join(folder, '*.jsonl')}."
        ) from None


def _load_hub(source: str, name: str) -> Any:
    hub, _, config = name.partition(":")
    if ":" in config or not hub:
        raise DataError(
            f"{source} is no file; for the hub write name[:config[:split]] or name:config[split]."
        )
    try:
        return datasets.load_dataset(hub, config or None)
    except Exception as error:  # whatever the hub's clients raise, the user can only check these
        raise DataError(
            f"there is no file or folder {source}, and the hub gives no data set of that name: "
            f"{_first_line(error)}. Check the name and the network, or give a local file."
        ) from None


def _choose_split(loaded: Any, name: str, asked: str | None, split: str | None) -> Dataset:
    """The data set itself, or the wanted rows of several splits; a single one needs no name."""
    if isinstance(loaded, IterableDatasetDict):
        raise DataError(f"{name} is streamed; load it without streaming.")
    if isinstance(loaded, Dataset):
        if asked is None:
            return loaded
        raise DataError(f"{name} has no split {asked}. Write {name}.")
    assert isinstance(loaded, DatasetDict)
    names = list(loaded)
    if asked is None and (split in names or len(names) == 1):
        return loaded[split if split in names else names[0]]
    if asked in names:
        return loaded[asked]
    if asked and re.search(r"[+\[]", asked):
        return _rows(loaded, name, asked)
    raise DataError(
        f"{name} has no split {asked or split or 'of its own'}. Write {name}:SPLIT with one of "
        f"{', '.join(names)}, or {name}[{names[0]}[:1000]] for some of its rows."
    )


def _rows(loaded: DatasetDict, name: str, asked: str) -> Dataset:
    """Rows of one split or of several, as `datasets` writes it: train[:10%]+validation."""
    sizes = {split: len(rows) for split, rows in loaded.items()}
    try:
        parts = ReadInstruction.from_spec(asked).to_absolute(sizes)
    except (ValueError, AssertionError, TypeError) as error:
        raise DataError(
            f"{name}[{asked}] names no rows of it: {_first_line(error)}. Its splits are "
            f"{', '.join(loaded)}; write such as train[:1000], train[10%:20%] or train+validation."
        ) from None
    return datasets.concatenate_datasets(
        [loaded[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _typed(source: str, table: pa.Table) -> Dataset:
    try:
        return as_dataset(table)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise DataError(f"{source} has a column that datasets cannot hold: {error}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
