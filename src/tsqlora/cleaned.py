"""A data set without some of its rows; of the same kind of file the others keep their bytes."""

from __future__ import annotations

import csv
import fnmatch
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tsqlora.artefacts import atomic_file
from tsqlora.errors import DataError
from tsqlora.sources import Source, listed, load_source, source_files
from tsqlora.table_files import delimiter_of

LINES, TABLES = (".jsonl",), (".csv", ".tsv")
WRITTEN = (*LINES, *TABLES, ".parquet")
"""What can be written, by the ending."""
BOM = b"\xef\xbb\xbf"

Records = Callable[[Path], Iterator[tuple[bool | None, bytes]]]


def check_clean(source: Source, out: Path) -> None:
    """Check that `out` can be written before anything long starts.

    Raises:
        DataError: its ending is not known, or it is one of the source's files, or would be the
            next time, by the source's glob.
    """
    if out.suffix.lower() not in WRITTEN:
        raise DataError(f"--write-clean {out}: the name must end in {', '.join(WRITTEN)}.")
    if out.is_dir():
        raise DataError(f"--write-clean {out} is a folder: name a file in it.")
    if above := next((each for each in out.absolute().parents if each.is_file()), None):
        raise DataError(f"--write-clean {out}: {above} is a file, not a folder.")
    for each in map(os.path.expanduser, listed(source)):
        for file in source_files(each):
            if out.exists() and os.path.samefile(file, out):
                raise DataError(
                    f"--write-clean {out} is the data set itself, which is never written over: "
                    "name another file."
                )
        if fnmatch.fnmatch(os.path.abspath(out), os.path.abspath(each)):
            raise DataError(
                f"--write-clean {out} would be read as a part of {each} the next time: write it "
                "into another folder."
            )


def write_clean(source: Source, split: str, dropped: Collection[int], out: Path) -> int:
    """Write the rows of `source` but those of the numbers `dropped`, in their order.

    From JSON Lines to JSON Lines, and from CSV to CSV (TSV to TSV) of one header, each row is the
    same bytes; Parquet keeps types and metadata. Else rows are converted. Returns the number of
    rows written.

    Raises:
        DataError: CSV files of other columns are to be one, or a value does not fit the kind.
    """
    files = [file for each in listed(source) for file in source_files(os.path.expanduser(each))]
    kinds = {Path(file).suffix.lower() for file in files}
    suffix = out.suffix.lower()
    whole = all(source_files(os.path.expanduser(each)) for each in listed(source))
    alike = files and whole and kinds == {suffix} and (suffix not in TABLES or _one_header(files))
    gone = set(dropped)
    with atomic_file(out) as temporary:
        if not alike:
            return _converted(source, split, gone, temporary, suffix)
        if suffix == ".parquet":
            return _parquet(files, gone, temporary)
        records = _lines if suffix in LINES else _records
        with temporary.open("wb") as opened:
            return _copied(files, records, gone, opened)


def _one_header(files: list[str]) -> bool:
    """Whether all CSV files begin with the same line, or merely name the same columns."""
    headers = []
    for file in map(Path, files):
        found = next((raw for is_row, raw in _records(file) if is_row is None), b"")
        headers.append(found.removeprefix(BOM).strip())
        if _names(headers[-1], file) != _names(headers[0], Path(files[0])):
            raise DataError(f"{file} has other columns than {files[0]}.")
    return len(set(headers)) == 1


def _names(header: bytes, file: Path) -> list[str]:
    lines = header.decode().splitlines()
    return sorted(next(csv.reader(lines, delimiter=delimiter_of(file)), []))


def _copied(files: list[str], records: Records, gone: set[int], opened: BinaryIO) -> int:
    number = written = 0
    ended = True
    for later, file in enumerate(files):
        for line, (is_row, raw) in enumerate(records(Path(file))):
            if is_row and number in gone:
                number += 1
                continue
            if is_row is None and later:
                continue  # the header of a CSV, which is there
            number, written = number + bool(is_row), written + bool(is_row)
            raw = raw.removeprefix(BOM) if later and line == 0 else raw
            opened.write((b"" if ended else b"\n") + raw)
            ended = raw.endswith(b"\n")
    return written


def _lines(path: Path) -> Iterator[tuple[bool | None, bytes]]:
    """(is a row, bytes) of each line; those that are blank to the reader of the data are none."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            yield bool(line.decode("utf-8" if number else "utf-8-sig").strip()), line


def _records(path: Path) -> Iterator[tuple[bool | None, bytes]]:
    """(is a row, or None for the header; bytes) of each record, which may have several lines."""
    csv.field_size_limit(2**31 - 1)
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                taken.append(line)
                yield line.decode("utf-8-sig" if number == 0 else "utf-8")

    first = True
    for fields in csv.reader(lines(), delimiter=delimiter_of(path), strict=True):
        raw = b"".join(taken)
        taken.clear()
        yield (None if first else True) if fields else False, raw
        first = first and not fields


def _parquet(files: list[str], gone: set[int], out: Path) -> int:
    tables = [pq.read_table(file) for file in files]
    table = pa.concat_tables(tables, promote_options="permissive")
    kept = table.filter(pa.array(_kept(len(table), gone)))
    pq.write_table(kept, out)
    return len(kept)


def _converted(source: Source, split: str, gone: set[int], out: Path, suffix: str) -> int:
    rows: Dataset = load_source(source, split)
    kept = rows.select(np.flatnonzero(_kept(len(rows), gone)))
    if suffix == ".parquet":
        kept.to_parquet(str(out))
        return len(kept)
    with out.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, delimiter="\t" if suffix == ".tsv" else ",")
        if suffix in TABLES:
            writer.writerow(kept.column_names)
        for row in kept:
            if suffix in LINES:
                opened.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            else:
                writer.writerow([_cell(value) for value in row.values()])
    return len(kept)


def _cell(value: Any) -> Any:
    """Lists and records as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _kept(rows: int, gone: set[int]) -> np.ndarray:
    kept = np.ones(rows, dtype=bool)
    kept[list(gone)] = False
    return kept
