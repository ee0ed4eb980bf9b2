"""Encoded samples as compact Arrow, in memory or in a file that is mapped into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from tsqlora.artefacts import atomic_file, atomic_write_text
from tsqlora.columns import release
from tsqlora.mapped import as_dataset, mapped_table

_LISTS = {
    "input_ids": pa.int32(),
    "labels": pa.int32(),
    "attention_mask": pa.int8(),
    "token_type_ids": pa.int8(),
}
"""What the lists hold; Python's integers would take 64 bits each."""


def compact(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table: whole numbers in no more bits than they take."""
    arrays = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        small = pa.list_(_LISTS[name]) if isinstance(values[0], list) else None
        arrays[name] = pa.array(values, type=small)
    return pa.table(arrays)


def in_memory(tables: Iterator[pa.Table]) -> Dataset:
    """All tables, one after the other."""
    return as_dataset(pa.concat_tables(list(tables)))


def on_disk(tables: Iterator[pa.Table], file: Path, inputs: str) -> Dataset:
    """The same in `file`, whose pages are read when wanted and given back when memory is short.

    What is there already is taken as it is where it was made of the same `inputs` (a digest).

    Raises:
        RunError: the disk is full or may not be written to.
    """
    note = file.with_suffix(".inputs")
    if not (file.exists() and note.exists() and note.read_text("utf-8") == _note(file, inputs)):
        note.unlink(missing_ok=True)
        with atomic_file(file) as temporary:
            first = next(tables)
            with pa.ipc.new_stream(str(temporary), first.schema) as writer:
                writer.write_table(first)
                for table in tables:
                    writer.write_table(table)
                    release()  # the rows that were read
        atomic_write_text(note, _note(file, inputs))
    return as_dataset(mapped_table(file))


def _note(file: Path, inputs: str) -> str:
    return f"{inputs} {file.stat().st_size} bytes"
