"""Tables on disk: the same rows, whatever their size, and nothing left behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqlora import columns, mapped, table_files
from tsqlora.columns import release
from tsqlora.data import dataset_fingerprint, load_dataset
from tsqlora.mapped import Spool


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    room=st.sampled_from([0, 100, 10**6]),
)
def test_what_is_spooled_is_what_was_added(sizes: list[int], room: int) -> None:
    schema = pa.schema({"text": pa.string(), "label": pa.list_(pa.int32())})
    parts = [
        pa.table({"text": [f"{n} {i}" for i in range(size)], "label": [[i, n]] * size}, schema)
        for n, size in enumerate(sizes)
        for i in [n]
    ]
    spool = Spool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped, "IN_MEMORY", room)
        for part in parts:
            spool.add(part)
    table = spool.table()
    assert table.equals(pa.concat_tables(parts))
    release()
    assert table.equals(pa.concat_tables(parts))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_larger_than_memory_are_read_as_small_ones_and_leave_nothing(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"text {i}", "label": i % 3} for i in range(500)]
    file = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = pa.Table.from_pylist(rows)
        labels = table["label"].cast(pa.string()).dictionary_encode()
        pq.write_table(table.set_column(1, "label", labels), file, row_group_size=50)
    in_memory = load_dataset(str(file), "data.train")
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    monkeypatch.setattr(mapped, "IN_MEMORY", 1000)
    monkeypatch.setattr(table_files, "ROWS_AT_ONCE", 50)
    before = len(columns._open)
    on_disk = load_dataset(str(file), "data.train")
    assert len(columns._open) == before + 1
    assert on_disk.features == in_memory.features
    assert list(on_disk) == list(in_memory)
    release()
    assert dataset_fingerprint(on_disk) == dataset_fingerprint(in_memory)
    assert list((tmp_path / "spool").iterdir()) == []
