"""Numbers to the positions that the report's template draws: histograms, curves, shaded tables."""

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
"""A table of more module kinds than this takes numbered ones (experts) together."""


@dataclass(frozen=True)
class Histogram:
    """Bars in a box of 400 × 100, of all samples and of the selected among them.

    Attributes:
        bars, selected: SVG paths.
        ticks: (position from 0 to 400, label) along the axis.
        most: samples in the highest bar.
        median: of all values.
        log: whether the axis is logarithmic.
    """

    bars: str
    selected: str
    ticks: list[tuple[float, str]]
    most: int
    median: str
    log: bool


@dataclass(frozen=True)
class Curves:
    """Lines in a box of 640 × 200, y downwards.

    Attributes:
        lines: (name, SVG points) of each.
        x_ticks, y_ticks: (position, label).
    """

    lines: list[tuple[str, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Cell:
    """A number, its shade in percent, and a remark beside it."""

    text: str
    shade: int
    remark: str = ""


@dataclass(frozen=True)
class Grid:
    """A shaded table; a cell is None where there is nothing."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]


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
    """The distribution of `values` (N); the outermost bars hold what lies further out.

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
    positions = np.linspace(0, 1, 5)
    labels = [number(float(10**v if log else v), 2) for v in low + (high - low) * positions]
    return Histogram(
        bars=_bars(every, every.max()),
        selected=_bars(some, every.max()),
        ticks=list(zip((400 * positions).tolist(), labels, strict=True)),
        most=int(every.max()),
        median=number(float(np.median(kept))),
        log=log,
    )


def _bars(counts: NDArray[np.integer[Any]], most: int) -> str:
    width = 400 / BINS
    heights = [max(100 * count / most, 1.0) if count else 0.0 for count in counts.tolist()]
    return "".join(
        f"M{i * width + 0.75:g} 100v{-h:.1f}h{width - 1.5:g}V100z"
        for i, h in enumerate(heights)
        if h
    )


def curves(series: Mapping[str, Sequence[tuple[float, float]]]) -> Curves | None:
    """Lines of (x, y) points, thinned by averaging neighbours; None where no point is finite."""
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    every = [point for points in kept.values() for point in points]
    if not every:
        return None
    xs, ys = ticks(x for x, _ in every), ticks(y for _, y in every)

    def across(x: float) -> float:
        return round(640 * (x - xs[0]) / (xs[-1] - xs[0]), 1)

    def down(y: float) -> float:
        return round(200 - 200 * (y - ys[0]) / (ys[-1] - ys[0]), 1)

    return Curves(
        lines=[
            (name, " ".join(f"{across(x):g},{down(y):g}" for x, y in _thinned(points)))
            for name, points in kept.items()
            if points
        ],
        x_ticks=[(across(x), f"{x:,.6g}") for x in xs],
        y_ticks=[(down(y), f"{y:,.6g}") for y in ys],
    )


def ticks(values: Iterable[float], about: int = 4) -> list[float]:
    """Round numbers (steps of 1, 2 or 5 times a power of ten) around `values`, at least two."""
    every = list(values)
    low, high = min(every), max(every)
    rough = max((high - low) / about, 1e-9 * max(abs(low), abs(high))) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    points = sorted(points)
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def grids(
    values: Mapping[str, float],
    remarks: Mapping[str, str] | None = None,
    unit: float = 1.0,
) -> list[Grid]:
    """A layers × module-kinds table for each stack of layers, in the order of the modules.

    Cells show `value / unit`, shaded in parts of the largest value. Modules outside any layer make
    one more table, a row each. In a stack of more than `WIDEST` kinds those that differ in a number
    only (the experts of a mixture) share a cell, which shows their mean.
    """
    stacks: dict[str, dict[tuple[str, str], list[str]]] = {}
    kinds: dict[str, set[str]] = {}
    for name in values:
        kinds.setdefault(_place(name)[0], set()).add(_place(name)[2])
    for name in values:
        stack, layer, kind = _place(name)
        if len(kinds[stack]) > WIDEST:
            kind = re.sub(r"\d+", "*", kind)
        stacks.setdefault(stack, {}).setdefault((layer, kind), []).append(name)
    most = max(values.values(), default=0.0) or 1.0

    def cell(names: list[str] | None) -> Cell | None:
        if not names:
            return None
        mean = sum(values[name] for name in names) / len(names)
        single = len(names) == 1
        remark = (remarks or {}).get(names[0], "") if single else f"mean of {len(names)}"
        return Cell(_short(mean / unit), round(100 * mean / most), remark)

    result = []
    for stack, places in stacks.items():
        columns = list(dict.fromkeys(kind for _, kind in places))
        layers = list(dict.fromkeys(layer for layer, _ in places))
        rows = [(layer, [cell(places.get((layer, k))) for k in columns]) for layer in layers]
        result.append(Grid(stack, columns, rows))
    return result


def kind_of(name: str) -> str:
    """The module's kind: its name without the number of its layer, experts taken together."""
    stack, layer, kind = _place(name)
    return re.sub(r"\d+", "*", f"{stack}.*.{kind}" if kind else layer)


def _place(name: str) -> tuple[str, str, str]:
    """(stack, layer, kind) of a module; ("", name, "") where its name has no layer number."""
    found = re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", name)
    return (found[1] or "layers", found[2], found[3]) if found else ("", name, "")


def _short(value: float) -> str:
    if value == int(value):
        return str(int(value))
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.05 else "<0.1"
