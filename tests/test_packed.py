"""Laws of what a page carries: it comes back as it was, and fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from report_runs import Page, scores, start, unpacked
from tsqlora import report_table
from tsqlora.packed import Packed, packed_floats, packed_integers, packed_json, packed_text
from tsqlora.report import write_report


def back(piece: Packed) -> Any:
    return unpacked(piece.text, {"data-kind": piece.kind, "data-scale": str(piece.scale)})


@given(arrays(np.int64, st.integers(0, 30), elements=st.integers(0, 2**32 - 1)))
def test_whole_numbers_come_back_the_same(values: np.ndarray[Any, Any]) -> None:
    assert back(packed_integers("x", values)).tolist() == values.tolist()


@given(
    arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e9, 1e9)),
    st.integers(-30, 30),
)
def test_numbers_come_back_to_three_digits_or_to_a_millionth_of_the_largest(
    values: np.ndarray[Any, Any], scale: int
) -> None:
    values = np.append(values * 2.0**scale, np.nan)
    found = back(packed_floats("x", values))
    largest = np.nanmax(np.abs(values))
    np.testing.assert_allclose(found, values, rtol=5e-4, atol=1e-6 * largest)


@given(st.text(st.characters(codec="utf-8")))
def test_texts_come_back_the_same_and_are_no_markup(text: str) -> None:
    piece = packed_text("x", text)
    assert back(piece) == text
    assert not set(piece.text) & set("<>&\"'-")


def test_half_a_surrogate_pair_is_a_question_mark() -> None:
    assert back(packed_text("x", "a\ud800b")) == "a?b"
    assert back(packed_json("x", {"a": "\ud800"})) == {"a": "\ud800"}


def test_json_has_null_for_what_is_not_finite() -> None:
    value = {"a": [1.5, float("nan"), (float("inf"), "x")]}
    assert back(packed_json("x", value)) == {"a": [1.5, None, [None, "x"]]}


def noise(samples: int, words: int) -> list[dict[str, str]]:
    """Texts that hardly can be packed."""
    letters = np.random.default_rng(0).integers(97, 123, (samples, 6 * words), dtype=np.uint8)
    letters[:, ::6] = 32
    return [{"text": row.tobytes().decode(), "label": "ab"[row[1] % 2]} for row in letters]


def test_a_report_of_100_000_samples_stays_under_6_mb(tmp_path: Path) -> None:
    count = 100_000
    run = start(tmp_path, noise(count // 20, 10) * 20)
    scores(count).to_parquet(run.scores)
    written = write_report(run.path)
    assert 1_000_000 < written.stat().st_size < 6_000_000
    assert len(Page(written).texts) == count


@pytest.mark.parametrize("words", [4, 30, 400])
def test_texts_are_as_long_as_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: int
) -> None:
    monkeypatch.setattr(report_table, "ROOM", 400_000)
    run = start(tmp_path, noise(3000, words))
    scores(3000).to_parquet(run.scores)
    page = Page(write_report(run.path))
    packed = [len(data) for given, data in page.scripts if given.get("id") != "packed-vega"]
    assert sum(packed) < 400_000 + 50_000, "the page's own script and charts come to the rest"
    cut = page.notes["cut"]
    assert (cut == 0) == (words == 4)
    assert len(page.texts) == 3000
    assert len(page.texts[1500]) <= (cut or 23) + 24, "and how long it was"
    assert len(page.texts[2999]) == (
        179 if words == 30 else 23 if words == 4 else 1000 + len(" … (2,400 characters)")
    )


def test_of_more_samples_than_fit_the_views_and_others_at_random_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_table, "MOST", 50)
    credibility = np.full(200, 0.99)
    credibility[[3, 60]] = 0.1, 0.2
    run = start(tmp_path, [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(200)])
    scores(credibility=credibility).to_parquet(run.scores)
    page = Page(write_report(run.path))
    ids = page.packed("id").tolist()
    assert len(ids) == len(set(ids)) == 50
    assert {3, 60, *range(180, 200)} <= set(ids)
    assert page.texts == [f"text {i}" for i in ids]
    assert "Of 200 samples 50 are here" in page.text
