"""How well cheaper measurements rank samples beside the exact ones, by Spearman's correlation.

Run: .venv/bin/python benchmarks/estimates.py
Each model is adapted briefly on its task, then measured: the lookahead's estimates, the economical
mode at several depths, and sketches beside exact dot products with a reference gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
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
from tsqlora.losses import infer_kind
from tsqlora.per_sample_grads import Dots, Keep, PerSampleGradients, Sketch, SquaredNorms
from tsqlora.scoring import Scorer

STEPS, DISPLACEMENTS = 60, (0.01, 0.1, 0.5, 2.0)
WHAT = ("lookahead", "depth", "reference", "robust mean")
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


def depths(model: Any, rows: Any, collate: Any) -> dict[str, float]:
    """Spearman of the economical mode's Q with the full one's."""
    full = Scorer(collate).score(model, rows).quality
    found = {}
    for depth in (0.05, 0.1, 0.2, 0.3, 0.5):
        scorer = Scorer(collate, QualityConfig(depth=depth))
        found[str(depth)] = round(correlation(scorer.score(model, rows).quality, full), 3)
    return found


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
    parser.add_argument("--what", nargs="+", default=WHAT, choices=WHAT)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "estimates.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    tf.utils.logging.set_verbosity_error()
    report: dict[str, Any] = {"adapted_steps": STEPS, "samples": options.samples, "tasks": {}}
    for name in options.tasks:
        inputs = example_inputs(name, options.shared, 2000)
        rows, collate = inputs.splits.train, inputs.task.collate
        model = inputs.base_model()
        with temporary_adapter(model, infer_kind(model)) as adapted:
            adapt_briefly(adapted, rows, collate, Adaptation(STEPS, RATES[name], 32, 0))
            adapted.eval()
            pool, trusted = (
                rows.select(range(start, start + options.samples)) for start in (0, options.samples)
            )
            measures: dict[str, Callable[[], Any]] = {
                "lookahead": partial(lookaheads, adapted, pool, collate),
                "depth": partial(depths, adapted, pool, collate),
                "reference": partial(references, adapted, pool, trusted, collate),
                "robust mean": partial(robust_means, adapted, pool, collate),
            }
            found = {what: measure() for what, measure in measures.items() if what in options.what}
        print(name, json.dumps(found, indent=1))
        report["tasks"][name] = found
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
