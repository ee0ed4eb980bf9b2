"""Laws of the report: one file that stands alone, says what is there, and runs nobody's code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report_runs import SAMPLES, SHAPES, WRONG, Page, fill, rows, scores, start
from runs import write_rows
from tsqlora.allocation import RankPlan
from tsqlora.artefacts import read_lines
from tsqlora.errors import RunError
from tsqlora.quality import QualityScores
from tsqlora.report import write_report
from tsqlora.report_table import DOUBTFUL, SELECTED, TELLING
from tsqlora.run_folder import RunFolder


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    run = start(tmp_path, rows())
    fill(run)
    return run


# the whole page


def test_a_report_needs_no_other_file_and_runs_its_own_script_alone(finished: RunFolder) -> None:
    page = Page(write_report(finished.path))
    assert not page.names() & {"link", "img", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        assert all(not name.startswith("on") for name in attributes)
        assert not {"src", "action"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert tag != "script" or attributes.get("type") == "text/plain" or "nonce" in attributes
    assert not re.search(r"url\(|@import", page.source)
    (nonce,) = [a["nonce"] for tag, a in page.tags if tag == "script" and "nonce" in a]
    policy = next(a for t, a in page.tags if t == "meta" and "http-equiv" in a)["content"] or ""
    assert "default-src 'none'" in policy
    assert f"script-src 'nonce-{nonce}';" in policy
    assert "unsafe-eval" not in policy


def test_what_is_logged_beside_the_loss_is_drawn_but_not_every_modules_rank(
    finished: RunFolder,
) -> None:
    beside = {"ranks/mean": 4.0, "quality/mean_credibility": 0.9, "rank/layer.0.q": 3}
    write_rows(finished.train_log, [{"step": s, "loss": 1.0, **beside} for s in (10, 20)])
    charts = Page(write_report(finished.path)).packed("page")["charts"]
    said = [chart["description"] for name, chart in charts.items() if name.startswith("training")]
    drawn = ["loss", "ranks, mean", "quality, mean credibility"]
    assert said == [f"{title} by optimizer step" for title in drawn]


def test_no_two_reports_let_in_the_same_script(finished: RunFolder) -> None:
    first, second = (write_report(finished.path).read_text() for _ in range(2))
    assert re.findall("nonce-[^']+", first) != re.findall("nonce-[^']+", second)


def test_a_report_tells_what_was_trained_and_at_what_cost(finished: RunFolder) -> None:
    text = Page(write_report(finished.path)).text
    assert "some/model was fine-tuned for classification" in text
    assert "of which 50 (25.0 %) were drawn" in text
    assert "About 10% look wrong." in text
    assert "loss on validation is 1.250 , against 2.500 of the untouched model." in text
    assert "metric untouched model (validation) validation loss 2.500 1.250 f1 – –" in text
    assert "scoring 1 min 15 s 25.0 % 400" in text
    assert "training 3 min 45 s 75.0 % 600" in text
    assert "2.00 GB" in text
    assert "temperature: 1.0" in text
    assert re.search(r"tsqlora \d", text)


def test_a_classifier_has_no_untouched_model_to_compare_and_says_so(finished: RunFolder) -> None:
    metrics = json.loads(finished.metrics.read_text())
    del metrics["base"]
    finished.metrics.write_text(json.dumps(metrics))
    assert "untouched model has no head" in Page(write_report(finished.path)).text


def test_every_rank_stands_in_a_table_with_an_arrow_where_it_moved(finished: RunFolder) -> None:
    page = Page(write_report(finished.path))
    assert "0 6↓ 8 1 7 6 2 5 5↑" in page.text
    assert "prefers-color-scheme: dark" in page.source


def test_every_module_can_be_seen_as_it_was_after_each_reallocation(finished: RunFolder) -> None:
    page = Page(write_report(finished.path)).packed("page")
    planned, moved = page["moments"]
    assert (planned["label"], planned["total"]) == ("as planned", 39)
    assert (moved["label"], moved["total"]) == ("after step 40", 37)
    labels = [[cell["label"] for cell in m["stacks"][0]] for m in (planned, moved)]
    assert labels == [["9", "8", "7", "6", "5", "4"], ["6↓", "8", "7", "6", "5", "5↑"]]
    assert page["charts"]["rank-0"]["data"]["values"] == moved["stacks"][0]
    modules = [cell["module"] for stack in moved["stacks"] for cell in stack]
    assert modules == list(SHAPES)


def test_every_chart_has_a_place_and_every_place_a_chart(finished: RunFolder) -> None:
    page = Page(write_report(finished.path))
    places = [a["data-chart"] for _, a in page.tags if "data-chart" in a]
    charts = page.packed("page")["charts"]
    assert sorted(filter(None, places)) == sorted(charts)
    assert all(chart["description"] for chart in charts.values())
    assert "accuracy, validation" in {charts[f"training-{i}"]["description"][:20] for i in range(3)}
    assert {"term-credibility", "term-probability", "shares", "cost", "sensitivity-0"} <= set(
        charts
    )


def test_every_reallocation_is_a_row_with_what_it_left(finished: RunFolder) -> None:
    text = Page(write_report(finished.path)).text
    plan = RankPlan.load(finished.plan)
    left = plan.parameters - 3 * (16 + 16) + (16 + 64)
    assert f"40 −3 1 +1 1 37 {left:,} {left / plan.budget:.1%}".replace("%", " %") in text
    assert "Gained most since the plan: encoder.layer.2.output.dense 4 → 5" in text
    assert "Lost most since the plan: encoder.layer.0.attention.query 9 → 6" in text


def test_every_sample_is_in_the_page_with_text_target_scores_and_flags(finished: RunFolder) -> None:
    page, wanted = Page(write_report(finished.path)), scores()
    assert page.notes["count"] == SAMPLES
    assert page.packed("id").tolist() == list(range(SAMPLES))
    assert page.texts == [row["text"] for row in rows()]
    assert [page.notes["classes"][i] for i in page.packed("class")] == [r["label"] for r in rows()]
    for name in ("loss", "gradient_norm", "loss_reduction", "convergence", "quality"):
        np.testing.assert_allclose(page.packed(name), getattr(wanted, name), rtol=1e-3)
    np.testing.assert_allclose(page.packed("drawn"), wanted.probability * SAMPLES, rtol=1e-3)
    flags = page.packed("flags")
    assert np.flatnonzero(flags & DOUBTFUL).tolist() == [WRONG]
    assert ((flags & SELECTED) > 0).tolist() == wanted.selected.tolist()
    assert np.flatnonzero(flags & TELLING).tolist() == list(range(SAMPLES - 20, SAMPLES))
    assert "likely wrong (1)" in page.text
    assert "most informative (20)" in page.text


def test_predictions_of_classes_are_shown_by_name(tmp_path: Path) -> None:
    run = start(tmp_path, rows())
    predicted = np.where(np.arange(SAMPLES) % 4 == 0, 1, -1).astype(np.int32)
    scores(prediction=predicted).to_parquet(run.scores)
    page = Page(write_report(run.path))
    assert page.notes["classes"] == ["a", "b"]
    assert page.packed("prediction").tolist() == (predicted + 1).tolist()
    assert "prediction is not the target" in page.text


def test_predictions_of_numbers_are_numbers(tmp_path: Path) -> None:
    table = [{"text": "t", "label": i / 10} for i in range(SAMPLES)]
    run = start(tmp_path, table, task="regression")
    predicted = np.linspace(-3, 3, SAMPLES, dtype=np.float32)
    scores(prediction=predicted).to_parquet(run.scores)
    page = Page(write_report(run.path))
    np.testing.assert_allclose(page.packed("prediction"), predicted, rtol=1e-3)
    assert page.packed("target").split("\n")[3] == "0.3"
    assert "prediction is not the target" not in page.text


def test_generation_says_that_there_are_no_predictions(tmp_path: Path) -> None:
    run = start(tmp_path, rows(), task="seq2seq")
    scores().to_parquet(run.scores)
    assert "There are no predictions" in Page(write_report(run.path)).text


def test_near_duplicates_are_found_whatever_their_targets(tmp_path: Path) -> None:
    table = [{"text": f"{i} alone", "label": "ab"[i % 2]} for i in range(SAMPLES)]
    for i, text in {
        3: "The same words.",
        8: "the same WORDS",
        9: "天気がいい",
        11: "天気がいい",
    }.items():
        table[i]["text"] = text
    run = start(tmp_path, table)
    scores().to_parquet(run.scores)
    page = Page(write_report(run.path))
    group = page.packed("group")
    assert {i: int(group[i]) for i in np.flatnonzero(group)} == {3: 1, 8: 1, 9: 2, 11: 2}
    assert "near-duplicates (4)" in page.text


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


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "]]>",
    "{{ 7 * 7 }}",
    "</td></table><img src=x onerror=alert(1)>",
    "&lt;b&gt; \"'",
    "line\u2028end\u2029end",
    "\u202egnp.exe",
    "\x00\x1b",
    "<b onclick='x'>b</b>",
    "y" * 50_000,
]


def test_hostile_texts_are_packed_whole_and_are_no_markup(tmp_path: Path) -> None:
    given_rows = [
        {"text": HOSTILE[i % len(HOSTILE)], "label": HOSTILE[i % 3]} for i in range(SAMPLES)
    ]
    run = start(tmp_path, given_rows, model="<script>m</script>")
    scores().to_parquet(run.scores)
    page = Page(write_report(run.path))
    assert not page.names() & {"img", "b onclick"}
    assert [a for t, a in page.tags if t == "script" and a.get("type") != "text/plain"] == [
        {"nonce": page.scripts[-1][0]["nonce"]}
    ]
    assert "alert" not in "".join(data for _, data in page.scripts)
    assert page.texts[:3] == HOSTILE[:3]
    assert page.texts[7] == "line end end"
    assert page.texts[11] == "y" * 2000 + " … (50,000 characters)"
    assert page.notes["classes"] == sorted(HOSTILE[:3])
    assert "<script>m</script> is being fine-tuned" in page.text
    assert not re.search("[\x00\u202e\u2028]", page.source)


def test_half_a_surrogate_pair_is_a_question_mark(tmp_path: Path) -> None:
    """YAML can hold one as an escape; training data that does is refused when it is read."""
    run = start(tmp_path, [{**row, "text": "a\ud800b"} for row in rows()], model="some/\ud800")
    scores().to_parquet(run.scores)
    page = Page(write_report(run.path))
    assert "some/?" in page.text
    assert "surrogates not allowed" in page.text


def test_lost_training_data_leaves_the_ids_and_a_note(finished: RunFolder) -> None:
    (finished.path.parent / "train.jsonl").unlink()
    page = Page(write_report(finished.path))
    assert "only ids are shown" in page.text
    assert "train.jsonl" in page.text
    assert page.packed("id").tolist() == list(range(SAMPLES))
    assert page.packed("text") is page.packed("class") is page.packed("group") is None


def test_training_data_that_has_shrunk_is_not_taken_for_the_old_one(finished: RunFolder) -> None:
    (finished.path.parent / "train.jsonl").write_text('{"text": "new", "label": "a"}\n')
    text = Page(write_report(finished.path)).text
    assert "fewer rows than when it was scored" in text
    assert "only ids are shown" in text


def test_samples_split_off_for_validation_keep_their_own_texts(tmp_path: Path) -> None:
    run = start(tmp_path, rows(300))
    kept = scores(ids=np.arange(SAMPLES) + 100)
    kept.to_parquet(run.scores)
    page = Page(write_report(run.path))
    assert page.packed("id")[WRONG] == WRONG + 100
    assert page.texts[WRONG] == f"text of {WRONG + 100}"


def test_pairs_templates_and_chats_are_shown_as_configured(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    table = [{"a": f"left {i}", "b": i, "chat": turns} for i in range(SAMPLES)]
    shapes: list[tuple[dict[str, Any], str, tuple[str, str]]] = [
        ({"text": ["a", "b"], "target": "b"}, "regression", ("left 7 ‖ 7", "7")),
        ({"text": "{a}: {b}", "target": "<{a}>"}, "causal-lm", ("left 7: 7", "<left 7>")),
        ({"messages": "chat"}, "causal-lm", ("user: why?", "assistant: because")),
        ({"text": "a"}, "causal-lm", ("left 7", "")),
    ]
    for i, (data, task, shown) in enumerate(shapes):
        folder = tmp_path / str(i)
        folder.mkdir()
        run = start(folder, table, data=data, task=task)
        scores().to_parquet(run.scores)
        page = Page(write_report(run.path))
        assert (page.texts[7], page.packed("target").split("\n")[7]) == shown


def test_where_nothing_is_doubtful_nobody_is_accused(tmp_path: Path) -> None:
    run = start(tmp_path, rows())
    sound = scores(credibility=np.ones(SAMPLES), verdict="no sign of wrong targets")
    sound.to_parquet(run.scores)
    text = Page(write_report(run.path)).text
    assert "No sample is likely wrong: no sign of wrong targets." in text
    assert "likely wrong (0)" in text


def test_a_term_that_was_not_measured_says_so(tmp_path: Path) -> None:
    run = start(tmp_path, rows())
    scores(convergence=np.full(SAMPLES, np.nan)).to_parquet(run.scores)
    assert Page(write_report(run.path)).text.count("Not measured in this run") == 1


def test_the_synthetic_run_is_true_to_the_formats(finished: RunFolder) -> None:
    assert QualityScores.from_parquet(finished.scores).ids.tolist() == list(range(SAMPLES))
    assert RankPlan.load(finished.plan).budget == 3000
    assert [line["step"] for line in read_lines(finished.ranks)] == [40]
