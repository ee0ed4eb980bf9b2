"""Vega-Lite specifications of what the report draws, in the colours of the page: light or dark.

Nothing is told by colour alone: cells hold their numbers, lines differ in their dashes, the
selected are filled and all are outlined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from tsqlora.figures import Histogram, Series, Stack

Spec = dict[str, Any]
"""A Vega-Lite specification without its size, background or theme."""

_WIDE: Spec = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
_LIBRARY = "globalThis.vegaEmbed = vegaEmbed;"


@cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, as the package vl-convert carries them."""
    import vl_convert

    return str(vl_convert.javascript_bundle(_LIBRARY))


def heat_map(what: str, stack: Stack, rows: Sequence[Mapping[str, Any]], largest: float) -> Spec:
    """Layers × kinds, each cell shaded by `value` out of `largest` and named by `label`."""
    x = {"field": "kind", "type": "nominal", "sort": stack.kinds, "title": None}
    y = {"field": "layer", "type": "nominal", "sort": stack.layers, "title": "layer"}
    scale = {"domain": [0, largest or 1.0], "range": [0.03, 1]}
    shade = {"field": "value", "type": "quantitative", "scale": scale, "legend": None}
    tip = [{"field": name, "title": name} for name in ("module", what)]
    cell = {"type": "rect", "fill": "var(--heat)", "stroke": "var(--line)"}
    return {
        "description": f"{what} by layer and kind of module {stack.title}",
        "width": {"step": 46},
        "height": {"step": 24},
        "data": {"name": "cells", "values": list(rows)},
        "encoding": {
            "x": {**x, "axis": {"orient": "top", "labelAngle": -35, "labelLimit": 190}},
            "y": {**y, "axis": {"labelLimit": 220, "title": "layer" if stack.title else None}},
            "tooltip": tip,
        },
        "layer": [
            {"mark": cell, "encoding": {"fillOpacity": shade}},
            {"mark": {"type": "text", "aria": False}, "encoding": {"text": {"field": "label"}}},
        ],
    }


def histogram_chart(name: str, drawn: Histogram) -> Spec:
    """All samples outlined, the selected filled."""
    rows = [
        {"low": low, "high": high, "samples": every, "selected": chosen}
        for low, high, every, chosen in zip(
            drawn.edges[:-1], drawn.edges[1:], drawn.every, drawn.selected, strict=True
        )
        if every
    ]
    scale = {"type": "log"} if drawn.log else {"type": "linear", "zero": False}
    tip = [{"field": "low", "format": ".3~g", "title": "from"}]
    tip += [{"field": "high", "format": ".3~g", "title": "to"}]
    tip += [{"field": "samples", "format": ","}, {"field": "selected", "format": ","}]
    return {
        "description": f"Distribution of {name} over all samples and over the selected",
        **_WIDE,
        "height": 130,
        "data": {"values": rows},
        "encoding": {
            "x": {
                "field": "low",
                "type": "quantitative",
                "scale": {**scale, "nice": False, "domain": [drawn.edges[0], drawn.edges[-1]]},
                "axis": {"title": None, "format": ".3~g", "tickCount": 5, "grid": False},
            },
            "x2": {"field": "high"},
            "tooltip": tip,
        },
        "layer": [
            _bars("samples", {"fill": "var(--bar)", "stroke": "var(--soft)", "strokeWidth": 0.7}),
            _bars("selected", {"fill": "var(--accent)"}),
        ],
    }


def _bars(field: str, look: Mapping[str, Any]) -> Spec:
    axis = {"title": "samples", "tickCount": 3, "format": "~s"}
    y = {"field": field, "type": "quantitative", "axis": axis}
    return {"mark": {"type": "rect", **look}, "encoding": {"y": y, "y2": {"datum": 0}}}


def line_chart(title: str, series: Series) -> Spec:
    """Values by optimizer step; of several lines each has dashes of its own."""
    rows = [
        {"step": x, "value": y, "of": name} for name, points in series.items() for x, y in points
    ]
    tip = [{"field": "step", "format": ","}, {"field": "value", "title": title, "format": ".4~g"}]
    encoding: Spec = {
        "x": {
            "field": "step",
            "type": "quantitative",
            "axis": {"title": "optimizer step", "grid": False, "tickCount": 6, "format": "~s"},
        },
        "y": {
            "field": "value",
            "type": "quantitative",
            "scale": {"zero": False},
            "axis": {"title": None, "tickCount": 5, "format": ".3~g"},
        },
        "tooltip": tip,
    }
    if len(series) > 1:
        names = list(series)
        legend = {"title": None, "orient": "top", "symbolSize": 400, "symbolStrokeWidth": 2}
        of = {"field": "of", "type": "nominal", "sort": names, "legend": legend}
        encoding["strokeDash"] = {**of, "scale": {"domain": names, "range": [[1, 0], [6, 4]]}}
        encoding["stroke"] = {
            **of,
            "scale": {"domain": names, "range": ["var(--accent)", "var(--warm)"]},
        }
        tip.append({"field": "of", "title": "of"})
    few = max(len(points) for points in series.values()) <= 30
    mark = {"type": "line", "point": {"filled": True, "size": 22} if few else False}
    return {
        "description": f"{title} by optimizer step",
        **_WIDE,
        "height": 190,
        "data": {"values": rows},
        "mark": mark,
        "encoding": encoding,
    }


def bar_chart(title: str, rows: Sequence[tuple[str, str, float]], form: str) -> Spec:
    """(name, group, value): a bar each, the groups of one name below one another."""
    groups = list(dict.fromkeys(group for _, group, _ in rows))
    values = [{"name": n, "of": group, "value": value} for n, group, value in rows]
    y = {
        "field": "name",
        "type": "nominal",
        "sort": None,
        "axis": {"title": None, "labelLimit": 120},
    }
    axis = {"title": None, "format": form, "tickCount": 5}
    x = {"field": "value", "type": "quantitative", "axis": axis}
    tip = [{"field": "name", "title": "name"}, {"field": "of", "title": "of"}]
    tip.append({"field": "value", "format": form})
    encoding: Spec = {"x": x, "y": y, "tooltip": tip}
    if len(groups) > 1:
        of = {"field": "of", "type": "nominal", "sort": groups}
        legend = {"title": None, "orient": "top", "symbolStrokeWidth": 1}
        colours = {"domain": groups, "range": ["var(--bar)", "var(--accent)"]}
        encoding["fill"] = {**of, "scale": colours, "legend": legend}
        encoding["yOffset"] = of
    return {
        "description": title,
        **_WIDE,
        "height": len(rows) * (22 if len(groups) == 1 else 14),
        "data": {"values": values},
        "mark": {"type": "bar", "stroke": "var(--soft)", "strokeWidth": 0.7},
        "encoding": encoding,
    }
