"""Reports of large runs: bytes, seconds to write, seconds until a browser shows them.

    .venv/bin/python benchmarks/report.py --samples 50000 100000 --out /tmp/reports

The runs are made up: sentences of a seeded language of 20,000 words, six classes, a tenth of the
labels wrong, a twentieth of the texts near-copies, 72 modules whose ranks move 20 times. Chromium
and its driver come from the system (tests/browser.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from browser import no_browser, opened
from tsqlora.allocation import RankPlan
from tsqlora.artefacts import atomic_write_json
from tsqlora.config import RunConfig
from tsqlora.quality import QualityScores
from tsqlora.report import write_report
from tsqlora.run_folder import RunFolder

CLASSES = ("billing", "card", "delivery", "login", "refund", "other")
KINDS = {"query": 384, "key": 384, "value": 384, "output.dense": 384, "up": 1536, "down": 1536}
SHAPES = {f"encoder.layer.{i}.{k}": (384, n) for i in range(12) for k, n in KINDS.items()}
WORDS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[50_000, 100_000])
    parser.add_argument("--words", type=int, default=18, help="in a text, on average")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for samples in arguments.samples:
        folder = arguments.out / str(samples)
        folder.mkdir(parents=True, exist_ok=True)
        run = made_up(folder, samples, arguments.words)
        start = time.perf_counter()
        report = write_report(run.path)
        result = {
            "samples": samples,
            "megabytes": round(report.stat().st_size / 1e6, 2),
            "seconds to write": round(time.perf_counter() - start, 1),
            **opening(report, arguments.repeats),
        }
        print(json.dumps(result))


def opening(report: Path, repeats: int) -> dict[str, float]:
    """Medians of the seconds from opening the file to its samples, to its last chart, and of those
    that the page's main thread was on a processor, which what else runs does not lengthen."""
    if reason := no_browser():
        return {reason: 0}
    found = []
    with opened(report) as page:
        for _ in range(repeats):
            busy = page.busy(report)
            found.append((*page.times(), busy))
    names = ("seconds to samples", "seconds to charts", "of a processor")
    medians = (statistics.median(times) for times in zip(*found, strict=True))
    return {name: round(median, 2) for name, median in zip(names, medians, strict=True)}


def made_up(folder: Path, samples: int, words: int) -> RunFolder:
    """A finished run of so many samples."""
    random = np.random.default_rng(0)
    texts, labels = sentences(random, samples, words)
    lines = [
        json.dumps({"text": t, "label": CLASSES[c]}) for t, c in zip(texts, labels, strict=True)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {"train": str(folder / "train.jsonl"), "text": "text", "target": "label"}
    config = RunConfig.from_dict(
        {
            "model": "some/model",
            "task": "classification",
            "data": data,
            "output": str(folder / "run"),
        }
    )
    run = RunFolder.create(folder / "run", config, resume=True)
    scores(random, labels).to_parquet(run.scores)
    fill(run, random)
    return run


def sentences(
    random: np.random.Generator, samples: int, words: int
) -> tuple[list[str], np.ndarray]:
    """Texts of a Zipf language, and their classes; the last twentieth are near-copies."""
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    sizes = random.integers(2, 10, WORDS)
    language = np.array(["".join(random.choice(letters, size)) for size in sizes])
    chance = 1 / np.arange(1, WORDS + 1)
    lengths = np.maximum(random.lognormal(np.log(words), 0.5, samples).astype(int), 2)
    drawn = language[random.choice(WORDS, lengths.sum(), p=chance / chance.sum())]
    pieces = np.split(drawn, np.cumsum(lengths)[:-1])
    labels = random.integers(0, len(CLASSES), samples)
    for i in range(samples - samples // 20, samples):
        source = random.integers(samples // 2)
        pieces[i] = np.delete(pieces[source], random.integers(len(pieces[source])))
        labels[i] = labels[source]
    return [" ".join(piece) for piece in pieces], labels


def scores(random: np.random.Generator, labels: np.ndarray) -> QualityScores:
    """Scores in which a tenth of the labels look wrong."""
    count, wrong = len(labels), random.random(len(labels)) < 0.1
    quality = random.normal(size=count)
    credibility = np.where(wrong, random.beta(1, 4, count), random.beta(30, 1, count))
    probability = credibility * np.exp(quality)
    selected = np.zeros(count, dtype=bool)
    selected[np.argsort(-probability * random.random(count))[: count // 2]] = True
    return QualityScores(
        ids=np.arange(count),
        loss=random.lognormal(-1 + 2 * wrong, 0.8),
        gradient_norm=random.lognormal(1, 1, count),
        loss_reduction=random.normal(0.1, 0.1, count),
        convergence=random.normal(0.2 - 0.3 * wrong, 0.1),
        credibility=credibility,
        quality=quality,
        probability=probability / probability.sum(),
        selected=selected,
        prediction=np.where(wrong, (labels + 1) % len(CLASSES), labels).astype(np.int32),
        wrong_share=0.1,
        verdict="about 10% of the targets look wrong",
    )


def fill(run: RunFolder, random: np.random.Generator) -> None:
    """Sensitivity, plan, 20 reallocations, the log, metrics and cost."""
    values = {name: float(random.lognormal(-3, 0.7)) for name in SHAPES}
    sensitivity = {"estimator": "weight_gradient", "modules": values, "shapes": SHAPES}
    atomic_write_json(run.sensitivity, {"version": 1, **sensitivity})
    ranks = {name: int(random.integers(2, 16)) for name in SHAPES}
    RankPlan(ranks, SHAPES, 2.0, sum(r * sum(SHAPES[n]) for n, r in ranks.items())).save(run.plan)
    moves = []
    for step in range(50, 1050, 50):
        kind = random.permutation([name for name in SHAPES if SHAPES[name][1] == 384]).tolist()
        pruned = {name: 1 for name in kind[:10] if ranks[name] > 0}
        grown = dict.fromkeys(kind[10 : 10 + len(pruned)], 1)
        ranks = {n: r - pruned.get(n, 0) + grown.get(n, 0) for n, r in ranks.items()}
        moves.append({"step": step, "ranks": ranks, "pruned": pruned, "grown": grown})
    run.ranks.write_text("".join(json.dumps(move) + "\n" for move in moves), encoding="utf-8")
    log = [
        {"step": s, "loss": 2 * s**-0.2, "learning_rate": 1e-3 * (1 - s / 1e4)}
        for s in range(10, 10_000, 10)
    ]
    log += [
        {"step": s, "eval_loss": 2.1 * s**-0.18, "eval_accuracy": 1 - s**-0.3}
        for s in range(500, 10_000, 500)
    ]
    run.train_log.write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    stages = {"adaptation": 40.0, "scores": 300.0, "sensitivity": 8.0, "training": 900.0}
    cost = {name: {"seconds": s, "passes": 100 * s} for name, s in stages.items()}
    run.update_metrics({"validation": {"accuracy": 0.91, "f1": 0.9, "loss": 0.4}})
    run.update_metrics(
        {"cost": {"stages": cost, "peak_memory_bytes": 3e9, "trainable_parameters": 1_000_000}}
    )
    run.adapter.mkdir(exist_ok=True)


if __name__ == "__main__":
    main()
