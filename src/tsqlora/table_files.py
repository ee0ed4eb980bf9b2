"""JSON Lines, JSON, CSV, TSV and Parquet files as Arrow tables; errors name the file and the line.

The readers of `datasets` write caches and those of Arrow say little about a bad line.
"""

from __future__ import annotations

import csv
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsqlora.errors import DataError, short
from tsqlora.mapped import Spool

_NUMBERED_TEXT = r"^\s*[+-]?0[0-9xX]"
"""What begins so (007, 0x1f) is a name rather than a number."""
_WITH_COMMA = r"^\s*[+-]?\d+(,\d+)?\s*$"

_DELIMITERS = (",", ";", "\t")
ROWS_AT_ONCE = 10_000
"""Rows that are worked on at a time."""
_UNFIT = (pa.ArrowException, OverflowError, UnicodeEncodeError)


def read_tables(paths: Sequence[str]) -> pa.Table:
    """The rows of all files, one after the other; a column that a file lacks is null there.

    Raises:
        DataError: a file cannot be read, or the files disagree about a column.
    """
    tables = [_read(Path(path)) for path in paths]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{', '.join(paths)} do not fit together: {_reason(error)}.") from None


def _read(path: Path) -> pa.Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        raise DataError(f"{path}: unknown kind of file. Save or unpack it as one of {known}.")
    try:
        return reader(path)
    except (OSError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise DataError(f"{path} cannot be read: {reason}.") from None


def _read_json_lines(path: Path) -> pa.Table:
    """Some rows at a time, as Python's objects take several times the memory of Arrow's columns.

    Where a part looks otherwise than the first, all rows are read at once, to see how they fit.
    """
    spool, schema = Spool(), None
    for rows in _json_rows(path, ROWS_AT_ONCE):
        with suppress(DataError):
            part = _numbered_table(rows, path)
            schema = schema or part.schema
            if part.schema == schema:
                spool.add(part)
                continue
        return _numbered_table(next(_json_rows(path)), path)
    return _table([], path, str) if schema is None else spool.table()


def _json_rows(path: Path, most: int | None = None) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Numbered rows, at most so many at a time."""
    filled = ((number, line) for number, line in _lines(path) if line.strip())
    rows = ((number, _parse(line, f"{path}, line {number}")) for number, line in filled)
    while part := list(islice(rows, most)):
        yield part


def _numbered_table(rows: list[tuple[int, dict[str, Any]]], path: Path) -> pa.Table:
    return _table([row for _, row in rows], path, lambda row: f"line {rows[row][0]}")


def _read_json(path: Path) -> pa.Table:
    """A file with one array of objects; otherwise JSON Lines, as many a .json file is."""
    text = "".join(line for _, line in _lines(path))
    if not text.lstrip().startswith("["):
        _refuse_one_object(path, text)
        return _read_json_lines(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON, {error.msg}.") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, item {number}: expected an object, not {short(row)}.")
    return _table(rows, path, lambda row: f"item {row}")


def _refuse_one_object(path: Path, text: str) -> None:
    """That holds lists or objects: rows under a name, or columns one after the other."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return  # not one value: the lines say what is wrong
    if not isinstance(whole, dict):
        return
    if inner := [name for name, value in whole.items() if isinstance(value, list | dict)]:
        raise DataError(
            f"{path} is one object, with {', '.join(map(repr, inner[:5]))} in it, where rows are "
            "expected. Save a list of objects, [{...}, {...}], or one object a line: the list "
            "alone where the rows are one in it, or `pandas.read_json(...).to_json(..., "
            'orient="records")` where it holds columns.'
        )


def delimiter_of(path: Path) -> str:
    """Of a .tsv the tab; of a .csv the comma or, where that leaves the header whole, the semicolon
    or tab that parts it: spreadsheets write those where the comma is the decimal point."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return next((d for d in _DELIMITERS if len(_header(path, d)) > 1), _DELIMITERS[0])


def _header(path: Path, delimiter: str) -> list[str]:
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter)
    return next(filter(None, reader), [])


def _read_csv(path: Path) -> pa.Table:
    csv.field_size_limit(2**31 - 1)
    delimiter, lines = delimiter_of(path), (line for _, line in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows, numbers = [], []
    try:
        for fields in reader:
            if fields:
                rows.append(fields)
                numbers.append(reader.line_num)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}. A field that holds a quote, a delimiter or "
            'a line break goes in double quotes, with "" for a quote in it.'
        ) from None
    header = rows.pop(0) if rows else []
    if doubled := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}, line 1: the column {doubled[0]!r} stands twice. Rename one.")
    for fields, line in zip(rows, numbers[1:], strict=True):
        if len(fields) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(fields)} fields where the header has {len(header)}. A "
                "field that holds a delimiter goes in double quotes."
            )
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    arrays = [_numbers_or_text(column, delimiter == ";") for column in columns]
    return pa.table(arrays, names=header)


def _read_parquet(path: Path) -> pa.Table:
    try:
        file, spool = pq.ParquetFile(path), Spool()
        plain = [
            pa.field(f.name, f.type.value_type) if pa.types.is_dictionary(f.type) else f
            for f in file.schema_arrow
        ]
        schema = pa.schema(plain, metadata=file.schema_arrow.metadata)
        spool.add(schema.empty_table())
        for rows in file.iter_batches(ROWS_AT_ONCE):
            spool.add(pa.Table.from_batches([rows]).cast(schema))
        return spool.table()
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is not a Parquet file that can be read: {_reason(error)}."
        ) from None


READERS: Mapping[str, Callable[[Path], pa.Table]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""How a file is read, by its ending."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, ended by "\\n" alone: a text may hold U+2028; without a BOM."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 at byte {start + error.start} of the file. "
                    "Save it as UTF-8."
                ) from None
            start += len(line)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON, {error.msg} at column {error.colno}. "
            "A line is one JSON object."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that cannot be read, {error}.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object such as {{...}}, not {short(row)}.")
    return row


def _table(rows: list[dict[str, Any]], path: Path, place: Callable[[int], str]) -> pa.Table:
    """Rows as columns; what a row does not have is null."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column(name, rows, path, place) for name in names})


def _column(
    name: str, rows: list[dict[str, Any]], path: Path, place: Callable[[int], str]
) -> pa.Array:
    values = [row.get(name) for row in rows]
    try:
        return pa.array(values)
    except _UNFIT as error:
        end = bisect_left(range(len(values) + 1), True, key=lambda n: not _fits(values[:n]))
        raise DataError(
            f"{path}, {place(end - 1)}: the value of {name!r}, {short(values[end - 1])}, does not "
            f"fit those before it ({_reason(error)}). Let a column hold one type."
        ) from None


def _fits(values: list[Any]) -> bool:
    with suppress(*_UNFIT):
        pa.array(values)
        return True
    return False


def _numbers_or_text(cells: Sequence[str], comma: bool) -> pa.Array:
    """Whole numbers, else numbers, `comma` being their decimal point, else text; an empty cell is
    null."""
    text = pa.array([cell or None for cell in cells], pa.string())
    if text.null_count == len(text):
        return pa.nulls(len(text))
    if pc.any(pc.match_substring_regex(text, _NUMBERED_TEXT)).as_py():
        return text
    with_comma = comma and pc.all(pc.match_substring_regex(text, _WITH_COMMA)).as_py()
    numbers = pc.replace_substring(text, ",", ".") if with_comma else text
    for kind in (pa.int64(), pa.float64()):
        with suppress(pa.ArrowInvalid):
            return numbers.cast(kind)
    return text


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
