"""What is measured of a pool, on disk in parts: memory does not grow with it, and nothing is lost.

Each part is one Parquet file, written whole or not at all: a column `position` (the sample's row)
beside those measured, matrices as lists of fixed size; sums over its samples lie beside it. Several
processes may write into one folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from tsqlora.artefacts import atomic_file, prepare_folder, remove_temporaries
from tsqlora.columns import column, release
from tsqlora.errors import RunError
from tsqlora.progress import tell
from tsqlora.seals import checksum

logger = logging.getLogger("tsqlora")


class Measured(Protocol):
    """Columns of what was measured of some samples, wherever they are kept."""

    @property
    def names(self) -> list[str]:
        """The columns."""

    def column(self, name: str) -> np.ndarray:
        """A column of numbers in the order of the samples."""

    def blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, values) of a column, some samples at a time, always in the same order."""


class Parts:
    """The parts of one measurement of `samples` samples, of which some may be there already.

    Attributes:
        folder: where they lie.
        samples: N.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples

    def prepare(self, inputs: str) -> None:
        """Keep what is there if it was measured on the same `inputs` (a digest), else clear it."""
        prepare_folder(self.folder, inputs)
        remove_temporaries(self.folder)
        for file in self._files():
            if not _whole(file):
                logger.warning("%s is broken: it is measured again.", file)
                file.unlink()
        if there := len(self.there()):
            tell(f"    going on: {there} parts are measured already")

    def there(self) -> set[int]:
        """The numbers of the parts that are there."""
        return {int(file.stem.removeprefix("part-")) for file in self._files()}

    def write(
        self,
        part: int,
        batches: Sequence[dict[str, np.ndarray]],
        halvings: int,
        sums: dict[str, np.ndarray] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Write a part, the columns of each batch as a group of rows.

        `halvings` (see `memory.Halving`), `seconds` and `sums` lie beside it.
        """
        note = {"halvings": str(halvings), "seconds": str(seconds)}
        final = self.folder / f"part-{part:06}.parquet"
        if sums:
            with atomic_file(_sums(final)) as file:
                save_file(sums, file)
                note["sums"] = str(checksum(file))
        schema = _table(batches[0]).schema.with_metadata(note)
        how = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with (
            atomic_file(final) as file,
            pq.ParquetWriter(file, schema, write_page_checksum=True, **how) as writer,
        ):
            for columns in batches:
                writer.write_table(_table(columns).replace_schema_metadata(note))

    @property
    def halvings(self) -> int:
        """The most halvings of any part."""
        return max((int(_note(file)[b"halvings"]) for file in self._files()), default=0)

    @property
    def seconds(self) -> float:
        """The seconds that all parts took, as far as they can be read."""
        return sum(float(_note(file).get(b"seconds", 0)) for file in self._files())

    @property
    def names(self) -> list[str]:
        """The columns."""
        return pq.read_schema(self._files()[0]).names

    def column(self, name: str) -> np.ndarray:
        """A column of numbers (N) in the order of the samples, in as many bits as they have.

        Raises:
            RunError: a sample is missing.
        """
        kind = pq.read_schema(self._files()[0]).field(name).type.to_pandas_dtype()
        result = column(self.samples, kind)
        seen = np.zeros(self.samples, dtype=bool)
        for positions, values in self.blocks(name):
            result[positions], seen[positions] = values, True
        if not seen.all():
            raise RunError(
                f"{self.folder} lacks {int((~seen).sum())} of {self.samples} samples: remove it "
                "and score again."
            )
        release()
        return result

    def blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, values) of a column, a batch at a time, always in the same order."""
        for file in self._files():
            with pq.ParquetFile(file, page_checksum_verification=True) as opened:
                for group in range(opened.num_row_groups):
                    table = opened.read_row_group(group, columns=["position", name])
                    yield table["position"].to_numpy(), _to_numpy(table[name].combine_chunks())

    def summed(self) -> dict[str, np.ndarray]:
        """The `sums` of all parts added up in their order, whichever process wrote which."""
        total: dict[str, np.ndarray] = {}
        for file in self._files():
            for name, values in load_file(_sums(file)).items():
                total[name] = total.get(name, 0.0) + values.astype(np.float64)
        return total

    def _files(self) -> Sequence[Path]:
        return sorted(self.folder.glob("part-*.parquet"))


class StoredSketches:
    """The column `sketch` of parts, for `convergence.py`.

    Attributes:
        size: numbers in a sketch.
    """

    def __init__(self, parts: Measured) -> None:
        self.parts = parts
        self.size = next(parts.blocks("sketch"))[1].shape[1]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, sketches) a batch at a time."""
        return self.parts.blocks("sketch")


def _sums(part: Path) -> Path:
    return part.with_suffix(".safetensors")


def _note(part: Path) -> dict[bytes, bytes]:
    try:
        return pq.read_schema(part).metadata
    except (OSError, pa.ArrowException):
        return {}


def _whole(part: Path) -> bool:
    try:
        with pq.ParquetFile(part, page_checksum_verification=True) as opened:
            for group in range(opened.num_row_groups):
                opened.read_row_group(group)
        sums = _note(part).get(b"sums")
        return sums is None or int(sums) == checksum(_sums(part))
    except (OSError, pa.ArrowException):
        return False


def _table(columns: dict[str, np.ndarray]) -> pa.Table:
    return pa.table({name: _to_arrow(values) for name, values in columns.items()})


def _to_arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _to_numpy(column: pa.Array) -> np.ndarray:
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    return column.flatten().to_numpy().reshape(len(column), -1)
