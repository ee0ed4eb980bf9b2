"""Sensitivity and a parameter budget to integer ranks. Pure Python: no torch, no NumPy."""

from __future__ import annotations

import heapq
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tsqlora.artefacts import atomic_write_json
from tsqlora.config import default_scale
from tsqlora.errors import ConfigError, RunError
from tsqlora.rank_rules import PROPORTIONAL, worth_by

if TYPE_CHECKING:
    from tsqlora.sensitivity import LayerSensitivity


@dataclass(frozen=True)
class RankPlan:
    """The rank of every module (0: not adapted), what it costs, and the scale all of them share.

    Attributes:
        ranks: rank by module name.
        shapes: (out, in) by module name.
        scale: alpha / r, the same for every module and never changed when ranks do.
        budget: the most adapter parameters allowed.
    """

    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    scale: float
    budget: int

    @property
    def parameters(self) -> int:
        """Σ r_m (in_m + out_m)."""
        return sum(rank * sum(self.shapes[name]) for name, rank in self.ranks.items())

    @property
    def adapted(self) -> dict[str, int]:
        """The ranks that are not 0."""
        return {name: rank for name, rank in self.ranks.items() if rank}

    def rank_pattern(self) -> dict[str, int]:
        """PEFT's `rank_pattern`: anchored full names, so that no key can match another module."""
        return {pattern_key(name): rank for name, rank in self.adapted.items()}

    def alpha_pattern(self) -> dict[str, float]:
        """PEFT's `alpha_pattern`: alpha = scale · r for each module."""
        return {pattern_key(name): self.scale * rank for name, rank in self.adapted.items()}

    def to_dict(self) -> dict[str, object]:
        """As in `plan.json`."""
        return {
            "version": 1,
            "ranks": self.ranks,
            "parameters": self.parameters,
            "budget": self.budget,
            "scale": self.scale,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write `plan.json`."""
        atomic_write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Read `plan.json`.

        Raises:
            RunError: the file is missing or is not a plan.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            shapes = {name: (int(s[0]), int(s[1])) for name, s in raw["shapes"].items()}
            return cls(dict(raw["ranks"]), shapes, float(raw["scale"]), int(raw["budget"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} is not a rank plan ({error}): make it again by `tsqlora plan`."
            ) from error


def pattern_key(name: str) -> str:
    """The key of a PEFT pattern, a regular expression, that matches `name` and nothing else."""
    return "^" + re.escape(name)


def allocate_ranks(
    sensitivity: LayerSensitivity,
    mean_rank: float | None = None,
    parameters: int | None = None,
    min_rank: int = 0,
    max_rank: int | Mapping[str, int] = 32,
    scale: float | None = None,
    rule: str = PROPORTIONAL,
) -> RankPlan:
    """Ranks by sensitivity, exactly within a budget of parameters.

    Σ r_m (in_m + out_m) ≤ budget, min_rank ≤ r_m ≤ min(max_rank, in_m, out_m), and what is left of
    the budget is less than one more rank of the cheapest module that may still grow. The budget is
    `parameters`, or `mean_rank` in every module (8 where neither is given); `max_rank` may be given
    by module.

    From min_rank on, the next rank goes to the largest worth w_m(r_m + 1) by `rule`
    (`rank_rules.py`; `proportional`, S_m / (r_m + 1), is the paper's r_m ∝ S_m) among the modules
    that may still grow and still fit. So more sensitivity never gives less rank at equal cost, and
    a module's rank never falls when the budget grows while all fit. Of equal worth the lower rank
    comes first, then the more sensitive, then the first name. Modules of worth 0 come last, evenly.
    `scale` is alpha / r in all of them, `default_scale` where it is not given.

    Raises:
        ConfigError: the bounds are impossible, the budget lies below min_rank everywhere, or the
            rule is unknown or lacks the spectrum it needs.
    """
    shapes = sensitivity.shapes
    budget = check_ranks(shapes, mean_rank, parameters, min_rank, max_rank)
    caps = _caps(shapes, max_rank)
    ranks = dict.fromkeys(sorted(shapes), min_rank)
    left = budget - sum(min_rank * sum(shape) for shape in shapes.values())
    worth = worth_by(rule, sensitivity)

    def claim(name: str) -> tuple[Fraction, int, float, str]:
        rank = ranks[name]
        return -worth(name, rank + 1), rank, -sensitivity.modules[name], name

    heap = [claim(name) for name in ranks if caps[name] > min_rank]
    heapq.heapify(heap)
    while heap:
        name = heapq.heappop(heap)[-1]
        if sum(shapes[name]) > left:
            continue
        ranks[name] += 1
        left -= sum(shapes[name])
        if ranks[name] < caps[name]:
            heapq.heappush(heap, claim(name))
    scale = scale or default_scale(mean_rank)
    return RankPlan({name: ranks[name] for name in shapes}, dict(shapes), scale, budget)


def check_ranks(
    shapes: Mapping[str, tuple[int, int]],
    mean_rank: float | None = None,
    parameters: int | None = None,
    min_rank: int = 0,
    max_rank: int | Mapping[str, int] = 32,
) -> int:
    """The budget of `allocate_ranks` for modules of these shapes, which need no sensitivity yet.

    Raises:
        ConfigError: as `allocate_ranks`.
    """
    budget = _budget(shapes, mean_rank, parameters)
    _check_bounds(shapes, _caps(shapes, max_rank), budget, min_rank)
    return budget


def _caps(
    shapes: Mapping[str, tuple[int, int]], max_rank: int | Mapping[str, int]
) -> dict[str, int]:
    most = dict.fromkeys(shapes, max_rank) if isinstance(max_rank, int) else max_rank
    return {name: min(most[name], *shape) for name, shape in shapes.items()}


def _budget(
    shapes: Mapping[str, tuple[int, int]], mean_rank: float | None, parameters: int | None
) -> int:
    if mean_rank is not None and parameters is not None:
        raise ConfigError("Give the budget as mean_rank or as parameters, not both.")
    if parameters is not None:
        return parameters
    mean = Fraction(str(8 if mean_rank is None else mean_rank))  # as it is written: 0.1 is 1/10
    return math.floor(mean * sum(sum(shape) for shape in shapes.values()))


def _check_bounds(
    shapes: Mapping[str, tuple[int, int]], caps: Mapping[str, int], budget: int, min_rank: int
) -> None:
    problems = []
    if min_rank < 0:
        problems.append(f"ranks.min_rank = {min_rank} is negative; the least is 0 (not adapted).")
    narrow = [name for name, cap in caps.items() if min_rank > cap]
    if narrow:
        name, others = narrow[0], f", and {len(narrow) - 1} more modules" if narrow[1:] else ""
        problems.append(
            f"ranks.min_rank = {min_rank} is over what {name} of shape {shapes[name]} can take "
            f"({caps[name]}){others}; lower it."
        )
    least = sum(min_rank * sum(shape) for shape in shapes.values())
    cheapest = min((sum(shape) for shape in shapes.values()), default=0)
    if budget < max(least, cheapest):
        problems.append(
            f"The budget of {budget} parameters is below the minimum of {max(least, cheapest)} "
            f"(min_rank = {min_rank} in {len(shapes)} modules): raise ranks.mean_rank or "
            "ranks.parameters, or lower ranks.min_rank."
        )
    if problems:
        raise ConfigError.of(problems)
