"""Numbers to what a report draws: words, histograms, thinned curves, modules by layer and kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 40
POINTS = 300
"""At most so many points are drawn of a curve."""
WIDEST = 40
"""A stack of more module kinds than this takes numbered ones (experts) together."""

Series = dict[str, list[tuple[float, float]]]
"""(x, y) points by name."""


@dataclass(frozen=True)
class Histogram:
    """Counts of all samples and of the selected among them between `edges` (`BINS` + 1)."""

    edges: list[float]
    every: list[int]
    selected: list[int]
    median: float
    log: bool


@dataclass(frozen=True)
class Stack:
    """Modules by layer and kind; `cells` holds the names of those that share a place."""

    title: str
    layers: list[str]
    kinds: list[str]
    cells: dict[tuple[str, str], list[str]]

    def means(self, values: Mapping[str, float]) -> dict[tuple[str, str], float]:
        """The mean value of the modules in each cell."""
        return {
            place: sum(values[name] for name in names) / len(names)
            for place, names in self.cells.items()
        }


def number(value: float | None, digits: int = 3) -> str:
    """`value` for a reader, to so many digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        return f"{value:,.{decimals}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def histogram(
    values: NDArray[Any], selected: NDArray[np.bool_], may_log: bool = False
) -> Histogram | None:
    """The distribution of `values` (N); the outermost bins hold what lies further out.

    None where no value is finite. With `may_log` the axis is logarithmic if the values are positive
    and their 1st and 99th percentiles differ by more than a factor of 50.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return None
    kept, chosen = values[finite].astype(np.float64), selected[finite]
    outer = np.percentile(kept, [1, 99])
    log = bool(may_log and kept.min() > 0 and outer[1] > 50 * outer[0])
    scaled = np.log10(kept) if log else kept
    low, high = np.percentile(scaled, [0.5, 99.5])
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    edges = np.linspace(low, high, BINS + 1)
    every, some = (np.histogram(np.clip(v, low, high), edges)[0] for v in (scaled, scaled[chosen]))
    return Histogram(
        edges=(10**edges if log else edges).tolist(),
        every=every.tolist(),
        selected=some.tolist(),
        median=float(np.median(kept)),
        log=log,
    )


def curves(series: Mapping[str, Sequence[tuple[float, float]]]) -> Series:
    """The finite points of each, thinned by averaging neighbours; where none is, it is left out."""
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    return {name: _thinned(points) for name, points in kept.items() if points}


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    points = sorted(points)
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def stacks(names: Iterable[str]) -> list[Stack]:
    """Every stack of layers, in the order of the modules; those outside any make one more.

    In a stack of more than `WIDEST` kinds those that differ in a number only (the experts of a
    mixture) share a cell.
    """
    placed = [(name, *_place(name)) for name in names]
    kinds: dict[str, set[str]] = {}
    for _, stack, _, kind in placed:
        kinds.setdefault(stack, set()).add(kind)
    cells: dict[str, dict[tuple[str, str], list[str]]] = {}
    for name, stack, layer, kind in placed:
        if len(kinds[stack]) > WIDEST:
            kind = re.sub(r"\d+", "*", kind)
        cells.setdefault(stack, {}).setdefault((layer, kind), []).append(name)
    return [
        Stack(
            stack,
            list(dict.fromkeys(layer for layer, _ in places)),
            list(dict.fromkeys(kind for _, kind in places)),
            places,
        )
        for stack, places in cells.items()
    ]


def _place(name: str) -> tuple[str, str, str]:
    """(stack, layer, kind) of a module; ("", name, "") where its name has no layer number."""
    found = re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", name)
    return (found[1] or "layers", found[2], found[3]) if found else ("", name, "")
