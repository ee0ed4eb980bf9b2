"""The methods of the evidence: plain LoRA and its rivals, and TsqLoRA whole and in halves.

Every method gets the same modules, the same mean rank unless its name says otherwise, the same
batch, schedule and scale, its own tuned rate, and the same cost in all: `epochs` passes over the
cell's rows, scoring and whatever else it needs included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from evidence_cell import RANK, Cell, Outcome
from evidence_plain import lora, lora_r4, lora_random, lora_trusted, oracle, oracle_trusted
from evidence_rivals import adalora, eva, infobatch, small_loss
from sklearn.metrics import roc_auc_score

from tsqlora.judging import window_size
from tsqlora.null import FREE
from tsqlora.online import null_pairs
from tsqlora.pipeline import SENSITIVITY_SAMPLES, Run
from tsqlora.quality import QualityScores
from tsqlora.scoring import Scorer
from tsqlora.selection import draw_size
from tsqlora.two_parts import first_steps

Method = Callable[[Cell], Outcome]


def tsqlora(**sections: Any) -> Method:
    """TsqLoRA with these keys of the configuration, for the cell's budget in all."""

    def method(cell: Cell) -> Outcome:
        own = {key: dict(section) for key, section in sections.items()}
        if own.get("quality", {}).get("reference") == "trusted":
            own["quality"]["reference"] = str(cell.folder / "data" / "trusted.jsonl")
        steps = _steps_within(cell, own)
        config = cell.config(**{**own, "training": {"max_steps": steps}})
        started = time.perf_counter()
        run = Run.start(config)
        run.train()
        seconds = time.perf_counter() - started
        metrics = run.evaluate()
        cost = metrics["cost"]
        splits = {k: metrics[k] for k in ("validation", "test")}
        passes = cost["scoring_passes"] + cost["training_passes"]
        return Outcome(splits, passes, seconds, run.plan().parameters, _judged(cell, run))

    return method


def _steps_within(cell: Cell, sections: dict[str, Any]) -> int:
    """The most steps after scoring with which everything costs at most the budget."""

    samples, trusted = len(cell.data.train), len(cell.data.trusted)
    window = window_size(samples)

    def cost(steps: int) -> float:
        config = cell.config(**{**sections, "training": {"max_steps": steps}})
        first, quality = first_steps(config, samples), config.quality
        drawn = draw_size(samples, quality.fraction)
        scorer = Scorer(len, quality, batch_size=cell.task.batch)  # type: ignore[arg-type]
        scoring = 1.5 * min(drawn, SENSITIVITY_SAMPLES)
        if quality.mode == "upfront":
            scoring += scorer.passes(cell.task.kind, samples, trusted if quality.reference else 0)
        elif quality.mode == "online" and cell.task.kind not in FREE:
            windows = steps // max(1, window // cell.task.batch)
            scoring += 0.5 * windows * null_pairs(window)
        return (first.steps + steps) * cell.task.batch + scoring

    low, high = 1, cell.steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= cell.budget else (low, middle - 1)
    return low


def _judged(cell: Cell, run: Run) -> dict[str, Any]:
    """How well credibility finds the planted wrong targets."""
    if not run.folder.scores.exists():
        return {}
    scores = QualityScores.from_parquet(run.folder.scores)
    wrong = np.isin(scores.ids, sorted(cell.data.wrong))
    left_out = scores.probability < 0.5 / len(scores.ids)
    notes = {
        "wrong_share": round(float(scores.wrong_share), 4),
        "wrong_left_out": int((left_out & wrong).sum()),
        "sound_left_out": int((left_out & ~wrong).sum()),
        "verdict": scores.verdict,
    }
    if 0 < wrong.sum() < len(wrong):
        seen = np.isfinite(scores.loss)
        notes["auroc_credibility"] = round(float(roc_auc_score(wrong, -scores.credibility)), 4)
        notes["auroc_loss"] = round(float(roc_auc_score(wrong[seen], scores.loss[seen])), 4)
    return notes


_UNIFORM = {"min_rank": RANK, "max_rank": RANK, "dynamic": False}
_NO_TERMS = {"gradient_norm": 0.0, "loss_reduction": 0.0, "convergence": 0.0}
METHODS: dict[str, Method] = {
    "lora": lora,
    "lora_random": lora_random,
    "oracle": oracle,
    "small_loss": small_loss,
    "infobatch": infobatch,
    "adalora": adalora,
    "eva": eva,
    "lora_r4": lora_r4,
    "tsqlora": tsqlora(),
    "tsqlora_paper": tsqlora(quality={"preset": "paper"}),
    "tsqlora_quality_only": tsqlora(ranks=_UNIFORM),
    "tsqlora_credibility_only": tsqlora(quality={"weights": _NO_TERMS}, ranks=_UNIFORM),
    "tsqlora_online": tsqlora(
        quality={"mode": "online", "weights": _NO_TERMS, "adapt_steps": 0}, ranks=_UNIFORM
    ),
    "tsqlora_ranks_only": tsqlora(quality={"mode": "none", "adapt_steps": 0}),
    "tsqlora_static_ranks": tsqlora(
        quality={"mode": "none", "adapt_steps": 0}, ranks={"dynamic": False}
    ),
    "tsqlora_r4": tsqlora(ranks={"mean_rank": RANK // 2}),
    "lora_trusted": lora_trusted,
    "oracle_trusted": oracle_trusted,
    "tsqlora_trusted": tsqlora(quality={"reference": "trusted"}),
}
RATE_OF = {"lora_r4": "lora", "lora_random": "lora", "oracle": "lora", "lora_trusted": "lora",
           "oracle_trusted": "lora"}  # fmt: skip
"""Methods that are plain LoRA on other rows take its rate; every other has its own."""
