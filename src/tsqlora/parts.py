"""What is measured of a pool, on disk in parts: memory does not grow with it, and nothing is lost.

Each part is one Parquet file, written whole or not at all: a column `position` (the sample's row)
beside those measured, matrices as lists of fixed size; sums over its samples lie beside it. Several
processes may write into one folder.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from tsqlora.artefacts import atomic_file, atomic_write_json, is_temporary, read_json
from tsqlora.errors import RunError

logger = logging.getLogger("tsqlora")


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
        note = self.folder / "inputs.json"
        if not (note.exists() and read_json(note).get("inputs") == inputs):
            self.remove()
            atomic_write_json(note, {"inputs": inputs})
        for left in filter(is_temporary, self.folder.iterdir()):
            left.unlink()
        if there := len(self.there()):
            logger.info("    going on: %d parts are measured already", there)

    def there(self) -> set[int]:
        """The numbers of the parts that are there."""
        return {int(file.stem.removeprefix("part-")) for file in self._files()}

    def write(
        self,
        part: int,
        columns: dict[str, np.ndarray],
        halvings: int,
        sums: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Write a part; `halvings` (see `memory.Halving`) is kept beside it, and so are `sums`."""
        if sums:
            with atomic_file(self.folder / f"part-{part:06}.safetensors") as file:
                save_file(sums, file)
        table = pa.table({name: _to_arrow(values) for name, values in columns.items()})
        table = table.replace_schema_metadata({"halvings": str(halvings)})
        with atomic_file(self.folder / f"part-{part:06}.parquet") as file:
            pq.write_table(
                table, file, compression="none", use_dictionary=False, write_statistics=False
            )

    @property
    def halvings(self) -> int:
        """The most halvings of any part."""
        notes = [pq.read_schema(file).metadata[b"halvings"] for file in self._files()]
        return max(map(int, notes), default=0)

    @property
    def names(self) -> list[str]:
        """The columns."""
        return pq.read_schema(self._files()[0]).names

    def column(self, name: str) -> np.ndarray:
        """A column of numbers (N) in the order of the samples.

        Raises:
            RunError: a sample is missing.
        """
        result = np.zeros(self.samples)
        seen = np.zeros(self.samples, dtype=bool)
        for positions, values in self.blocks(name):
            result[positions], seen[positions] = values, True
        if not seen.all():
            raise RunError(
                f"{self.folder} lacks {int((~seen).sum())} of {self.samples} samples: remove it "
                "and score again."
            )
        return result

    def blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, values) of a column, a part at a time, always in the same order."""
        for file in self._files():
            table = pq.read_table(file, columns=["position", name], memory_map=False)
            yield table["position"].to_numpy(), _to_numpy(table[name].combine_chunks())

    def summed(self) -> dict[str, np.ndarray]:
        """The `sums` of all parts added up in their order, whichever process wrote which."""
        total: dict[str, np.ndarray] = {}
        for file in self._files():
            for name, values in load_file(file.with_suffix(".safetensors")).items():
                total[name] = total.get(name, 0.0) + values.astype(np.float64)
        return total

    def remove(self) -> None:
        """Clear the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> Sequence[Path]:
        return sorted(self.folder.glob("part-*.parquet"))


class StoredSketches:
    """The column `sketch` of parts, for `convergence.py`.

    Attributes:
        size: numbers in a sketch.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.size = next(parts.blocks("sketch"))[1].shape[1]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, sketches) a part at a time."""
        return self.parts.blocks("sketch")


def _to_arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _to_numpy(column: pa.Array) -> np.ndarray:
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    return column.flatten().to_numpy().reshape(len(column), -1)
