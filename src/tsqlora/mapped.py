"""Arrow tables in files that are mapped into memory, so that they may be larger than it."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetInfo

from tsqlora.columns import mapping_of

IN_MEMORY = 8 * 2**20
"""Bytes of a table up to which it stays in memory."""


def mapped_table(file: Path) -> pa.Table:
    """The table in an Arrow stream; its pages are read when wanted. The file may be removed."""
    with file.open("rb") as opened:
        mapping = mapping_of(opened.fileno())
    return pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapping))).read_all()


def as_dataset(table: pa.Table, info: DatasetInfo | None = None) -> Dataset:
    """A table as a data set; `datasets` would pickle it, all of it, to give it a fingerprint."""
    return Dataset(table, info=info, fingerprint=secrets.token_hex(8))


class Spool:
    """Tables of one schema to one table, which lies on disk where it is large.

    The file has no name by then, so that nothing is left of it whatever happens.
    """

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        if self._writer is not None:
            self._writer.write_table(table)
            return
        self._parts.append(table)
        if sum(part.nbytes for part in self._parts) > IN_MEMORY:
            self._folder = tempfile.TemporaryDirectory(prefix="tsqlora-")
            self._writer = pa.ipc.new_stream(str(self._file), table.schema)
            for part in self._parts:
                self._writer.write_table(part)
            self._parts.clear()

    def table(self) -> pa.Table:
        """All rows; nothing can be added any more."""
        if self._writer is None or self._folder is None:
            return pa.concat_tables(self._parts)
        self._writer.close()
        with self._folder:
            return mapped_table(self._file)

    @property
    def _file(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "rows.arrow"
