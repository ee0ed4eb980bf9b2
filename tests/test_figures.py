"""Laws of what a report draws: histograms, curves, modules in their places, numbers for readers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tsqlora.charts import bar_chart, heat_map, histogram_chart, line_chart, vega
from tsqlora.figures import BINS, curves, histogram, number, stacks


@given(
    arrays(np.float64, st.integers(1, 60), elements=st.floats(allow_nan=True, width=32)),
    st.booleans(),
)
def test_a_histogram_counts_every_finite_value_whatever_they_are(
    values: np.ndarray[Any, Any], log: bool
) -> None:
    drawn = histogram(values, np.ones(len(values), dtype=bool), log)
    finite = int(np.isfinite(values).sum())
    assert (drawn is None) == (finite == 0)
    if drawn is not None:
        assert drawn.every == drawn.selected
        assert sum(drawn.every) == finite
        assert len(drawn.edges) == BINS + 1
        assert drawn.edges == sorted(drawn.edges)
        json.dumps(histogram_chart("loss", drawn), allow_nan=False)


def test_a_histogram_of_a_wide_positive_range_is_logarithmic_where_that_is_allowed() -> None:
    values, every = np.geomspace(1e-3, 1e3, 100), np.ones(100, dtype=bool)
    wide = histogram(values, every, may_log=True)
    assert wide is not None
    assert wide.log
    assert max(wide.every) <= 4
    assert histogram_chart("loss", wide)["encoding"]["x"]["scale"]["type"] == "log"
    assert histogram(values, every).log is False  # type: ignore[union-attr]
    assert histogram(np.append(values, 0.0), np.ones(101, bool), True).log is False  # type: ignore[union-attr]


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    points = curves({"loss": [(float(i), float(i)) for i in range(100_000)]})["loss"]
    assert 250 <= len(points) <= 300
    assert points[0][0] < 1000
    assert points[-1][0] > 99_000
    assert curves({"loss": [(1.0, float("nan"))], "eval": []}) == {}


def test_lines_differ_in_their_dashes_and_not_in_colour_alone() -> None:
    chart = line_chart("loss", {"training": [(1, 2)], "validation": [(1, 3)]})
    dashes = chart["encoding"]["strokeDash"]["scale"]
    assert dashes["domain"] == ["training", "validation"]
    assert dashes["range"][0] != dashes["range"][1]
    assert "strokeDash" not in line_chart("rate", {"rate": [(1, 2)]})["encoding"]


def test_every_cell_of_a_heat_map_bears_its_number() -> None:
    (stack,) = stacks(["layers.0.q"])
    chart = heat_map("rank", stack, [{"layer": "0", "kind": "q", "value": 3, "label": "3"}], 3)
    assert {layer["mark"]["type"] for layer in chart["layer"]} == {"rect", "text"}
    assert chart["layer"][1]["encoding"]["text"]["field"] == "label"


def test_groups_of_bars_are_named_in_their_order() -> None:
    rows = [("a", "before", 0.5), ("a", "after", 0.25)]
    assert bar_chart("share", rows, ".1%")["encoding"]["fill"]["sort"] == ["before", "after"]


def test_the_library_is_one_script_that_reaches_for_nothing() -> None:
    assert 500_000 < len(vega()) < 1_500_000
    assert "vegaEmbed" in vega()
    assert not [word for word in ("import(", "XMLHttpRequest.prototype") if word in vega()]


def test_stacks_and_modules_outside_them_have_places_of_their_own() -> None:
    names = ["encoder.layer.0.q", "encoder.layer.1.q", "decoder.layer.0.q", "head"]
    assert [(s.title, s.kinds, s.layers) for s in stacks(names)] == [
        ("encoder.layer", ["q"], ["0", "1"]),
        ("decoder.layer", ["q"], ["0"]),
        ("", [""], ["head"]),
    ]


def test_the_experts_of_a_large_mixture_share_a_cell_that_shows_their_mean() -> None:
    experts = {f"layers.0.experts.{i}.up": float(i % 2) for i in range(100)}
    values = {**experts, "layers.0.q": 4.0}
    (stack,) = stacks(values)
    assert stack.kinds == ["experts.*.up", "q"]
    assert stack.means(values) == {("0", "experts.*.up"): 0.5, ("0", "q"): 4.0}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (0.90555, "0.906"),
        (12.3456, "12.3"),
        (0.00001234, "1.23e-5"),
        (-0.05, "-0.0500"),
        (1.5e20, "1.50e20"),
    ],
)
def test_numbers_are_written_for_readers(value: float | None, words: str) -> None:
    assert number(value) == words
