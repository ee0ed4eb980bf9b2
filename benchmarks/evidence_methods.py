"""The methods of the evidence: plain LoRA and its rivals, and TsqLoRA whole and in halves.

Every method gets the same modules, the same mean rank unless its name says otherwise, the same
batch, schedule and scale (of TsqLoRA at rank 4 its default there), its own tuned rate, and the same
cost in all: `epochs` passes over the cell's rows, scoring and whatever else it needs included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from evidence_cell import RANK, Cell, Outcome
from evidence_plain import (
    informed,
    informed_trusted,
    lora,
    lora_r4,
    lora_random,
    measured_splits,
    oracle,
    with_trusted,
)
from evidence_rivals import adalora, eva, infobatch, small_loss
from sklearn.metrics import roc_auc_score

from tsqlora.artefacts import read_json
from tsqlora.judging import window_ends
from tsqlora.null import FREE
from tsqlora.online import null_pairs
from tsqlora.pipeline import SENSITIVITY_SAMPLES, Run
from tsqlora.quality import QualityScores
from tsqlora.scoring import Scorer
from tsqlora.selection import draw_size
from tsqlora.two_parts import first_steps

Method = Callable[[Cell], Outcome]


def tsqlora(trusted: bool = False, part: float = 1.0, **sections: Any) -> Method:
    """TsqLoRA with these keys of the configuration, for this part of the cell's budget in all.

    With `trusted` rows as `quality.reference`, which is trained on as well, as by the baselines.
    """

    def method(cell: Cell) -> Outcome:
        own = {key: dict(section) for key, section in sections.items()}
        if trusted:
            reference = str(cell.folder / "data" / "trusted.jsonl")
            own["quality"] = {**own.get("quality", {}), "reference": reference}
        steps = _steps_within(cell, own, part)
        config = cell.config(**{**own, "training": {"max_steps": steps}})
        started = time.perf_counter()
        run = Run.start(config)
        run.train()
        seconds = time.perf_counter() - started
        cost = read_json(run.folder.metrics)["cost"]
        splits = run.finished.evaluate(measured_splits(cell, run.inputs))
        passes = cost["scoring_passes"] + cost["training_passes"]
        return Outcome(splits, passes, seconds, run.plan().parameters, _judged(cell, run))

    return method


def _steps_within(cell: Cell, sections: dict[str, Any], part: float = 1.0) -> int:
    """The most steps after scoring with which everything costs at most `part` of the budget."""

    reference = "reference" in sections.get("quality", {})
    samples = len(cell.data.train) + len(cell.data.trusted) * reference

    def cost(steps: int) -> float:
        config = cell.config(**{**sections, "training": {"max_steps": steps}})
        first, quality = first_steps(config, samples), config.quality
        drawn = draw_size(samples, quality.fraction)
        scorer = Scorer(len, quality, batch_size=cell.task.batch)  # type: ignore[arg-type]
        scoring = 1.5 * min(drawn, SENSITIVITY_SAMPLES)
        if quality.mode == "upfront":
            scoring += scorer.passes(cell.task.kind, samples)
        elif quality.mode == "online" and cell.task.kind not in FREE:
            ends = [0, *window_ends(samples, steps * cell.task.batch, cell.task.batch)]
            scoring += 0.5 * sum(null_pairs(end - start) for start, end in pairwise(ends))
        return (first.steps + steps) * cell.task.batch + scoring

    low, high = 1, cell.steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= part * cell.budget else (low, middle - 1)
    return low


def _judged(cell: Cell, run: Run) -> dict[str, Any]:
    """How well credibility finds the planted wrong targets."""
    if not run.folder.scores.exists():
        return {}
    scores = QualityScores.from_parquet(run.folder.scores)
    wrong = np.isin(scores.ids, sorted(cell.data.wrong))
    left_out = scores.probability < 0.5 / len(scores.ids)
    share = float(scores.wrong_share)
    notes = {
        "wrong_share": None if np.isnan(share) else round(share, 4),
        "wrong_left_out": int((left_out & wrong).sum()),
        "sound_left_out": int((left_out & ~wrong).sum()),
    }
    if 0 < wrong.sum() < len(wrong):
        seen = np.isfinite(scores.loss)
        notes["auroc_credibility"] = round(float(roc_auc_score(wrong, -scores.credibility)), 4)
        notes["auroc_loss"] = round(float(roc_auc_score(wrong[seen], scores.loss[seen])), 4)
    return notes


_UNIFORM = {"min_rank": RANK, "max_rank": RANK, "dynamic": False}
_RANDOM = {"start": "random"}
_NOTHING = {"mode": "none"}
_CREDIBILITY = {
    "mode": "online",
    "weights": {"gradient_norm": 0.0, "loss_reduction": 0.0, "convergence": 0.0},
}
_PAPER = {"preset": "paper"}
_TERMS = {"mode": "online", "weights": {"gradient_norm": 1.0, "convergence": 1.0}}
METHODS: dict[str, Method] = {
    "lora": lora,
    "oracle": oracle,
    "informed": informed,
    "tsqlora": tsqlora(quality=_CREDIBILITY),
    "lora_trusted": with_trusted(lora),
    "oracle_trusted": with_trusted(oracle),
    "informed_trusted": informed_trusted,
    "tsqlora_trusted": tsqlora(trusted=True, quality=_CREDIBILITY),
    "tsqlora_quality_only": tsqlora(quality=_CREDIBILITY, ranks=_UNIFORM, adapter=_RANDOM),
    "tsqlora_ranks_only": tsqlora(quality=_NOTHING),
    "tsqlora_start_only": tsqlora(quality=_NOTHING, ranks=_UNIFORM),
    "tsqlora_moving_only": tsqlora(quality=_NOTHING, adapter=_RANDOM),
    "tsqlora_r4": tsqlora(quality=_CREDIBILITY, ranks={"mean_rank": RANK // 2}),
    "tsqlora_06": tsqlora(part=0.6, quality=_CREDIBILITY),
    "tsqlora_paper": tsqlora(quality=_PAPER, adapter=_RANDOM),
    "tsqlora_paper_trusted": with_trusted(tsqlora(quality=_PAPER, adapter=_RANDOM)),
    "tsqlora_terms": tsqlora(quality=_TERMS),
    "lora_random": lora_random,
    "lora_r4": lora_r4,
    "small_loss": small_loss,
    "infobatch": infobatch,
    "adalora": adalora,
    "eva": eva,
    "lora_random_trusted": with_trusted(lora_random),
    "small_loss_trusted": with_trusted(small_loss),
    "infobatch_trusted": with_trusted(infobatch),
    "adalora_trusted": with_trusted(adalora),
    "eva_trusted": with_trusted(eva),
}
CORE_METHODS = tuple(
    name
    for name in METHODS
    if name.removesuffix("_trusted") != "informed"
    and name not in ("tsqlora_start_only", "tsqlora_moving_only", "tsqlora_terms")
)
"""Those of the table; the others answered a question of their own (LOG.md)."""
_SOUND = ("clean", "longtail")
UNTOLD = {
    **dict.fromkeys(("oracle", "oracle_trusted"), _SOUND),
    **dict.fromkeys(("informed", "informed_trusted"), (*_SOUND, "duplicates50")),
}
"""Conditions in which a method has nothing to know and is plain LoRA."""
RATE_OF = {
    **dict.fromkeys(("oracle", "informed", "lora_random", "lora_r4"), "lora"),
    **dict.fromkeys(("small_loss", "infobatch", "tsqlora_quality_only"), "lora"),
    **dict.fromkeys(("tsqlora_terms", "tsqlora_r4"), "tsqlora"),
    **dict.fromkeys(("tsqlora_ranks_only", "tsqlora_start_only", "tsqlora_moving_only"), "tsqlora"),
}
"""Whose rate a method takes: plain LoRA's, or the default's; with trusted rows that without them.
Half the rank, tuned by itself on g2p, came to the same (results/evidence_tuning.jsonl)."""
