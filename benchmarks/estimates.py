"""How well cheaper measurements rank samples beside the exact ones, by Spearman's correlation.

Run: .venv/bin/python benchmarks/estimates.py
Each model is adapted briefly on its task, then measured: the lookahead's estimates, the economical
mode beside the full one, and sketches beside exact dot products with a reference gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from common import HERE, example_inputs
from scipy.stats import spearmanr, trim_mean
from sklearn.metrics import roc_auc_score
from torch import Tensor

from tsqlora.adaptation import Adaptation, adapt_briefly
from tsqlora.batches import batches, forward_losses
from tsqlora.config import QualityConfig
from tsqlora.convergence import unit
from tsqlora.lookahead import first_order, one_step, second_order
from tsqlora.lora_layers import temporary_adapter
from tsqlora.losses import CLASSIFICATION, infer_kind
from tsqlora.per_sample_grads import Dots, Keep, PerSampleGradients, Sketch, SquaredNorms
from tsqlora.scoring import Scorer

STEPS, DISPLACEMENTS = 60, (0.01, 0.1, 0.5, 2.0)
DEPTH = 0.4
MEASURED = ["lookahead", "economical", "reference", "robust mean"]
RATES = {"sst2": 1e-3, "g2p": 4e-3, "e2e": 5e-3}


def lookaheads(model: Any, rows: Any, collate: Any) -> dict[str, Any]:
    """Spearman of each estimate with the exact Δℓ, at steps that move the model so far."""
    kind = infer_kind(model)
    names = ("exact", "first", "second")
    found: dict[float, dict[str, list[Tensor]]] = {
        d: {name: [] for name in names} for d in DISPLACEMENTS
    }
    for _, batch in batches(model, rows, collate, 32, "lookahead"):
        norms, keep = SquaredNorms(), Keep()
        with PerSampleGradients(model, norms, keep) as gradients:
            losses = forward_losses(model, kind, batch)
            gradients.backward(losses)
        losses, squared = losses.detach(), torch.as_tensor(norms.total)

        def forward(batch: Any = batch) -> Tensor:
            return forward_losses(model, kind, batch)

        for displacement, lists in found.items():
            steps = displacement / squared.sqrt()
            with torch.no_grad(), one_step(gradients, keep, steps):
                lists["exact"].append(losses - forward())
            lists["first"].append(first_order(squared, steps))
            second = second_order(gradients, keep, losses, squared, steps, forward)
            lists["second"].append(second)
    return {
        str(d): {
            name: round(correlation(torch.cat(lists[name]), torch.cat(lists["exact"])), 3)
            for name in names[1:]
        }
        for d, lists in found.items()
    }


def correlation(left: Any, right: Any) -> float:
    return float(spearmanr(left, right).statistic)


def economical(model: Any, rows: Any, collate: Any) -> dict[str, Any]:
    """Spearman of the economical mode's terms and Q with the full one's, and its passes a sample.

    "other sketches": with the full Q of another seed of the sketches, which shares no noise; that
    of the full Q itself is the most that can be asked for.
    """
    full = Scorer(collate, batch_size=32).score(model, rows)
    other = Scorer(collate, batch_size=32, seed=1).score(model, rows).quality
    found: dict[str, Any] = {"full, other sketches": correlation(full.quality, other)}
    scorer = Scorer(collate, QualityConfig(depth=DEPTH), batch_size=32)
    scores = scorer.score(model, rows)
    for term in ("quality", "gradient_norm", "loss_reduction", "convergence"):
        found[term] = correlation(getattr(scores, term), getattr(full, term))
    found["quality, other sketches"] = correlation(scores.quality, other)
    found["passes"] = scorer.passes(CLASSIFICATION, len(rows)) / len(rows)  # no null counted
    return {name: round(value, 3) for name, value in found.items()}


def references(model: Any, rows: Any, trusted: Any, collate: Any) -> dict[str, float]:
    """Spearman of the cosine with the reference's mean unit gradient: sketched, and exact."""
    kind = infer_kind(model)
    direction: dict[str, Tensor] = {}
    sketch, parts = Sketch(), []
    for _, batch in batches(model, trusted, collate, 32, "reference"):
        norms, keep = SquaredNorms(), Keep()
        with PerSampleGradients(model, norms, keep, sketch) as gradients:
            gradients.backward(forward_losses(model, kind, batch))
        scale = 1 / torch.as_tensor(norms.total).sqrt()
        for name, gradient in keep.gradients.items():
            share = torch.einsum("n,nrc->rc", scale, gradient)
            direction[name] = direction.get(name, 0) + share
        parts.append(torch.nn.functional.normalize(sketch.take()))
    mean = torch.cat(parts).mean(0)
    exact, sketched = [], []
    for _, batch in batches(model, rows, collate, 32, "pool"):
        norms, dots = SquaredNorms(), Dots(direction)
        with PerSampleGradients(model, norms, dots, sketch) as gradients:
            gradients.backward(forward_losses(model, kind, batch))
        exact.append(torch.as_tensor(dots.total) / torch.as_tensor(norms.total).sqrt())
        sketched.append(torch.nn.functional.normalize(sketch.take()) @ mean)
    return {"sketched": round(correlation(torch.cat(sketched), torch.cat(exact)), 3)}


def robust_means(model: Any, rows: Any, collate: Any) -> dict[str, float]:
    """AUROC for wrong targets of a low cosine with the pool's mean, which is taken in several ways.

    A fifth of the targets are exchanged among each other. All in sketch space.
    """
    random = np.random.default_rng(0)
    wrong = np.sort(random.choice(len(rows), len(rows) // 5, replace=False))
    targets = list(rows["labels"])
    for place, other in zip(wrong, np.roll(wrong, 1), strict=True):
        targets[place] = rows[int(other)]["labels"]
    changed = np.array([new != old for new, old in zip(targets, rows["labels"], strict=True)])
    dirty = rows.remove_columns("labels").add_column("labels", targets)
    sketch, kind = Sketch(), infer_kind(model)
    sketches = np.zeros((len(rows), sketch.size))
    for positions, batch in batches(model, dirty, collate, 32, "wrong targets"):
        with PerSampleGradients(model, sketch) as gradients:
            gradients.backward(forward_losses(model, kind, batch))
        sketches[positions] = sketch.take().numpy()
    centre = sketches.mean(0)
    for _ in range(50):  # Weiszfeld
        weights = 1 / np.maximum(np.linalg.norm(sketches - centre, axis=1), 1e-12)
        centre = weights @ sketches / weights.sum()
    means = {
        "mean": sketches.mean(0),
        "mean unit gradient": unit(sketches).mean(0),
        "geometric median": centre,
        "trimmed mean": trim_mean(sketches, 0.2),
    }
    units = unit(sketches)
    return {n: round(float(roc_auc_score(changed, -units @ m)), 3) for n, m in means.items()}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["sst2", "g2p", "e2e"])
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared")
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--measure", nargs="+", default=MEASURED, choices=MEASURED)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "estimates.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    tf.utils.logging.set_verbosity_error()
    report: dict[str, Any] = {"adapted_steps": STEPS, "tasks": {}}
    if options.out.exists():
        report |= json.loads(options.out.read_text(encoding="utf-8"))
    for name in options.tasks:
        inputs = example_inputs(name, options.shared, 6000)
        found = report["tasks"].setdefault(name, {})
        for seed in options.seeds:
            for what, result in measured(inputs, name, seed, options).items():
                found.setdefault(what, {})[str(seed)] = result
                print(name, seed, what, json.dumps(result), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")


def measured(inputs: Any, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for, of a pool drawn and a model adapted with that seed."""
    order = np.random.default_rng(seed).permutation(len(inputs.splits.train))
    rows, collate = inputs.splits.train.select(order), inputs.task.collate
    model, samples = inputs.base_model(), options.samples
    with temporary_adapter(model, infer_kind(model)) as adapted:
        adapt_briefly(adapted, rows, collate, Adaptation(STEPS, RATES[name], 32, seed))
        adapted.eval()
        pool, trusted = (rows.select(range(s, s + samples)) for s in (0, samples))
        calls: dict[str, Callable[[], Any]] = {
            "lookahead": lambda: lookaheads(adapted, pool, collate),
            "economical": lambda: economical(adapted, pool, collate),
            "reference": lambda: references(adapted, pool, trusted, collate),
            "robust mean": lambda: robust_means(adapted, pool, collate),
        }
        return {"samples": samples} | {what: calls[what]() for what in options.measure}


if __name__ == "__main__":
    main()
