"""The last measurement of every sample of a pool, as a training goes by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tsqlora import processes
from tsqlora.collected import FINITE
from tsqlora.measuring import Columns

POSITION = "position"
"""The column that holds a sample's row in the pool."""


class Visits:
    """What was measured of each of N samples when it was last trained on.

    `names`, `column` and `blocks` show those that ever were, in the pool's order.

    Attributes:
        last: 1 + the epoch of the last visit (N), 0 where there was none.
        window: positions of what has settled since a window was taken, by batches.
    """

    def __init__(self, samples: int) -> None:
        self.last = np.zeros(samples, dtype=np.int32)
        self.window: list[np.ndarray] = []
        self._columns: Columns = {}
        self._fresh: list[tuple[int, Columns]] = []

    def add(self, epoch: int, columns: Columns) -> None:
        """Note a batch, whose `position` is among its columns; what is not finite is left out."""
        there = [name for name in FINITE if name in columns]
        finite = np.all([np.isfinite(columns[name]) for name in there], axis=0)
        self._fresh.append((epoch, {name: values[finite] for name, values in columns.items()}))

    def settle(self) -> None:
        """Take in what all processes have noted since the last time, in their order."""
        fresh, self._fresh = self._fresh, []
        for noted in processes.gather(fresh):
            for epoch, columns in noted:
                self._put(epoch + 1, columns)

    def _put(self, stamp: int, columns: Columns) -> None:
        positions = columns[POSITION]
        self.last[positions] = stamp
        self.window.append(positions)
        for name, values in columns.items():
            if name not in self._columns:
                shape = (len(self.last), *values.shape[1:])
                self._columns[name] = np.zeros(shape, values.dtype)
            self._columns[name][positions] = values

    @property
    def seen(self) -> np.ndarray:
        """Positions in the pool of the samples that were visited."""
        return np.flatnonzero(self.last)

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self._columns)

    def column(self, name: str) -> np.ndarray:
        """A column of the samples seen."""
        return self._columns[name][self.seen].astype(np.float64)

    def blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same at once."""
        yield np.arange(len(self.seen)), self._columns[name][self.seen]

    def last_of(self, name: str, positions: np.ndarray) -> np.ndarray | None:
        """A column of some positions as it has settled, 0 where never seen; None if none has."""
        return self._columns[name][positions] if name in self._columns else None

    def take_window(self, least: int) -> tuple[np.ndarray, Window] | None:
        """The positions visited since the last time, in the pool's order, and what was measured.

        None, and nothing is taken, of fewer than `least`.
        """
        positions = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *self.window]))
        if len(positions) < least:
            return None
        self.window = []
        columns = {name: values[positions] for name, values in self._columns.items()}
        return positions, Window(columns)

    def state(self) -> Columns:
        """All of it as arrays, those of the samples seen."""
        seen = self.seen
        columns = {f"column.{name}": values[seen] for name, values in self._columns.items()}
        window = np.concatenate([np.zeros(0, dtype=np.int64), *self.window])
        return {"last": self.last, "window": window, **columns}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Put `state` back."""
        self.last, self._columns, self._fresh = state["last"].copy(), {}, []
        self.window = [state["window"]]
        named = {k.removeprefix("column."): v for k, v in state.items() if k.startswith("column.")}
        for name, values in named.items():
            whole = np.zeros((len(self.last), *values.shape[1:]), values.dtype)
            whole[self.seen] = values
            self._columns[name] = whole


@dataclass(frozen=True)
class Window:
    """Columns of some visits, as `parts.Measured` has them."""

    columns: Columns

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self.columns)

    def column(self, name: str) -> np.ndarray:
        """One of them."""
        return self.columns[name]

    def at(self, places: np.ndarray) -> Window:
        """Those of some of the visits."""
        return Window({name: values[places] for name, values in self.columns.items()})

    def blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same at once."""
        yield np.arange(len(self.columns[name])), self.columns[name]
