"""Laws of the report: one file that stands alone, says what is there, and runs nobody's code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from runs import write_rows
from tsqlora.allocation import RankPlan
from tsqlora.artefacts import atomic_write_json, read_lines
from tsqlora.config import RunConfig
from tsqlora.errors import RunError
from tsqlora.figures import curves, grids, histogram, kind_of, number, ticks
from tsqlora.quality import QualityScores
from tsqlora.report import write_report
from tsqlora.run_folder import RunFolder

VOID = {"meta", "br", "wbr", "path", "polyline"}
SAMPLES = 200
WRONG = 7
KINDS = {"attention.query": (16, 16), "output.dense": (16, 64)}
SHAPES = {f"encoder.layer.{i}.{k}": s for i in range(3) for k, s in KINDS.items()}
SHAPES["pooler.dense"] = (16, 16)


class Page(HTMLParser):
    """A parsed report: every tag, and the text a reader sees; fails where tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.seen))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.seen.append(data)

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def start(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> RunFolder:
    """A run folder that holds a configuration, and its training data where `rows` are given."""
    train = folder / "train.jsonl"
    if rows is not None:
        train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = changes.pop("data", {"text": "text", "target": "label"})
    settings = {"model": "some/model", "task": "classification", "output": str(folder / "run")}
    config = RunConfig.from_dict({**settings, "data": {"train": str(train), **data}, **changes})
    return RunFolder.create(folder / "run", config)


def rows(count: int = SAMPLES) -> list[dict[str, Any]]:
    return [{"text": f"text of {i}", "label": "ab"[i % 2]} for i in range(count)]


def scores(count: int = SAMPLES, **changes: Any) -> QualityScores:
    """Scores in which sample `WRONG` is the least credible and the last the most probable."""
    random = np.random.default_rng(0)
    credibility = np.full(count, 0.99)
    credibility[WRONG] = 0.125
    probability = np.arange(1, count + 1) / (count * (count + 1) / 2)
    selected = np.zeros(count, dtype=bool)
    selected[::4] = True
    measured = {name: random.lognormal(size=count) for name in ("loss", "gradient_norm")}
    rest = {name: random.normal(size=count) for name in ("loss_reduction", "convergence")}
    found = {"credibility": credibility, "quality": random.normal(size=count)}
    drawn = {"probability": probability, "selected": selected, "wrong_share": 0.1}
    values = {**measured, **rest, **found, **drawn, "verdict": "about 10% look wrong"}
    return QualityScores(**{"ids": np.arange(count), **values, **changes})


def fill(run: RunFolder) -> None:
    """Every artefact of a finished run, in the formats of the design."""
    scores().to_parquet(run.scores)
    names = list(SHAPES)
    values = {name: 0.5 / (i + 1) for i, name in enumerate(names)}
    sensitivity = {"estimator": "weight_gradient", "modules": values, "shapes": SHAPES}
    atomic_write_json(run.sensitivity, {"version": 1, **sensitivity})
    ranks = dict(zip(names, [9, 8, 7, 6, 5, 4, 0], strict=True))
    RankPlan(ranks, SHAPES, 2.0, 3000).save(run.plan)
    moved = {**ranks, names[0]: 6, names[5]: 5}
    move = {"ranks": moved, "pruned": {names[0]: 3}, "grown": {names[5]: 1}}
    write_rows(run.ranks, [{"step": 40, **move}])
    cost = {"scoring_seconds": 75.0, "training_seconds": 225.0, "scoring_passes": 400}
    run.update_metrics({"base": {"loss": 2.5}, "validation": {"loss": 1.25, "f1": None}})
    run.update_metrics({"cost": {**cost, "training_passes": 600, "peak_memory_bytes": 2e9}})
    losses = [{"step": s, "loss": 3 / s, "learning_rate": 1e-3 / s} for s in range(10, 60, 10)]
    write_rows(run.train_log, losses)
    run.adapter.mkdir()


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    run = start(tmp_path, rows())
    fill(run)
    return run


# the whole page


def test_a_report_needs_no_other_file_and_no_script(finished: RunFolder) -> None:
    page = Page(write_report(finished.path))
    assert not page.names() & {"script", "link", "img", "iframe", "object", "base", "form"}
    for _, attributes in page.tags:
        assert all(not name.startswith("on") for name in attributes)
        assert not {"src", "action"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\(|@import", page.source)
    policy = next(a for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in (policy["content"] or "")


def test_a_report_tells_what_was_trained_and_at_what_cost(finished: RunFolder) -> None:
    text = Page(write_report(finished.path)).text
    assert "some/model was fine-tuned for classification" in text
    assert "of which 50 (25.0 %) were drawn" in text
    assert "About 10% look wrong." in text
    assert "loss on validation is 1.25" in text
    assert "metric untouched model (validation) validation loss 2.500 1.250 f1 – –" in text
    assert "scoring 1 min 15 s 25.0 % 400" in text
    assert "training 3 min 45 s 75.0 % 600" in text
    assert "2.00 GB" in text
    assert "temperature: 1.0" in text
    assert re.search(r"tsqlora \d", text)


def test_every_rank_stands_in_a_shaded_cell_beside_its_change(finished: RunFolder) -> None:
    page = Page(write_report(finished.path))
    assert "0 6 -3 8 1 7 6 2 5 5 +1" in page.text
    shades = [a["style"] for tag, a in page.tags if tag == "td" and "style" in a]
    assert "--s:100" in shades
    assert "prefers-color-scheme: dark" in page.source


def test_every_reallocation_is_a_row_with_what_it_left(finished: RunFolder) -> None:
    text = Page(write_report(finished.path)).text
    plan = RankPlan.load(finished.plan)
    left = plan.parameters - 3 * (16 + 16) + (16 + 64)
    assert f"40 −3 1 +1 1 37 {left:,} {left / plan.budget:.1%}".replace("%", " %") in text
    assert "Gained most since the plan: encoder.layer.2.output.dense 4 → 5" in text
    assert "Lost most since the plan: encoder.layer.0.attention.query 9 → 6" in text


def test_both_ends_of_the_samples_are_shown_with_text_and_target(finished: RunFolder) -> None:
    text = Page(write_report(finished.path)).text
    doubted, informative = text.index("Least credible"), text.index("Most informative")
    loss = number(float(scores().loss[WRONG]))
    row = f"{WRONG} 0.12 wrong? {loss} 0.08× no b text of {WRONG}"
    assert doubted < text.index(row) < informative
    assert f"{SAMPLES - 1} 0.99" in text[informative:]


def test_class_shares_before_and_after_are_those_of_the_selection(tmp_path: Path) -> None:
    run = start(tmp_path, [{"text": "t", "label": "ab"[i % 4 == 0]} for i in range(SAMPLES)])
    scores().to_parquet(run.scores)
    text = Page(write_report(run.path)).text
    assert "a 150 75.0 % 0.0 % -75.0" in text
    assert "b 50 25.0 % 100.0 % +75.0" in text


def test_many_classes_are_taken_together_beyond_the_forty_commonest(tmp_path: Path) -> None:
    run = start(tmp_path, [{"text": "t", "label": i % 50} for i in range(SAMPLES)])
    scores().to_parquet(run.scores)
    assert "10 others 40 20.0 %" in Page(write_report(run.path)).text


@pytest.mark.parametrize(
    "missing",
    ["scores", "sensitivity", "plan", "ranks", "metrics", "train_log"],
)
def test_a_missing_artefact_is_left_out_with_a_note(finished: RunFolder, missing: str) -> None:
    getattr(finished, missing).unlink()
    words = {
        "scores": "have not been scored yet",
        "sensitivity": "sensitivity has not been measured",
        "plan": "no rank plan yet",
        "ranks": "No rank has moved",
        "metrics": "Not measured yet",
        "train_log": "no log of training yet",
    }
    text = Page(write_report(finished.path)).text
    assert words[missing] in text
    assert sum(note in text for note in words.values()) == 1


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    assert "is being fine-tuned" in Page(write_report(start(tmp_path).path)).text


def test_a_broken_artefact_is_named(finished: RunFolder) -> None:
    finished.plan.write_text("{")
    with pytest.raises(RunError, match=r"plan\.json"):
        write_report(finished.path)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run"):
        write_report(tmp_path)


def test_an_unfinished_training_shows_the_log_of_its_newest_checkpoint(tmp_path: Path) -> None:
    run = start(tmp_path)
    for step in (10, 20):
        log = [{"step": s, "loss": 1.5 / s} for s in range(5, step + 1, 5)]
        folder = run.training / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        state = json.dumps({"global_step": step, "log_history": log})
        (folder / "trainer_state.json").write_text(state)
    assert "20 optimizer steps logged; the last training loss is 0.0750" in (
        Page(write_report(run.path)).text
    )


def test_reading_artefacts_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, tsqlora.report, tsqlora.run_folder;"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, f"imported at once: {done.stderr}"


# hostile and lost data


def test_hostile_texts_are_shown_and_harmless(tmp_path: Path) -> None:
    hostile = (
        "<script>alert(1)</script>\u202e\x00 &lt; \"'</td></table><img src=x onerror=alert(1)>"
    )
    given_rows = rows()
    given_rows[WRONG] = {"text": hostile + "x" * 50_000, "label": "<b onclick='x'>b</b>"}
    run = start(tmp_path, given_rows, model="<script>m</script>")
    scores().to_parquet(run.scores)
    written = write_report(run.path)
    page = Page(written)
    assert not page.names() & {"script", "img", "b onclick"}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert(1)</script>" in page.text
    assert "&lt;" in page.text
    assert f"({len(hostile) + 50_000:,} characters)" in page.text
    assert not re.search("[\x00\u202e]", page.source)
    assert "x" * 301 not in page.source


def test_lost_training_data_leaves_the_ids_and_a_note(finished: RunFolder) -> None:
    (finished.path.parent / "train.jsonl").unlink()
    text = Page(write_report(finished.path)).text
    assert "only ids are shown" in text
    assert "train.jsonl" in text
    assert f"{WRONG} 0.12 wrong?" in text
    assert "text of" not in text


def test_training_data_that_has_shrunk_is_not_taken_for_the_old_one(finished: RunFolder) -> None:
    (finished.path.parent / "train.jsonl").write_text('{"text": "new", "label": "a"}\n')
    text = Page(write_report(finished.path)).text
    assert "fewer rows than when it was scored" in text
    assert "only ids are shown" in text


def test_samples_split_off_for_validation_keep_their_own_texts(tmp_path: Path) -> None:
    run = start(tmp_path, rows(300))
    kept = scores(ids=np.arange(SAMPLES) + 100)
    kept.to_parquet(run.scores)
    text = Page(write_report(run.path)).text
    assert f"no b text of {WRONG + 100}" in text


def test_pairs_templates_and_chats_are_shown_as_configured(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    table = [{"a": f"left {i}", "b": i, "chat": turns} for i in range(SAMPLES)]
    shapes: list[tuple[dict[str, Any], str, str]] = [
        ({"text": ["a", "b"], "target": "b"}, "regression", "7 left 7 ‖ 7"),
        ({"text": "{a}: {b}", "target": "<{a}>"}, "causal-lm", "<left 7> left 7: 7"),
        ({"messages": "chat"}, "causal-lm", "assistant: because user: why?"),
        ({"text": "a"}, "causal-lm", "left 7"),
    ]
    for i, (data, task, shown) in enumerate(shapes):
        folder = tmp_path / str(i)
        folder.mkdir()
        run = start(folder, table, data=data, task=task)
        scores().to_parquet(run.scores)
        assert shown in Page(write_report(run.path)).text


def test_where_nothing_is_doubtful_nobody_is_accused(tmp_path: Path) -> None:
    run = start(tmp_path, rows())
    sound = scores(credibility=np.ones(SAMPLES), verdict="no sign of wrong targets")
    sound.to_parquet(run.scores)
    text = Page(write_report(run.path)).text
    assert "No sample is less credible than another: no sign of wrong targets." in text
    assert "wrong?" not in text


def test_a_term_that_was_not_measured_says_so(tmp_path: Path) -> None:
    run = start(tmp_path, rows())
    scores(convergence=np.full(SAMPLES, np.nan)).to_parquet(run.scores)
    assert Page(write_report(run.path)).text.count("Not measured in this run") == 1


def test_a_report_of_100_000_samples_stays_small(tmp_path: Path) -> None:
    run = start(tmp_path, [{"text": "word " * 30, "label": "ab"[i % 2]} for i in range(100_000)])
    scores(100_000).to_parquet(run.scores)
    assert write_report(run.path).stat().st_size < 200_000


# figures


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
        assert drawn.bars == drawn.selected
        assert 0 < drawn.most <= finite
        assert len(drawn.ticks) == 5


def test_a_histogram_of_a_wide_positive_range_is_logarithmic_where_that_is_allowed() -> None:
    values, every = np.geomspace(1e-3, 1e3, 100), np.ones(100, dtype=bool)
    wide = histogram(values, every, may_log=True)
    assert wide is not None
    assert wide.log
    assert wide.most <= 4
    assert histogram(values, every).log is False  # type: ignore[union-attr]
    assert histogram(np.append(values, 0.0), np.ones(101, bool), True).log is False  # type: ignore[union-attr]


@given(
    st.lists(st.floats(-1e12, 1e12, allow_subnormal=False), min_size=1, max_size=20),
)
def test_ticks_rise_and_enclose_the_values(values: list[float]) -> None:
    marks = ticks(values)
    slack = 1e-6 * max(map(abs, values))
    assert marks == sorted(set(marks))
    assert 2 <= len(marks) <= 8
    assert marks[0] <= min(values) + slack
    assert marks[-1] >= max(values) - slack


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    drawn = curves({"loss": [(float(i), float(i)) for i in range(100_000)]})
    assert drawn is not None
    points = drawn.lines[0][1].split()
    assert 250 <= len(points) <= 300
    assert points[0].startswith("1") or points[0].startswith("0")
    assert float(points[-1].split(",")[0]) > 630
    assert curves({"loss": [(1.0, float("nan"))], "eval": []}) is None


def test_stacks_and_modules_outside_them_have_tables_of_their_own() -> None:
    names = ["encoder.layer.0.q", "encoder.layer.1.q", "decoder.layer.0.q", "head"]
    found = grids(dict.fromkeys(names, 2))
    assert [(g.title, g.columns, [label for label, _ in g.rows]) for g in found] == [
        ("encoder.layer", ["q"], ["0", "1"]),
        ("decoder.layer", ["q"], ["0"]),
        ("", [""], ["head"]),
    ]
    assert kind_of("encoder.layer.1.q") == "encoder.layer.*.q"
    assert kind_of("head") == "head"


def test_the_experts_of_a_large_mixture_share_a_cell_that_shows_their_mean() -> None:
    experts = {f"layers.0.experts.{i}.up": float(i % 2) for i in range(100)}
    (table,) = grids({**experts, "layers.0.q": 4.0})
    assert table.columns == ["experts.*.up", "q"]
    cell = table.rows[0][1][0]
    assert cell is not None
    assert (cell.text, cell.remark) == ("0.5", "mean of 100")


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


def test_the_synthetic_run_is_true_to_the_formats(finished: RunFolder) -> None:
    assert QualityScores.from_parquet(finished.scores).ids.tolist() == list(range(SAMPLES))
    assert RankPlan.load(finished.plan).budget == 3000
    assert [line["step"] for line in read_lines(finished.ranks)] == [40]
