"""What a training reports beside its loss: where ranks and samples stand.

`Trainer.log` takes it to whatever `training.report_to` names: tensorboard, wandb, trackio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tsqlora.quality import QualityScores

Figures = dict[str, float]


@dataclass
class Reported:
    """Where a training gets it from.

    Attributes:
        ranks: `of_ranks`, each module's own where one has moved since that step (None: the start).
        samples: `of_samples`, as they were last drawn by.
    """

    ranks: Callable[[int | None], Figures] = lambda since: {}
    samples: Figures = field(default_factory=dict)

    def beside(self, log: Sequence[Mapping[str, Any]]) -> Figures:
        """What goes beside the next loss, after those in a Trainer's `log_history`."""
        since = next((line["step"] for line in reversed(log) if "loss" in line), None)
        return {**self.samples, **self.ranks(since)}


def of_ranks(
    ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], budget: int, each: bool
) -> Figures:
    """Mean, smallest and largest rank of all planned modules, and the share of the budget in use.

    With `each` the rank of every module too, as `rank/NAME`.
    """
    values = list(ranks.values())
    used = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    found = {
        "ranks/mean": sum(values) / max(len(values), 1),
        "ranks/min": float(min(values, default=0)),
        "ranks/max": float(max(values, default=0)),
        "ranks/budget_used": used / max(budget, 1),
    }
    return found | {f"rank/{name}": float(rank) for name, rank in ranks.items() if each}


def of_samples(scores: QualityScores, size: int) -> Figures:
    """The share of the pool that an epoch of so many draws sees, and the pool's mean credibility.

    The second only where samples were scored.
    """
    samples, possible = len(scores.ids), int((scores.probability > 0).sum())
    found = {"quality/selected_share": min(size, possible or samples) / samples}
    if not np.isnan(scores.loss).all():
        found["quality/mean_credibility"] = float(scores.credibility.mean())
    return found
