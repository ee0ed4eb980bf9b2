"""The run folder as one HTML file that needs nothing else; no model is ever loaded."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from tsqlora.allocation import RankPlan
from tsqlora.artefacts import atomic_write_text, read_json, read_lines
from tsqlora.config import RunConfig
from tsqlora.figures import Grid, curves, grids, histogram, kind_of, number
from tsqlora.quality import QualityScores
from tsqlora.run_folder import RunFolder

logger = logging.getLogger("tsqlora")

SHOWN = 50
"""Samples in each table."""
CUT = 300
"""Characters of a text that are shown."""
MOVES = 12
"""Columns of the table of ranks over time."""
CLASSES = 40
"""Classes in the table of shares."""

TERMS = {
    "loss": "ℓ, before training, after the brief adaptation",
    "gradient_norm": "‖∇ℓ‖₂, how strongly the sample pulls at the adapter",
    "loss_reduction": "Δℓ, what one step on the sample itself would gain",
    "convergence": "ΔC, how far its gradient agrees with those it should agree with",
    "credibility": "c, the probability that the target is right",
    "quality": "Q, the weighted sum of the three terms",
    "probability": "p, the probability of being drawn",
}
PACKAGES = ("tsqlora", "torch", "transformers", "peft", "datasets", "accelerate", "numpy")

_HIDDEN = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


@dataclass(frozen=True)
class Texts:
    """What the samples say: (text, target) by id, and the class of every sample where it has one."""

    by_id: dict[int, tuple[str, str]]
    classes: list[str] | None
    problem: str | None = None


def write_report(run: str | Path) -> Path:
    """Write `report.html` of a run folder from its artefacts; those not there yet are passed over.

    Raises:
        RunError: there is no run, an artefact is broken, or nothing can be written.
    """
    folder = RunFolder.open(run)
    config = folder.load_config()
    scores = QualityScores.from_parquet(folder.scores) if folder.scores.exists() else None
    metrics = read_json(folder.metrics) if folder.metrics.exists() else {}
    page = _environment().get_template("report.html.j2").render(
        name=folder.path.resolve().name,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        config=config,
        configuration=folder.config.read_text(encoding="utf-8"),
        finished=folder.adapter.exists(),
        metrics=_metrics(metrics),
        cost=_cost(metrics.get("cost") or {}),
        training=_training(folder),
        versions={"python": platform.python_version(), **_versions()},
        **_plan(folder),
        **_samples(config, scores, folder),
    )
    atomic_write_text(folder.report, page)
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
    environment.filters["share"] = lambda part: "–" if part is None else f"{100 * part:.1f} %"
    environment.filters["duration"] = _duration
    environment.filters["words"] = lambda name: name.replace("_", " ")
    return environment


def _metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`splits` measured, and for each metric its values; `base` belongs to the first split."""
    names = {"base": "untouched model", "validation": "validation", "test": "test"}
    splits = {name: title for name, title in names.items() if metrics.get(name)}
    rows = list(dict.fromkeys(metric for name in splits for metric in metrics[name]))
    table = {row: [metrics[name].get(row) for name in splits] for row in rows}
    trained = [name for name in splits if name != "base"]
    return {"splits": list(splits.values()), "table": table, "best": _headline(metrics, trained)}


def _headline(metrics: Mapping[str, Any], splits: list[str]) -> dict[str, Any] | None:
    """The first metric of the last split, and the untouched model's where it is of that split."""
    if not splits:
        return None
    name, value = next(iter(metrics[splits[-1]].items()))
    base = (metrics.get("base") or {}).get(name) if len(splits) == 1 else None
    return {"metric": name, "split": splits[-1], "value": value, "base": base}


def _cost(cost: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where seconds and passes went, stage by stage."""
    if not cost:
        return None
    stages = cost.get("stages") or {
        stage: {"seconds": cost[f"{stage}_seconds"], "passes": cost.get(f"{stage}_passes")}
        for stage in ("scoring", "training")
        if cost.get(f"{stage}_seconds") is not None
    }
    total = sum(stage["seconds"] or 0 for stage in stages.values())
    memory = cost.get("peak_memory_bytes")
    return {
        "stages": stages,
        "seconds": total,
        "passes": sum(stage["passes"] or 0 for stage in stages.values()),
        "memory": memory and f"{memory / 1e9:.2f} GB",
        "parameters": cost.get("trainable_parameters"),
    }


def _plan(folder: RunFolder) -> dict[str, Any]:
    """The rank plan, where the ranks went from there, and the sensitivity."""
    sensitivity = read_json(folder.sensitivity) if folder.sensitivity.exists() else None
    values = {} if sensitivity is None else {n: v or 0.0 for n, v in sensitivity["modules"].items()}
    largest = max(values.values(), default=0.0)
    found: dict[str, Any] = {
        "sensitivity": sensitivity and {"estimator": sensitivity["estimator"], "largest": largest},
        "sensitivity_grids": grids(values, unit=largest / 100 or 1.0),
        "plan": None,
        "moves": [],
    }
    if not folder.plan.exists():
        return found
    plan = RankPlan.load(folder.plan)
    moves = read_lines(folder.ranks)
    history = [(0, plan.ranks)] + [(m["step"], {**plan.ranks, **m["ranks"]}) for m in moves]
    final = history[-1][1]
    changes = {n: r - plan.ranks[n] for n, r in final.items() if n in plan.ranks}
    remarks = {name: f"{change:+d}" for name, change in changes.items() if change}
    found["plan"] = {
        "planned": plan,
        "mean": sum(final.values()) / max(len(final), 1),
        "least": min(final.values(), default=0),
        "most": max(final.values(), default=0),
        "modules": len(final),
        "unused": sum(rank == 0 for rank in final.values()),
        "moved": any(changes.values()),
        "gained": sorted((c, n) for n, c in changes.items() if c > 0)[::-1][:5],
        "lost": sorted((c, n) for n, c in changes.items() if c < 0)[:5],
        "grids": grids(final, remarks),
        "over_time": _over_time(history),
    }
    found["moves"] = _moves(history, moves, plan)
    return found


def _over_time(history: list[tuple[int, dict[str, int]]]) -> Grid:
    """The total rank of each kind of module, at the plan and after reallocations."""
    if len(history) > MOVES:
        picked = np.linspace(0, len(history) - 1, MOVES).round().astype(int)
        history = [history[i] for i in picked]
    totals: dict[str, float] = {}
    for step, ranks in history:
        for name, rank in ranks.items():
            key = f"{kind_of(name)}\n{step}"
            totals[key] = totals.get(key, 0) + rank
    kinds = list(dict.fromkeys(key.split("\n")[0] for key in totals))
    most = max(totals.values(), default=0) or 1
    shaded = {key: (str(int(v)), round(100 * v / most)) for key, v in totals.items()}
    columns = ["plan" if step == 0 else f"step {step}" for step, _ in history]
    return Grid("", columns, [(k, [_cell(shaded, k, step) for step, _ in history]) for k in kinds])


def _moves(
    history: list[tuple[int, dict[str, int]]], moves: list[dict[str, Any]], plan: RankPlan
) -> list[dict[str, Any]]:
    """A row a reallocation: what was pruned and grown, and what it left."""
    rows = []
    for move, (step, ranks) in zip(moves, history[1:], strict=True):
        parameters = sum(r * sum(plan.shapes[n]) for n, r in ranks.items() if n in plan.shapes)
        rows.append(
            {
                "step": step,
                "pruned": sum(move["pruned"].values()),
                "pruned_in": len(move["pruned"]),
                "grown": sum(move["grown"].values()),
                "grown_in": len(move["grown"]),
                "rank": sum(ranks.values()),
                "parameters": parameters,
                "used": parameters / plan.budget if plan.budget else None,
            }
        )
    return rows
