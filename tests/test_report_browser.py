"""The report in a real headless Chromium: it opens, is quiet, and does what its controls say."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import Page, opened
from report_runs import SAMPLES, WRONG, fill, rows, scores, start
from tsqlora.quality import QualityScores
from tsqlora.report import write_report

pytestmark = pytest.mark.browser

DOUBTED = [WRONG, 40, 12]
"""From the least credible up."""
ALIKE = [20, 31, 90]
"""Near-duplicates, the second with another target."""
HOSTILE = {
    50: "<script>window.hurt = 1</script></script><!--",
    51: "<img src=x onerror='window.hurt = 1'>",
    52: "\u202egnp.exe\u2028new line",
    53: "&lt;b&gt; {{ 7 * 7 }} ${7 * 7}",
    54: "long " * 10_000,
}


def judged() -> QualityScores:
    credibility = np.full(SAMPLES, 0.99)
    credibility[DOUBTED] = 0.125, 0.25, 0.5
    predicted = (1 + np.arange(SAMPLES) % 2).astype(np.int32)  # class 0 is the hostile one
    predicted[DOUBTED] = 3 - predicted[DOUBTED]
    return scores(credibility=credibility, prediction=predicted)


def table() -> list[dict[str, Any]]:
    made = [{**row, "text": f"sample {i} of many"} for i, row in enumerate(rows())]
    for i in ALIKE:
        made[i]["text"] = "These words, and no others, are said again and again." + "!" * i
    for i, text in HOSTILE.items():
        made[i]["text"] = text
    made[54]["label"] = "</script><script>window.hurt = 1</script>"
    return made


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = start(tmp_path_factory.mktemp("report"), table(), model="<script>window.hurt=1</script>")
    fill(run)
    judged().to_parquet(run.scores)
    return write_report(run.path)


@pytest.fixture(scope="module")
def browser(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(report, tmp_path_factory.mktemp("downloads")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    yield browser
    head = "document.querySelector('#samples-head').firstChild"
    browser.run(f"{head}.stale = true")  # the table is drawn again a little after the click
    browser.find("#clear").click()
    browser.wait(f"return !{head}.stale")
    assert browser.run("return found.textContent === '200 of 200 samples' && previous.disabled")
    assert browser.complaints() == []


def ids(page: Page) -> list[int]:
    """Of the rows on this page of the table."""
    return [int(text) for text in page.texts("#samples-body tr > td:first-child")]


def view(page: Page, name: str) -> None:
    page.find(f"input[name=view][value={name}]").click()


def test_every_chart_is_drawn_and_described(page: Page) -> None:
    charts = page.run("return document.querySelectorAll('[data-chart]').length")
    described = page.run(
        "return [...document.querySelectorAll('[data-chart] svg')].map((s) => s.ariaLabel"
        " ?? s.querySelector('[aria-label]')?.ariaLabel)"
    )
    assert charts == len(described) > 12
    assert all(described)
    assert page.run("return trouble.hidden")


def test_the_first_page_holds_the_first_samples(page: Page) -> None:
    assert ids(page) == list(range(50))
    assert page.find("#found").text == "200 of 200 samples"
    page.find("#next").click()
    assert ids(page) == list(range(50, 100))
    assert page.find("#page-said").text == "Page 2 of 4"
    page.find("#previous").click()
    assert ids(page) == list(range(50))


def test_the_likely_wrong_come_least_credible_first(page: Page) -> None:
    view(page, "wrong")
    assert ids(page) == DOUBTED
    assert page.texts("#samples-body .flag").count("wrong?") == 3
    assert page.texts("#samples-body .flag").count("≠") == 3


def test_the_most_informative_come_most_drawn_first(page: Page) -> None:
    view(page, "telling")
    assert ids(page) == list(range(199, 179, -1))


def test_near_duplicates_are_named_and_shown_together(page: Page) -> None:
    view(page, "alike")
    assert ids(page) == ALIKE
    said = page.texts("#samples-body button")
    assert said == ["first of 3", "20, one of 3", "20, one of 3"]
    assert page.texts("#samples-body .flag") == ["other target"] * 3
    view(page, "all")
    page.run("document.querySelector('#samples-body [data-group]').click()")
    assert ids(page) == ALIKE
    assert "near-duplicates of sample 20" in page.find("#found").text
    page.find("#ungroup").click()
    assert len(ids(page)) == 50


def test_filters_narrow_each_other(page: Page) -> None:
    page.find("input[name=query]").send_keys("SAMPLE 1")
    wanted = [i for i in range(SAMPLES) if str(i).startswith("1")]
    page.wait(f"return found.textContent.startsWith('{len(wanted)} ')")
    labels = page.texts("select[name=target] option")
    assert labels == ["any", "</script><script>window.hurt = 1</script>", "a", "b"]
    page.find("select[name=target] option:nth-of-type(4)").click()
    page.find("select[name=selected] option[value=no]").click()
    wanted = [i for i in wanted if i % 2 and i % 4]
    assert page.find("#found").text == f"{len(wanted)} of 200 samples"
    assert ids(page) == wanted[:50]


def test_a_filter_of_each_kind_lets_through_just_what_it_says(page: Page) -> None:
    box = page.find("input[name=most]")
    box.send_keys("0.3")
    assert ids(page) == sorted(DOUBTED[:2])
    box.clear()
    page.find("input[name=differs]").click()
    assert ids(page) == sorted([*DOUBTED, 54]), "no prediction is of the hostile class"
    page.find("input[name=differs]").click()
    page.find("select[name=selected] option[value=yes]").click()
    assert ids(page) == list(range(0, 200, 4))


@pytest.mark.parametrize("name", ["loss", "credibility", "id"])
def test_columns_sort_both_ways(page: Page, name: str) -> None:
    values = np.arange(SAMPLES) if name == "id" else getattr(judged(), name)
    button = f"#samples-head [data-sort={name}]"
    if name != "id":
        page.find(button).click()
    assert ids(page) == np.argsort(values, kind="stable")[:50].tolist()
    assert page.run("return document.querySelector('[aria-sort]').ariaSort") == "ascending"
    page.find(button).click()
    assert ids(page) == np.argsort(-values, kind="stable")[:50].tolist()
    assert page.run("return document.querySelector('[aria-sort]').ariaSort") == "descending"


def test_numbers_are_those_that_were_scored(page: Page) -> None:
    shown = [float(text) for text in page.texts("#samples-body tr > td:nth-child(6)")]
    np.testing.assert_allclose(shown, judged().loss[:50], rtol=6e-3)
    assert len(page.texts("#samples-head th")) == 9
    page.find("input[name=every]").click()
    heads = [text.strip(" ▲▼") for text in page.texts("#samples-head th")]
    assert heads[7:11] == ["quality", "gradient norm", "loss reduction", "convergence"]


def test_ids_of_what_is_shown_can_be_taken_away(page: Page) -> None:
    view(page, "wrong")
    page.find("#download").click()
    assert page.downloads is not None
    file, end = page.downloads / "wrong-samples.csv", time.monotonic() + 10
    while not file.exists() or not file.stat().st_size:  # an empty one holds its place before
        assert time.monotonic() < end, "no download"
        time.sleep(0.05)
    with file.open(encoding="utf-8") as opened_file:
        found = list(csv.DictReader(opened_file))
    assert [int(row["id"]) for row in found] == DOUBTED
    assert [float(row["credibility"]) for row in found] == [0.125, 0.25, 0.5]
    assert [row["selected"] for row in found] == ["0", "1", "1"]


def test_the_slider_shows_ranks_as_they_were_by_keyboard_alone(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    def labels() -> list[str]:
        return page.texts("[data-chart=rank-0] .mark-text.role-mark text")

    first = "document.querySelector('[data-chart=rank-0] .mark-text.role-mark text').textContent"
    assert labels() == ["6↓", "8", "7", "6", "5", "5↑"]
    page.find("#moment").send_keys(Keys.ARROW_LEFT)
    page.wait(f"return {first} == '9'")
    assert labels() == ["9", "8", "7", "6", "5", "4"]
    assert page.find("#moment-said").text == "as planned: 39 ranks in all"
    assert page.find("#moment").get_attribute("aria-valuetext") == "as planned"
    page.find("#play").send_keys(Keys.ENTER)
    page.wait(f"return {first} == '6↓' && play.textContent == 'Play'")


def test_hostile_texts_are_seen_as_they_are_and_do_nothing(page: Page) -> None:
    page.find("#next").click()
    cells = page.texts("#samples-body td.say")
    assert cells[0] == HOSTILE[50]
    assert cells[1] == HOSTILE[51]
    assert cells[2] == "gnp.exe new line"
    assert cells[3] == HOSTILE[53]
    assert "(50,000 characters)" in cells[4]
    assert page.find("#samples-body details summary").is_displayed()
    assert page.run("return window.hurt === undefined && !document.querySelector('main img')")
    assert "<script>window.hurt=1</script>" in page.find("#summary").text


def test_every_control_has_a_name_and_takes_the_focus(page: Page) -> None:
    faults = page.run("""
        const all = "button:enabled, input, select, [tabindex]";
        const controls = [...document.querySelectorAll(all)];
        const named = (e) => e.labels?.length || e.textContent.trim() || e.ariaLabel;
        const focused = (e) => !e.offsetParent || (e.focus(), document.activeElement === e);
        return controls.filter((e) => !named(e) || !focused(e)).map((e) => e.outerHTML);
    """)
    assert faults == []


@pytest.mark.parametrize("dark", [False, True])
def test_colours_follow_the_system_and_texts_stand_out(page: Page, dark: bool) -> None:
    """Contrast of texts on their card, as WCAG reckons it, and of a number on the darkest cell."""
    page.like(dark)
    colours = page.run("""
        const style = getComputedStyle(document.documentElement);
        const names = ["card", "text", "soft", "heat", "accent"];
        return names.map((name) => style.getPropertyValue(`--${name}`));
    """)
    card, text, soft, heat, accent = map(luminance, colours)
    assert (card < 0.1) == dark
    assert contrast(text, card) > 7
    assert contrast(soft, card) > 4.5
    assert contrast(accent, card) > 4.5
    assert contrast(text, heat) > 4.5
    page.like()


@pytest.mark.parametrize("width", [320, 768])
def test_on_a_narrow_screen_nothing_is_cut_off(page: Page, width: int) -> None:
    page.like(width=width)
    page.wait("""
        const holds = "svg, .scroll, .wide, pre, section > table, .beside > table";
        const over = (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(holds);
        return ![...document.querySelectorAll("main *")].some(over);
    """)
    page.like()


def luminance(colour: str) -> float:
    parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
