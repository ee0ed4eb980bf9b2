"""The run folder as one HTML file that needs nothing else; no model is ever loaded."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tsqlora import __version__
from tsqlora.artefacts import atomic_write_text, read_json, read_lines
from tsqlora.figures import Curves, curves, number
from tsqlora.report_ranks import ranks_part, sensitivity_part
from tsqlora.report_samples import samples_part
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

    `base`, the untouched model, was measured on the first of the other splits.
    """

    splits: list[str]
    rows: list[tuple[str, list[float | None]]]
    headline: tuple[str, str, float | None] | None


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
    """Loss and learning rate by step; the last training loss."""

    losses: Curves
    rates: Curves | None
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
    page = _environment().get_template("report.html.j2")
    text = page.render(
        name=folder.path.resolve().name,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        config=config,
        configuration=folder.config.read_text(encoding="utf-8"),
        finished=folder.adapter.exists(),
        metrics=_metrics(metrics),
        cost=_cost(metrics.get("cost") or {}),
        samples=samples_part(folder, config),
        sensitivity=sensitivity_part(folder),
        ranks=ranks_part(folder),
        training=_training(folder),
        versions=_versions(),
    )
    atomic_write_text(folder.report, text)
    return folder.report


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
    headline = None
    if trained:
        split = trained[0] if "base" in measured else trained[-1]
        name, value = next(iter(metrics[split].items()))
        headline = (name, split, value)
    return Metrics([_title(split, trained) for split in measured], rows, headline)


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
    series = {key: [(e["step"], e[key]) for e in log if _has(e, key)] for key in _LOGGED}
    losses = curves({"training": series["loss"], "validation": series["eval_loss"]})
    if losses is None:
        return None
    last = series["loss"][-1][1] if series["loss"] else None
    rates = curves({"learning rate": series["learning_rate"]})
    return Training(
        losses, rates, max(int(entry["step"]) for entry in log if "step" in entry), last
    )


_LOGGED = ("loss", "eval_loss", "learning_rate")


def _has(entry: Mapping[str, Any], key: str) -> bool:
    return entry.get(key) is not None and entry.get("step") is not None


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
