"""Label cleaning: precision at the planted count of `tsqlora score`, beside cleanlab.

    python benchmarks/cleaning.py run --seeds 5      # resumes; a line a (task, seed, method)
    python benchmarks/cleaning.py tables             # Markdown of results/cleaning.jsonl

Rows of ../shared (SST-2, TREC's six classes) are drawn by the seed, and a tenth of their labels set
to another class, uniformly. `tsqlora score` sees the file alone. cleanlab (2.9) is given

- the same model's predictions of the rows that it was adapted on, a forward more;
- its usual way: probabilities of 5-fold cross-validation, here of logistic regression on the same
  encoder's frozen sentence embeddings (as in cleanlab's text tutorial), half a pass a sample;
- with `--folds`, cross-validation of the model itself, adapted as ours is, once a fold. With
  `--folds 2` this is also what a cross-fitted score of ours would be.

The ceiling is the same 2-fold judge adapted on the true labels: what its errors alone leave.
A pass is one sample forward and back; a forward alone is half.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append_line, read_lines
from evidence_data import read_rows
from evidence_stats import markdown, mean_interval
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from transformers import AutoModel

from tsqlora.batches import batches, evaluating
from tsqlora.packaged import encoder_folder
from tsqlora.pipeline import Run
from tsqlora.ranked import likely_wrong, ranking
from tsqlora.score_only import score_config
from tsqlora.seeing import see

TASKS = {
    "sst2": ("sst2/train.jsonl", "sentence", "label"),
    "trec": ("trec/train.jsonl", "text", "coarse_label"),
}
PLANTED = 0.1
RESULTS = Path(__file__).resolve().parent / "results" / "cleaning.jsonl"
Line = dict[str, Any]


class Cell:
    """The rows of one (task, seed), and which of them are wrong."""

    def __init__(self, task: str, seed: int, samples: int) -> None:
        file, self.text, self.target = TASKS[task]
        rng = random.Random(f"cleaning/{task}/{seed}")
        rows = rng.sample(read_rows(file), samples)
        classes = sorted({row[self.target] for row in rows})
        self.true = np.array([classes.index(row[self.target]) for row in rows])
        self.given = self.true.copy()
        self.wrong = np.zeros(samples, dtype=bool)
        for i in rng.sample(range(samples), round(PLANTED * samples)):
            self.given[i] = rng.choice([c for c in range(len(classes)) if c != self.true[i]])
            self.wrong[i] = True
        self.texts, self.seed, self.classes = [r[self.text] for r in rows], seed, len(classes)

    def run(self, folder: Path, which: Sequence[int], labels: np.ndarray) -> Run:
        """`tsqlora score` of some rows, as the command has it."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({self.text: self.texts[i], self.target: int(labels[i])}) for i in which]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        source = str(folder / "rows.jsonl")
        seen = see(source, "classification", self.text, self.target, str(encoder_folder()))
        return Run.start(score_config(seen, str(folder / "run"), [f"seed={self.seed}"]))

    def precision(self, suspicion: np.ndarray) -> float:
        """Of the most suspicious rows, as many as are planted: the share that is."""
        count = int(self.wrong.sum())
        return float(self.wrong[np.argsort(-suspicion, kind="stable")[:count]].mean())

    def ordered(self, order: np.ndarray) -> float:
        return float(self.wrong[order[: int(self.wrong.sum())]].mean())

    def flagged(self, flags: np.ndarray) -> Line:
        """What a set of flags comes to."""
        right = int((flags & self.wrong).sum())
        return {
            "flagged": int(flags.sum()),
            "flag_precision": right / max(1, int(flags.sum())),
            "flag_recall": right / int(self.wrong.sum()),
        }


def probabilities(run: Run, rows: Any) -> np.ndarray:
    """Of the adapted model, for encoded rows (N, C)."""
    task, model = run.inputs.task, run.warm_model
    found = np.zeros((len(rows), len(task.labels)))
    with evaluating(model), torch.no_grad():
        for positions, batch in batches(model, rows, task.collate, 64, "predicting"):
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            found[positions] = torch.softmax(model(**inputs).logits, -1).numpy()
    return found


def ours_and_cleanlab(cell: Cell) -> list[Line]:
    """`tsqlora score`, and cleanlab on the predictions of the model it adapted."""
    with tempfile.TemporaryDirectory() as folder:
        run = cell.run(Path(folder), range(len(cell.given)), cell.given)
        scores = run.score()
        predicted = probabilities(run, run.inputs.splits.train)
        steps = run.first.steps * run.first.batch
    passes = steps + 0.5 * len(cell.given)
    ours = {
        "method": "tsqlora score",
        "precision": cell.ordered(ranking(scores)),
        "by_loss_alone": cell.precision(scores.loss),
        "passes": passes,
        "wrong_share": None if np.isnan(scores.wrong_share) else float(scores.wrong_share),
        "verdict": scores.verdict,
        **cell.flagged(likely_wrong(scores)),
    }
    return [ours, *by_cleanlab(cell, predicted, "same predictions", passes + 0.5 * len(cell.given))]


def by_cleanlab(cell: Cell, predicted: np.ndarray, name: str, passes: float) -> list[Line]:
    """cleanlab's ranking by its two scores, and what `find_label_issues` flags."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    lines: list[Line] = []
    flags = find_label_issues(cell.given, predicted, n_jobs=1)
    for score in ("self_confidence", "normalized_margin"):
        quality = get_label_quality_scores(cell.given, predicted, method=score)
        lines.append(
            {
                "method": f"cleanlab, {name}, {score}",
                "precision": cell.precision(-quality),
                "accuracy": float((predicted.argmax(1) == cell.true).mean()),
                "passes": passes,
                **cell.flagged(np.asarray(flags, dtype=bool)),
            }
        )
    return lines


def embeddings(cell: Cell) -> list[Line]:
    """cleanlab's usual way, on frozen embeddings."""
    from transformers import AutoTokenizer

    folder = str(encoder_folder())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    order = sorted(range(len(cell.texts)), key=lambda i: len(cell.texts[i]))
    found = np.zeros((len(order), model.config.hidden_size))
    with torch.no_grad():
        for start in range(0, len(order), 64):
            which = order[start : start + 64]
            texts = [cell.texts[i] for i in which]
            batch = tokenizer(
                texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found[which] = torch.nn.functional.normalize(mean, dim=1).numpy()
    model = LogisticRegression(max_iter=1000)
    predicted = cross_val_predict(model, found, cell.given, cv=5, method="predict_proba")
    return by_cleanlab(cell, predicted, "5-fold on embeddings", 0.5 * len(order))


def folded(cell: Cell, folds: int, labels: np.ndarray, name: str) -> list[Line]:
    """Every row judged by a model that was adapted on the others' `labels`."""
    predicted, passes = np.zeros((len(labels), cell.classes)), 0.0
    parts = StratifiedKFold(folds, shuffle=True, random_state=cell.seed)
    for train, held in parts.split(labels, labels):
        with tempfile.TemporaryDirectory() as folder:
            run = cell.run(Path(folder), train, labels)
            rows = [{cell.text: cell.texts[i], cell.target: int(labels[i])} for i in held]
            lines = [json.dumps(row) for row in rows]
            held_file = Path(folder) / "held.jsonl"
            held_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            from tsqlora.data import load_dataset

            encoded = run.inputs.task.encode(load_dataset(str(held_file), "held"), "held")
            predicted[held] = probabilities(run, encoded)
            passes += run.first.steps * run.first.batch + 0.5 * len(held)
    return by_cleanlab(cell, predicted, name, passes)


def methods(folds: int) -> dict[str, Callable[[Cell], list[Line]]]:
    """What is measured of a cell, by name."""
    found: dict[str, Callable[[Cell], list[Line]]] = {
        "score": ours_and_cleanlab,
        "embeddings": embeddings,
    }
    if folds:
        found[f"{folds}-fold"] = lambda cell: folded(cell, folds, cell.given, f"{folds}-fold")
    if folds == 2:
        found["ceiling"] = lambda cell: folded(cell, 2, cell.true, "2-fold on the true labels")
    return found


def measure(options: argparse.Namespace) -> None:
    """The cells that are not there yet, a line each as they are done."""
    there = {(x["task"], x["seed"], x["part"], x["samples"]) for x in read_lines(options.out)}
    wanted = methods(options.folds)
    for seed in range(options.first, options.first + options.seeds):
        for part in options.parts or wanted:
            for task in options.tasks:
                if (task, seed, part, options.samples) in there:
                    continue
                began = time.perf_counter()
                lines = wanted[part](Cell(task, seed, options.samples))
                seconds = time.perf_counter() - began
                about = {"task": task, "seed": seed, "part": part, "samples": options.samples}
                for line in lines:
                    found = {**about, **rounded(line), "seconds": round(seconds)}
                    append_line(options.out, found)
                    print(json.dumps(found), flush=True)


def rounded(line: Line) -> Line:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}


def tables(lines: list[Line]) -> str:
    """Mean and 95 % interval (Student's t over seeds) of each method."""
    rows: list[Sequence[str]] = [
        ("data", "judge", "precision at the planted count", "flagged: precision / recall",
         "passes a sample", "seeds")
    ]  # fmt: skip
    for samples in sorted({x["samples"] for x in lines}):
        for task in TASKS:
            here = [x for x in lines if (x["task"], x["samples"]) == (task, samples)]
            for method in dict.fromkeys(x["method"] for x in here):
                own = [x for x in here if x["method"] == method]
                found = mean_interval([100 * x["precision"] for x in own])
                precision, recall, passes = (
                    float(np.mean([x[name] for x in own]))
                    for name in ("flag_precision", "flag_recall", "passes")
                )
                flagged, cost = f"{precision:.2f} / {recall:.2f}", f"{passes / samples:.2f}"
                shown = str(found) if len(own) > 1 else f"{found.mean:.1f}"
                judged = (f"{task}, {samples:,}", method, shown, flagged)
                rows.append((*judged, cost, str(len(own))))
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "tables"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--parts", nargs="+", help="score, embeddings, N-fold, ceiling")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed; tuned on 100 and on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "run":
        measure(options)
    else:
        print(tables(read_lines(options.out)))


if __name__ == "__main__":
    main()
