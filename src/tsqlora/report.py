"""The run folder as one HTML file that needs nothing else; no model is ever loaded."""

from __future__ import annotations

import platform
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tsqlora import __version__
from tsqlora.artefacts import atomic_write_text, read_json, read_lines
from tsqlora.charts import Spec, bar_chart, line_chart, vega
from tsqlora.figures import curves, number
from tsqlora.packed import Packed, packed_json, packed_text
from tsqlora.report_ranks import Ranks, Sensitivity, ranks_part, sensitivity_part
from tsqlora.report_samples import Samples, samples_part
from tsqlora.run_folder import RunFolder

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy")
STAGES = {
    "adaptation": "brief adaptation",
    "scores": "quality scores",
    "sensitivity": "layer sensitivity",
    "training": "training",
}
SPLITS = {"base": "untouched model", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Metrics:
    """A row a metric, a column a split, and the one figure that comes first.

    `base`, the untouched model, was measured on the first of the other splits; `untouched` is its
    figure beside the first one, where it has one. `trained`: whether there are other splits.
    """

    splits: list[str]
    rows: list[tuple[str, list[float | None]]]
    headline: tuple[str, str, float | None] | None
    untouched: float | None
    trained: bool


@dataclass(frozen=True)
class Stage:
    """What a stage cost, and its share of all seconds."""

    name: str
    seconds: float
    passes: float
    share: float


@dataclass(frozen=True)
class Cost:
    """What the run cost; the peak of memory in bytes."""

    stages: list[Stage]
    seconds: float
    passes: float
    memory: float | None
    parameters: int | None


@dataclass(frozen=True)
class Training:
    """What was logged while training: a title and a chart for each; the last training loss."""

    charts: list[tuple[str, Spec]]
    steps: int
    last: float | None


def write_report(run: str | Path) -> Path:
    """Write `report.html` of a run folder; what is not there yet is left out with a note.

    Raises:
        RunError: there is no run, an artefact is broken, or nothing can be written.
        ConfigError: `config.yaml` has been broken.
    """
    folder = RunFolder.open(run)
    config = folder.load_config()
    metrics = read_json(folder.metrics) if folder.metrics.exists() else {}
    cost, training = _cost(metrics.get("cost") or {}), _training(folder)
    samples, ranks = samples_part(folder, config), ranks_part(folder)
    sensitivity = sensitivity_part(folder)
    charts = _charts(cost, training, samples, ranks, sensitivity)
    page = _environment().get_template("report.html.j2")
    text = page.render(
        name=folder.path.resolve().name,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        config=config,
        configuration=folder.config.read_text(encoding="utf-8"),
        finished=folder.adapter.exists(),
        metrics=_metrics(metrics),
        cost=cost,
        samples=samples,
        sensitivity=sensitivity,
        ranks=ranks,
        training=training,
        versions=_versions(),
        nonce=secrets.token_urlsafe(16),
        pieces=_pieces(charts, samples, ranks),
    )
    atomic_write_text(folder.report, text.encode("utf-8", "replace").decode())
    return folder.report


def _charts(
    cost: Cost | None,
    training: Training | None,
    samples: Samples | None,
    ranks: Ranks | None,
    sensitivity: Sensitivity | None,
) -> dict[str, Spec]:
    """Every chart by the name that the template gives its place."""
    charts: dict[str, Spec] = {}
    if cost:
        rows = [(stage.name, "seconds", stage.seconds) for stage in cost.stages]
        charts["cost"] = bar_chart("Seconds of each stage", rows, ",.3~r")
    for i, (_, chart) in enumerate(training.charts if training else ()):
        charts[f"training-{i}"] = chart
    for what, part in (("rank", ranks), ("sensitivity", sensitivity)):
        for i, grid in enumerate(part.grids if part else ()):
            charts[f"{what}-{i}"] = grid.chart
    for term in samples.terms if samples else ():
        if term.chart:
            charts[f"term-{term.name}"] = term.chart
    if samples and samples.shares_chart:
        charts["shares"] = samples.shares_chart
    return charts


def _pieces(charts: dict[str, Spec], samples: Samples | None, ranks: Ranks | None) -> list[Packed]:
    """What the page unpacks: the samples first, as they are shown first."""
    page = {
        "charts": charts,
        "moments": ranks.moments if ranks else [],
        "samples": samples.table.notes if samples else None,
    }
    table = samples.table.pieces if samples else []
    library = [packed_text("vega", vega())] if charts else []
    return [packed_json("page", page), *table, *library]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tsqlora", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = lambda part: f"{100 * part:.1f} %"
    environment.filters["seconds"] = _duration
    environment.filters["words"] = lambda name: name.replace("_", " ")
    return environment


def _metrics(metrics: Mapping[str, Any]) -> Metrics | None:
    measured = [split for split in SPLITS if metrics.get(split)]
    trained = [split for split in measured if split != "base"]
    if not measured:
        return None
    names = list(dict.fromkeys(name for split in measured for name in metrics[split]))
    rows = [(name, [metrics[split].get(name) for split in measured]) for name in names]
    headline = untouched = None
    if trained:
        split = trained[0] if "base" in measured else trained[-1]
        name, value = next(iter(metrics[split].items()))
        headline, untouched = (name, split, value), metrics.get("base", {}).get(name)
    titles = [_title(split, trained) for split in measured]
    return Metrics(titles, rows, headline, untouched, bool(trained))


def _title(split: str, trained: list[str]) -> str:
    return SPLITS[split] + (f" ({trained[0]})" if split == "base" and trained else "")


def _cost(cost: Mapping[str, Any]) -> Cost | None:
    """Stage by stage where that was kept, else scoring and training."""
    stages = cost.get("stages") or {
        stage: {"seconds": cost[f"{stage}_seconds"], "passes": cost.get(f"{stage}_passes")}
        for stage in ("scoring", "training")
        if cost.get(f"{stage}_seconds") is not None
    }
    if not stages:
        return None
    seconds = {name: float(stage["seconds"] or 0) for name, stage in stages.items()}
    passes = {name: float(stage["passes"] or 0) for name, stage in stages.items()}
    total = sum(seconds.values())
    return Cost(
        [Stage(STAGES.get(n, n), s, passes[n], s / (total or 1.0)) for n, s in seconds.items()],
        total,
        sum(passes.values()),
        cost.get("peak_memory_bytes"),
        cost.get("trainable_parameters"),
    )


def _training(folder: RunFolder) -> Training | None:
    """From `train_log.jsonl`, or from the newest checkpoint while training is not finished."""
    log = read_lines(folder.train_log) or _checkpoint_log(folder)
    logged = [key for key in dict.fromkeys(k for entry in log for k in entry) if _plotted(key)]
    series = {key: [(e["step"], e[key]) for e in log if _has(e, key)] for key in logged}
    losses = curves({"training": series.pop("loss", []), "validation": series.pop("eval_loss", [])})
    if not losses:
        return None
    last = losses["training"][-1][1] if "training" in losses else None
    others = {_titled(key): curves({key: points}) for key, points in series.items()}
    charts = {"loss": losses, **{title: found for title, found in others.items() if found}}
    return Training(
        [(title, line_chart(title, found)) for title, found in charts.items()],
        max(int(entry["step"]) for entry in log if "step" in entry),
        last,
    )


_UNPLOTTED = re.compile(
    r"epoch|step|total_flos|train_.*|rank/.*|ranks/m(in|ax)|.*(_runtime|_per_second|_time)"
)


def _plotted(key: str) -> bool:
    return not _UNPLOTTED.fullmatch(key)


def _titled(key: str) -> str:
    """`eval_f1`, which the Trainer logs, is f1 on the validation data."""
    named = key.removeprefix("eval_").replace("_", " ").replace("/", ", ")
    return f"{named}, validation" if key.startswith("eval_") else named


def _has(entry: Mapping[str, Any], key: str) -> bool:
    number = isinstance(entry.get(key), int | float)
    return number and entry.get("step") is not None


def _checkpoint_log(folder: RunFolder) -> list[dict[str, Any]]:
    states = list(folder.checkpoints.glob("**/trainer_state.json"))
    if not states:
        return []
    newest = max((read_json(state) for state in states), key=lambda s: s.get("global_step") or 0)
    return list(newest.get("log_history") or [])


def _versions() -> dict[str, str]:
    packages = {package: _version(package) for package in PACKAGES}
    return {"tsqlora": __version__, "python": platform.python_version(), **packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
