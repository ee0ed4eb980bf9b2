"""The laws of the evidence's harness: data, statistics and claims, none of the training."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mutual_info_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import evidence_methods
import evidence_schedule
import evidence_stats
from common import append_line, read_lines
from evidence_cell import Cell
from evidence_claims import claims
from evidence_data import CONDITIONS, CORE, TASKS, TRUSTED, Task, make_cell, more_tasks
from evidence_methods import METHODS
from evidence_plain import and_trusted, worth
from evidence_pool import Job, measured_all
from evidence_schedule import Schedule, pair_of
from evidence_stats import Cells, bootstrap, closed, difference, mean_interval
from evidence_tables import front_page, in_order, tables
from evidence_tuning import TUNED_ON, best_rate, for_tuning, tried, untried

from tsqlora.config import RunConfig
from tsqlora.errors import ConfigError

CLASSES = ("a", "b", "c")


def line(method: str, seed: int, metric: float, **named: Any) -> dict[str, Any]:
    """A cell's line, as the harness writes it."""
    base = {"task": "mine", "condition": "wrong20", "method": method, "seed": seed,
            "metric_name": "accuracy", "metric": metric, "cost": 1.0, "seconds_ratio": 1.0,
            "adapter_parameters": 10, "notes": {}}  # fmt: skip
    return {**base, **named}


def five(method: str, metrics: list[float], **named: Any) -> list[dict[str, Any]]:
    """A line a seed."""
    return [line(method, seed, metric, **named) for seed, metric in enumerate(metrics)]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file of tasks whose data and model are nobody else's."""
    rows = [{"says": f"row {i} of it", "class": CLASSES[i % 3]} for i in range(TRUSTED + 500)]
    for name, part in (("train", rows), ("test", rows[:30])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    entry = {"name": "mine", "kind": "classification", "model": "someone/encoder",
             "train": "train.jsonl", "test": "test.jsonl", "text": "says", "target": "class",
             "metric": "accuracy", "validation_rows": 100}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps([entry]), encoding="utf-8")
    return tmp_path / "mine.json"


def test_a_task_of_ones_own_is_found_beside_its_file(own: Path) -> None:
    task = more_tasks(own)["mine"]
    assert Path(task.train) == own.parent / "train.jsonl"
    assert task.model == "someone/encoder"
    assert task.rates == TASKS["trec"].rates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "nothing"}, "task 'mine': its files have no column 'nothing'"),
        ({"colour": "red"}, "task 'mine': .*unexpected keyword argument 'colour'"),
        ({"metric": None, "text": "{says} {}"}, "may hold only plain"),
        ({"train": "absent.jsonl"}, "task 'mine': .*absent.jsonl"),
        ({"validation_rows": 500}, "800 rows leave none to train on beside 300 trusted"),
    ],
)
def test_a_task_of_ones_own_that_cannot_be_run_is_refused_by_name(
    own: Path, change: dict[str, Any], message: str
) -> None:
    (entry,) = json.loads(own.read_text())
    own.write_text(json.dumps([{**entry, **change}]))
    with pytest.raises(ConfigError, match=message):
        more_tasks(own)


@pytest.mark.parametrize("text", ["", "{", '{"name": "mine"}', "[1]"])
def test_a_file_of_tasks_that_is_none_is_refused(own: Path, text: str) -> None:
    own.write_text(text)
    with pytest.raises(ConfigError, match=r"--more: .*mine\.json"):
        more_tasks(own)


def test_templates_and_tokenizers_of_ones_own_are_read_as_a_configuration_reads_them(
    own: Path,
) -> None:
    (entry,) = json.loads(own.read_text())
    (own.parent / "spelling").mkdir()
    more = {"text": "{says}\nThe class is ", "settings": {"tokenizer": "spelling"}}
    own.write_text(json.dumps([{**entry, **more}]))
    task = more_tasks(own)["mine"]
    for condition in CONDITIONS:
        data = make_cell(task, condition, 0)
        assert set(data.train[0]) == {"id", "says", "class"}
    cell = Cell(task, "clean", "lora", 0, data, own.parent, 1e-3, 1)
    assert cell.config().tokenizer == str(own.parent / "spelling")


def test_trusted_rows_join_train_as_sound_rows_at_the_same_budget(own: Path) -> None:
    task = more_tasks(own)["mine"]
    data = make_cell(task, "wrong40", 0)
    cell = Cell(task, "wrong40", "lora_trusted", 0, data, own.parent, 1e-3, 3)
    both = and_trusted(cell)
    assert (both.budget, both.steps) == (cell.budget, cell.steps)
    rows = [json.loads(row) for row in Path(both.config().data.train).read_text().splitlines()]
    assert rows[: len(data.train)] == data.train
    assert [row.pop("id") for row in rows] == list(range(len(data.train) + TRUSTED))
    assert rows[len(data.train) :] == data.trusted
    assert max(both.data.wrong) < len(data.train)


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("tsqlora")])
def test_every_form_of_the_method_is_a_configuration_that_is_accepted(
    own: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    class Started(Exception):
        """No training: a configuration was made."""

    def start(config: RunConfig) -> None:
        raise Started

    task = more_tasks(own)["mine"]
    data = make_cell(task, "wrong20", 0)
    monkeypatch.setattr(evidence_methods.Run, "start", start)
    with pytest.raises(Started):
        METHODS[method](Cell(task, "wrong20", method, 0, data, own.parent, 1e-3, 3))


@pytest.mark.parametrize("method", [name for name in METHODS if name.endswith("_trusted")])
def test_a_method_takes_the_same_rate_with_trusted_rows_as_without(method: str) -> None:
    assert pair_of(("sst2", "clean", method, 0)) == pair_of(
        ("sst2", "clean", method.removesuffix("_trusted"), 0)
    )


def trials(task: Task, folder: Path, worth: Callable[[float], float]) -> list[float]:
    """The rates that are tried, in their order, where each comes to what it is worth."""
    file, asked = folder / "evidence_tuning.jsonl", list[float]()
    while missing := untried(task, tried(task, "lora", folder)):
        for condition, seed, rate in missing:
            asked += [] if rate in asked else [rate]
            line = {"task": task.name, "method": "lora", "condition": condition, "seed": seed,
                    "rate": rate, "validation": worth(rate)}  # fmt: skip
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line) + "\n")
    assert len(file.read_text().splitlines()) == len(asked) * len(TUNED_ON) * task.tuning_seeds
    assert pair_of((task.name, "clean", "oracle", 0)) == (task.name, "lora")
    assert best_rate(task, tried(task, "lora", folder)) == max(asked, key=worth)
    return asked


@pytest.mark.parametrize(
    ("name", "best", "more"),
    [("trec", 2e-3, []), ("trec", 1e-2, [8e-3, 1.6e-2]), ("trec", 6e-4, [5e-4, 2.5e-4]),
     ("mrpc", 5e-4, [])],
)  # fmt: skip
def test_a_rate_is_tuned_until_the_best_is_not_at_an_edge(
    name: str, best: float, more: list[float], tmp_path: Path
) -> None:
    asked = trials(TASKS[name], tmp_path, lambda rate: -abs(math.log(rate / best)))
    assert asked == [*TASKS[name].rates, *more]


def test_rates_that_are_all_alike_are_not_tried_for_ever(tmp_path: Path) -> None:
    assert trials(TASKS["trec"], tmp_path, lambda rate: 9.0) == [*TASKS["trec"].rates]


@dataclass(frozen=True)
class Fails(Job):
    """A cell that fails for odd seeds."""

    def line(self) -> dict[str, Any]:
        if self.seed % 2:
            raise ValueError("odd")
        return {"seed": self.seed}


@pytest.mark.parametrize("at_once", [ThreadPoolExecutor, lambda _: nullcontext()])
def test_a_cell_that_fails_is_named_when_all_others_are_done(at_once: Callable[..., Any]) -> None:
    jobs = [Fails(TASKS["trec"], "clean", "lora", seed, 1e-3) for seed in range(5)]
    with at_once(2) as pool:
        lines = measured_all(jobs, pool, "cells")
        found = {(job.seed, line["seed"]) for job, line in islice(lines, 3)}
        with pytest.raises(SystemExit, match="2 cells failed") as end:
            next(lines)
    assert found == {(0, 0), (2, 2), (4, 4)}
    assert "('trec', 'clean', 'lora', 3): ValueError: odd" in str(end.value)


def test_no_rate_is_taken_before_all_trials_are_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has not all rates on trec"):
        best_rate(TASKS["trec"], tried(TASKS["trec"], "lora", tmp_path))


def test_rates_and_cells_of_another_budget_are_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(evidence_schedule, "Job", told(asked, lambda rate: 1.0))
    trials(TASKS["trec"], tmp_path, lambda rate: -abs(math.log(rate / 2e-3)))
    cells = [("trec", "clean", "lora", 0)]
    of_rates = len(TASKS["trec"].rates) * len(TUNED_ON) * TASKS["trec"].tuning_seeds
    for epochs, measured in ((None, 1), (1.0, of_rates + 1), (1.0, 0), (None, 1)):
        asked.clear()
        Schedule(tmp_path, [("trec", "lora")], cells, epochs).measure(None)
        assert len(asked) == measured


def test_a_line_cut_off_in_the_middle_costs_itself_alone(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    append_line(file, {"notes": {}, "metric": 1.0})
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole + whole[:cut])
        append_line(file, {"metric": 2.0})
        found = [line["metric"] for line in read_lines(file)]
        assert found in ([1.0, 2.0], [1.0, 1.0, 2.0] if cut == len(whole) - 1 else [])


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    alone, refused = (
        evidence_schedule._alone(tmp_path / "evidence.jsonl"),
        pytest.raises(SystemExit, match="being written by another run"),
    )
    with alone, refused:
        Schedule(tmp_path, []).measure(None)
    Schedule(tmp_path, []).measure(None)


def test_a_cell_is_measured_again_once_its_rate_is_not_the_tuned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(evidence_schedule, "Job", told(asked, lambda rate: 1.0))
    cells = [("trec", "clean", "lora", s) for s in range(2)]
    for best, wanted in ((2e-3, [2e-3, 2e-3]), (1e-3, [1e-3, 1e-3]), (1e-3, [])):
        (tmp_path / "evidence_tuning.jsonl").unlink(missing_ok=True)
        trials(TASKS["trec"], tmp_path, lambda rate, best=best: -abs(math.log(rate / best)))
        asked.clear()
        Schedule(tmp_path, [("trec", "lora")], cells).measure(None)
        assert asked == wanted
    assert len((tmp_path / "evidence.jsonl").read_text().splitlines()) == 4


def told(asked: list[float], worth: Callable[[float], float]) -> type[Job]:
    """Jobs that are done at once: their rate is put down, and what it is worth is the metric."""

    @dataclass(frozen=True)
    class Told(Job):
        def line(self) -> dict[str, Any]:
            asked.append(self.rate)
            names = dict(zip(("task", "condition", "method", "seed"), self.key, strict=True))
            known = {"metric": 1.0, "cost": 1.0, "seconds": 1.0, "versions": {}, "at": ""}
            config = {"learning_rate": self.rate, "epochs": self.epochs or self.task.epochs}
            return {**names, **known, "config": config, "validation": worth(self.rate)}

    return Told


@pytest.mark.parametrize("at_once", [ThreadPoolExecutor, lambda _: nullcontext()])
def test_a_cell_follows_as_soon_as_its_rate_is_known_and_no_other_waits_for_it(
    at_once: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials(TASKS["trec"], tmp_path, lambda rate: -abs(math.log(rate / 1e-3)))  # plain LoRA's
    asked: list[float] = []
    job = told(asked, lambda rate: -abs(math.log(rate / 8e-3)))
    monkeypatch.setattr(evidence_schedule, "Job", job)
    cells = [("trec", "clean", method, 0) for method in ("eva", "oracle")]
    with at_once(1) as pool:
        Schedule(tmp_path, [pair_of(cell) for cell in cells], cells).measure(pool)
    seeds = len(TUNED_ON) * TASKS["trec"].tuning_seeds
    assert asked == [
        *TASKS["trec"].rates * seeds, 1e-3, *[8e-3] * seeds, *[1.6e-2] * seeds, 8e-3,
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "evidence.jsonl").read_text().splitlines()]
    assert [(each["method"], each["config"]["learning_rate"]) for each in lines] == [
        ("oracle", 1e-3),
        ("eva", 8e-3),
    ]


def test_of_a_cell_measured_again_the_last_line_counts() -> None:
    cells = Cells(in_order([line("lora", 0, 50.0), line("tsqlora", 0, 1.0), line("lora", 0, 60.0)]))
    assert [x["metric"] for x in cells.lines.values() if x["method"] == "lora"] == [60.0]


def test_rates_are_judged_on_rows_of_no_cell(own: Path) -> None:
    task = replace(more_tasks(own)["mine"], samples=300)
    tuning = for_tuning(task)
    assert tuning.validation_rows == 200
    assert len(make_cell(tuning, "clean", 0).train) == 300


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_cell_is_a_function_of_its_key_and_its_test_rows_are_never_damaged(
    own: Path, condition: str
) -> None:
    task = more_tasks(own)["mine"]
    cell, clean = make_cell(task, condition, 3), make_cell(task, "clean", 3)
    assert cell == make_cell(task, condition, 3)
    assert cell.test == clean.test
    assert cell.trusted == clean.trusted
    assert bool(cell.rare) == (condition == "longtail")


@pytest.mark.parametrize(("condition", "share"), [("wrong20", 0.2), ("wrong40", 0.4)])
def test_as_many_targets_are_wrong_as_the_condition_says_and_exactly_those_are_named(
    own: Path, condition: str, share: float
) -> None:
    task = more_tasks(own)["mine"]
    cell, clean = make_cell(task, condition, 0), make_cell(task, "clean", 0)
    differ = {a["id"] for a, b in zip(cell.train, clean.train, strict=True) if a != b}
    assert differ == cell.wrong
    assert len(differ) == round(share * len(clean.train))
    wrong = sum(a != b for a, b in zip(cell.validation, clean.validation, strict=True))
    assert wrong == round(share * len(clean.validation))


def test_the_long_tail_takes_its_rows_from_the_rare_class_alone(own: Path) -> None:
    task = more_tasks(own)["mine"]
    cell, clean = make_cell(task, "longtail", 0), make_cell(task, "clean", 0)

    def count(rows: list[dict[str, Any]], name: str) -> int:
        return sum(row["class"] == name for row in rows)

    assert count(cell.train, "c") < 0.2 * count(clean.train, "c")
    assert [count(cell.train, x) for x in "ab"] == [count(clean.train, x) for x in "ab"]
    assert {cell.test[i]["class"] for i in cell.rare} == {"c"}


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8), st.floats(-5, 5))
@settings(max_examples=20)
def test_a_difference_that_is_the_same_in_every_pair_has_an_interval_of_no_width(
    plain: list[float], by: float
) -> None:
    group = np.array([[value + by, value] for value in plain])
    found = bootstrap([group], difference)
    assert np.allclose([found.mean, found.low, found.high], by)


@pytest.mark.parametrize("sizes", [(5,), (10,), (5, 5, 5)])
def test_a_paired_interval_holds_the_truth_in_95_of_100_cases(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_stats, "DRAWS", 300)
    rng, cases = np.random.default_rng(0), 400
    held = 0
    for _ in range(cases):
        found = bootstrap([rng.normal(size=(size, 2)) for size in sizes], difference)
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / cases <= 0.98


@given(st.lists(st.floats(0, 100), min_size=3, max_size=8))
def test_the_interval_of_a_mean_holds_it_in_the_middle(values: list[float]) -> None:
    assume(np.ptp(values) > 1e-3)
    found = mean_interval(values)
    students = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert np.allclose([found.low, found.high], list(students))
    assert np.isclose(found.mean - found.low, found.high - found.mean)
    assert found.low <= np.mean(values) + 1e-9


@given(st.integers(2, 8), st.integers(1, 50), st.integers(0, 50))
def test_a_target_is_worth_what_it_shares_with_the_true_one(
    classes: int, amiss: int, more: int
) -> None:
    right = amiss * (classes - 1) + more
    counts = np.full((classes, classes), amiss) + (right - amiss) * np.eye(classes, dtype=int)
    wrong = amiss * (classes - 1) / counts[0].sum()
    shared = mutual_info_score(None, None, contingency=counts) / math.log(classes)
    assert worth(classes, wrong) == pytest.approx(shared, abs=1e-9)
    assert worth(classes, wrong) <= 1 - wrong  # there are so many sound rows
    assert worth(classes, 0) == 1


def test_the_part_of_the_gap_is_that_of_all_tasks_together() -> None:
    easy, hard = np.array([[10.0, 0.0, 10.0]]), np.array([[0.0, 0.0, 30.0]])
    assert closed([easy]) == 100
    assert closed([easy, hard]) == 25
    assert np.isnan(closed([np.array([[1.0, 1.0, 1.0]])]))


def found(lines: list[dict[str, Any]], start: str) -> str:
    rows = claims(Cells(lines), ["mine"]).splitlines()
    return next(row for row in rows if row.startswith(f"| {start}")).split("|")[-2].strip()


def test_a_claim_holds_by_its_whole_interval_and_is_open_below_five_seeds() -> None:
    plain, oracle = five("lora", [50.0] * 5), five("oracle", [60.0] * 5)
    assert found([*plain, *oracle, *five("tsqlora", [59.0] * 5)], "2.") == "yes"
    assert found([*plain, *oracle, *five("tsqlora", [59, 59, 59, 59, 52.0])], "2.") == "no"
    assert found([*plain, *oracle, *five("tsqlora", [59.0] * 4)], "2.").startswith("open")


def test_the_rare_classs_recall_is_compared_where_it_was_measured() -> None:
    rare = {"condition": "longtail"}
    lines = [
        *five("lora", [90.0] * 5, rare=20.0, **rare),
        *five("tsqlora", [80.0] * 5, rare=25.0, **rare),
    ]
    assert found(lines, "9.") == "yes"


def test_tables_show_every_task_and_method_with_its_seeds() -> None:
    lines = [*five("lora", [50.0, 52.0]), *five("tsqlora", [58.0, 60.0])]
    text = tables(Cells(lines))
    assert "`lora` | 51.0 ± 12.7 (2)" in text
    assert "`tsqlora` | 59.0 ± 12.7 (2)" in text
    assert "| `tsqlora` | 8.0 [8.0, 8.0] (1) |" in text


def test_trusted_rows_are_compared_with_plain_lora_on_the_same_rows() -> None:
    known = (("lora", 50.0), ("lora_trusted", 55.0), ("tsqlora_trusted", 60.0))
    text = tables(Cells([x for method, metric in known for x in five(method, [metric] * 5)]))
    assert "| `lora_trusted` | 5.0 [5.0, 5.0] (1) |" in text
    assert "| `tsqlora_trusted` − `lora_trusted` | 5.0 [5.0, 5.0] (1) |" in text


def test_a_share_that_was_not_looked_for_is_left_out_of_the_mean() -> None:
    notes = {"auroc_credibility": 0.5, "auroc_loss": 0.5}
    lines = [
        line("tsqlora", seed, 50.0, notes={**notes, "wrong_share": share})
        for seed, share in enumerate([0.1, None, 0.3])
    ]
    assert "| 0.200 (2 of 3) |" in tables(Cells(lines))


def test_means_are_taken_over_the_core_tasks_where_there_are_any() -> None:
    both = (("lora", 50.0), ("oracle", 70.0), ("tsqlora", 60.0))
    core = [x for method, metric in both for x in five(method, [metric] * 5, task="trec")]
    own = [*five("lora", [10.0] * 5), *five("oracle", [20.0] * 5), *five("tsqlora", [90.0] * 5)]
    means, claimed = (r"| `tsqlora` | 10.0 [10.0, 10.0] (1) |", "50.0 % [50.0, 50.0] (1 tasks")
    for lines in (core, [*core, *own]):
        assert means in tables(Cells(lines))
        assert claimed in tables(Cells(lines))
    assert "| `tsqlora` | 80.0 [80.0, 80.0] (1) |" in tables(Cells(own))


def test_a_task_of_one_seed_narrows_no_interval_beside_those_of_more() -> None:
    known = [*five("lora", [50.0] * 5), *five("eva", [50.0, 52.0, 54.0, 56.0, 58.0])]
    known = [{**x, "task": "trec"} for x in known]
    alone = [line("lora", 0, 50.0, task="sst2"), line("eva", 0, 90.0, task="sst2")]
    (wanted,) = [
        row for row in tables(Cells(known)).splitlines() if row.startswith("| `eva` | 4.0")
    ]
    assert wanted in tables(Cells([*known, *alone]))
    assert "| `eva` | 40.0 (1) |" in tables(Cells(alone))


def test_the_front_page_shows_every_core_task_whether_the_default_wins_there_or_not() -> None:
    lines = [line(method, 0, 50.0, task=task) for task in CORE for method in ("lora", "tsqlora")]
    shown = front_page(Cells([*lines, line("adalora", 0, 99.0), line("lora", 0, 1.0, task="mine")]))
    rows = [row.split(" | ")[:2] for row in shown.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows if row[0].strip("| ")] == list(CORE)
    assert [row[1] for row in rows] == ["`lora`", "`tsqlora`", "`oracle`"] * len(CORE)


def test_methods_are_shown_in_the_order_of_their_definition_however_they_were_run() -> None:
    lines = [*five("adalora", [50.0]), *five("tsqlora", [58.0]), *five("lora", [50.0])]
    assert [x["method"] for x in in_order(lines)] == ["lora", "tsqlora", "adalora"]
    lines = [line("lora", 0, 50.0, task=task) for task in ("mine", "sst2", "g2p")]
    assert [x["task"] for x in in_order(lines)] == [
        *sorted(("sst2", "g2p"), key=list(TASKS).index),
        "mine",
    ]


def test_the_rare_are_shown_by_task_and_method() -> None:
    lines = five("lora", [90.0] * 2, rare=20.0, condition="longtail")
    text = tables(Cells([*lines, *five("tsqlora", [50.0] * 2)]))
    rare = text.split("long tail\n\n")[1].split("\n\n")[0].splitlines()
    assert rare[0] == "| task | `lora` |"
    assert "20.0 ± 0.0 (2)" in rare[2]
