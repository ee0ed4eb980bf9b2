"""Run folders made up for reports, and the written page taken apart."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from runs import write_rows
from tsqlora.allocation import RankPlan
from tsqlora.artefacts import atomic_write_json
from tsqlora.config import RunConfig
from tsqlora.quality import QualityScores
from tsqlora.run_folder import RunFolder

VOID = {"meta", "br", "wbr", "input"}
SAMPLES = 200
WRONG = 7
KINDS = {"attention.query": (16, 16), "output.dense": (16, 64)}
SHAPES = {f"encoder.layer.{i}.{k}": s for i in range(3) for k, s in KINDS.items()}
SHAPES["pooler.dense"] = (16, 16)


class Page(HTMLParser):
    """A parsed report: its tags, the text a reader sees, what it packs; unmatched tags fail."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.seen: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
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

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.tags[-1][1], data))
        elif "style" not in self.open:
            self.seen.append(data)

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    def packed(self, name: str) -> Any:
        """What is packed under a name, unpacked; None where there is nothing."""
        for attributes, data in self.scripts:
            if attributes.get("id") == f"packed-{name}":
                return unpacked(data, attributes)
        return None

    @property
    def notes(self) -> dict[str, Any]:
        """What the page knows of its samples."""
        found = self.packed("page")["samples"]
        assert isinstance(found, dict)
        return found

    @property
    def texts(self) -> list[str]:
        """The samples' texts."""
        found: list[str] = self.packed("text").split("\n")
        return found


def unpacked(data: str, attributes: dict[str, str | None]) -> Any:
    """The slow, obvious inverse of packed.py."""
    content, kind = gzip.decompress(base64.b64decode(data)), attributes["data-kind"] or ""
    if kind == "text":
        return content.decode()
    if kind == "json":
        return json.loads(content)
    size = int(kind[1:]) // 8
    planes = np.frombuffer(content, np.uint8).reshape(size, -1)
    found = np.ascontiguousarray(planes.T).view(f">{'f' if kind == 'f16' else 'u'}{size}")[:, 0]
    scale = int(attributes["data-scale"] or 0)
    return np.ldexp(found.astype(np.float64), scale) if kind == "f16" else found.astype(np.int64)


def start(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> RunFolder:
    """A run folder that holds a configuration, and its training data where `rows` are given."""
    train = folder / "train.jsonl"
    if rows is not None:
        train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = changes.pop("data", {"text": "text", "target": "label"})
    settings: dict[str, Any] = {
        "model": "some/model", "task": "classification", "output": str(folder / "run"),
    }  # fmt: skip
    settings |= {"quality": {"mode": "upfront"}, "data": {"train": str(train), **data}, **changes}
    config = RunConfig.from_dict(settings)
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
    write_rows(run.train_log, [*losses, {"step": 50, "eval_loss": 0.1, "eval_accuracy": 0.75}])
    run.adapter.mkdir()
