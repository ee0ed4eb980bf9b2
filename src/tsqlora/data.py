"""Data sets of sources, every row with a stable id, and rows as text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from string import Formatter
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    DatasetInfo,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
)
from numpy.typing import NDArray

from tsqlora.columns import blocks_of, column
from tsqlora.errors import ConfigError, DataError
from tsqlora.mapped import as_dataset
from tsqlora.sources import Source, load_source, said

_SPLITS = {"data.train": "train", "data.validation": "validation", "data.test": "test"}


def load_dataset(source: Source, where: str) -> Dataset:
    """The data set that `source` names, in memory, with an int64 column `id`.

    `source` is a path or glob of .jsonl, .json, .csv, .tsv or .parquet files (a .csv may have
    semicolons or tabs for its commas), a folder saved by `datasets`, or a hub data set
    `name[:config]`, or a list of these, one after the other. Of a folder or hub data set with
    several splits the one that `where`, the field of the configuration, asks for is taken, unless
    one is named: `name:config:train`, or in brackets with the slices of `datasets`:
    `name:config[train[:10%]+validation]`. A column of records becomes one of each of its fields:
    `translation.en`. `id` is the number of the row in what was loaded, from 0; a column `id` of the
    data is `id_`.

    Raises:
        DataError: there is nothing there, or something in it cannot be read; with file and line.
    """
    try:
        dataset = load_source(source, _SPLITS.get(where))
        if not len(dataset):
            raise DataError(f"{said(source)} holds no rows. Fill it or name another.")
        return _with_ids(dataset.flatten())
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def split_validation(
    dataset: Dataset, fraction: float, seed: int, classes: str | None = None
) -> tuple[Dataset, Dataset]:
    """Split off a random `fraction` for validation; both parts keep the ids and their order.

    Of each class that the column `classes` names a row stays in training.

    Raises:
        DataError: one of the parts would be empty.
    """
    require_map_style(dataset, "data.train")
    rows, held_out = len(dataset), round(fraction * len(dataset))
    if not 0 < held_out < rows:
        raise DataError(
            f"data.validation: {fraction} of {rows} rows leaves {held_out} for validation and "
            f"{rows - held_out} for training. Choose another fraction or name a file."
        )
    order = np.random.default_rng(seed).permutation(rows)
    kept, held = order[held_out:], order[:held_out]
    if isinstance(dataset.features.get(classes), ClassLabel | Value):
        labels = dataset[classes][:]
        known = {labels[i] for i in kept}
        first = {labels[i]: i for i in reversed(held) if labels[i] not in known}
        moved = np.isin(held, [*first.values()])
        kept, held = np.append(kept, held[moved]), held[~moved]
        if not len(held):
            raise DataError(
                f"data.validation: each of the {held_out} rows for it is the only one of its class "
                "that training would have. Choose a larger fraction or name a file."
            )
    return dataset.select(np.sort(kept)), dataset.select(np.sort(held))


def dataset_fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the rows in their order: the same for equal rows, on any machine."""
    require_map_style(dataset, "the data set")
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def require_columns(dataset: Dataset, columns: Iterable[str], where: str) -> None:
    """Check that `dataset` has all `columns`.

    Raises:
        DataError: the columns it lacks, those it has, and the nearest.
    """
    require_map_style(dataset, where)
    known = [name for name in dataset.column_names if name != "id"]
    problems = []
    for name in dict.fromkeys(columns):
        if name == "id" and "id_" in known:
            problems.append(f"{where}: the column 'id' of the data is kept as 'id_'. Write id_.")
        elif name not in dataset.column_names:
            near = get_close_matches(name, known, n=1)
            problems.append(
                f"{where}: there is no column {name!r}; the columns are {', '.join(known)}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
    if problems:
        raise DataError.of(problems)


def spec_columns(spec: str) -> tuple[str, ...]:
    """The columns that `spec` needs: itself, or the fields of a template such as "{question}\\n".

    A spec is a template if it contains "{"; a literal brace is doubled.

    Raises:
        ConfigError: a template that is not made of text and plain {column} fields.
    """
    if "{" not in spec:
        return (spec,)
    return tuple(dict.fromkeys(field for _, field in _parts(spec) if field is not None))


def render(row: Mapping[str, Any], spec: str) -> str:
    """The text of `row` by `spec`, a column or a template; numbers as Python writes them.

    Raises:
        DataError: a value is missing (None or NaN) or not text or a number; with row and field.
    """
    if "{" not in spec:
        return _text(row, spec)
    return "".join(
        literal + (_text(row, field) if field is not None else "")
        for literal, field in _parts(spec)
    )


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        raise DataError(f"row {row.get('id')}: {column!r} is missing. Fill it in or drop the row.")
    if not isinstance(value, int | float | np.number):
        kind = type(value).__name__
        raise DataError(f"row {row.get('id')}: {column!r} holds a {kind}, not text or a number.")
    return str(value)


@cache
def _parts(template: str) -> list[tuple[str, str | None]]:
    """Literal texts, each with the column that follows it or None."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"the template {template!r} is broken: {error}. Double a brace that is meant as such."
        ) from None
    for _, field, form, conversion in parsed:
        if field == "" or form or conversion:
            raise ConfigError(f"the template {template!r} may hold only plain {{column}} fields.")
    if all(field is None for _, field, _, _ in parsed):
        raise ConfigError(f"the template {template!r} names no {{column}}.")
    return [(literal, field) for literal, field, _, _ in parsed]


def require_map_style(dataset: Any, where: str) -> None:
    """Check that `dataset` is a `datasets.Dataset`, whose rows have stable numbers.

    Raises:
        DataError: it is something else.
    """
    if isinstance(dataset, IterableDataset | IterableDatasetDict):
        raise DataError(
            f"{where}: a streamed data set has no row numbers, which scores and draws are kept by. "
            "Load it without streaming: files larger than memory are read through mapped files."
        )
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"{where}: expected a datasets.Dataset, not {type(dataset).__name__}. Choose a split "
            "of several, or make one by Dataset.from_list."
        )


def numbered(dataset: Any) -> NDArray[np.int64] | None:
    """The column `id` of a data set (N), None where it has none that holds whole numbers."""
    feature = getattr(dataset, "features", None) or {}
    kind = getattr(feature.get("id"), "dtype", "")
    if not kind.startswith(("int", "uint")):
        return None
    found, arrow = column(len(dataset), np.int64), dataset.select_columns("id").with_format("arrow")
    for rows in blocks_of(len(dataset)):  # Python's own numbers would take their time, and memory
        block = arrow[rows]["id"]
        if block.null_count:
            return None
        found[rows] = block
    return found


def _with_ids(dataset: Dataset) -> Dataset:
    """`dataset` held in memory (its caches would be written beside the user's files), with ids."""
    if "id" in dataset.column_names:
        name = "id_"
        while name in dataset.column_names:
            name += "_"
        dataset = dataset.rename_column("id", name)
    numbers = column(len(dataset), np.int64)
    for rows in blocks_of(len(dataset)):
        numbers[rows] = np.arange(rows.start, rows.stop)
    table = dataset.with_format("arrow")[:].append_column("id", pa.array(numbers))
    features = Features({**dataset.features, "id": Value("int64")})
    return as_dataset(table, DatasetInfo(features=features))
