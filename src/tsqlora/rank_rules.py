"""What the next rank of a module is worth, by each rule, as exact fractions. Pure Python.

A rule gives w_m(j), the worth of the j-th rank of module m, never rising with j. Ranks then go, one
by one, to the largest worth, so a rule is all that `allocate_ranks` needs to know. S_m is the
sensitivity, c_m = in + out the cost of a rank, σ_mj the singular values of the mean gradient:

proportional    S_m / j           r ∝ S_m (TsqLoRA §3), by D'Hondt's divisors.
square_root     S_m / j²          r ∝ √S_m, where sensitivities spread over orders of magnitude.
per_parameter   S_m / (c_m j)     r ∝ S_m / c_m: the most Σ S_m log r_m at Σ r_m c_m = budget
                                  (proportional fairness, Kelly 1997).
waterfill       S_m / (c_m 2^j)   r = log₂(S_m / c_m) above a common level: every further rank is
                                  worth half (reverse water-filling, Cover and Thomas §10.3).
marginal_gain   σ_mj² / c_m       the most energy Σ σ² of the mean gradients that the budget can
                                  hold: what a first step of these ranks follows (LoRA-GA,
                                  arXiv 2407.05000; as EVA, arXiv 2410.07170, does for inputs).
uniform         1 / j             the same rank everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from tsqlora.errors import ConfigError

if TYPE_CHECKING:
    from tsqlora.sensitivity import LayerSensitivity

PROPORTIONAL, MARGINAL_GAIN = "proportional", "marginal_gain"
Worth = Callable[[str, int], Fraction]
"""w_m(j) for a module's name and j from 1."""

_BY_SENSITIVITY: dict[str, Callable[[Fraction, int, int], Fraction]] = {
    PROPORTIONAL: lambda value, cost, j: value / j,
    "square_root": lambda value, cost, j: value / j**2,
    "per_parameter": lambda value, cost, j: value / (cost * j),
    "waterfill": lambda value, cost, j: value / (cost * 2**j),
    "uniform": lambda value, cost, j: Fraction(1, j),
}
RULES = (*_BY_SENSITIVITY, MARGINAL_GAIN)


def worth_by(rule: str, sensitivity: LayerSensitivity) -> Worth:
    """The rule's w_m(j).

    Raises:
        ConfigError: the rule is unknown, it needs a spectrum that was not taken, or a value is
            negative or not finite.
    """
    if rule not in RULES:
        raise ConfigError(f"Unknown rule of ranks {rule!r}: choose from {', '.join(RULES)}.")
    costs = {name: sum(shape) for name, shape in sensitivity.shapes.items()}
    if rule == MARGINAL_GAIN:
        gains = _spectra(sensitivity)
        return lambda name, j: (
            (gains[name][j - 1] if j <= len(gains[name]) else Fraction()) / (costs[name])
        )
    values, formula = fractions_of(sensitivity.modules), _BY_SENSITIVITY[rule]
    return lambda name, j: formula(values[name], costs[name], j)


def fractions_of(values: Mapping[str, float], largest: float | None = None) -> dict[str, Fraction]:
    """Each value as a part of the largest, exact to 12 digits: ties do not hang on rounding.

    Raises:
        ConfigError: a value is negative or not finite.
    """
    bad = [name for name, value in values.items() if not (math.isfinite(value) and value >= 0)]
    if bad:
        raise ConfigError(
            f"The sensitivity of {bad[0]} is {values[bad[0]]}, not a number of at least 0: look at "
            "the losses of the samples that it was measured on."
        )
    largest = max(values.values(), default=0.0) if largest is None else largest
    if largest == 0:
        return dict.fromkeys(values, Fraction())
    return {name: Fraction(f"{value / largest:.11e}") for name, value in values.items()}


def _spectra(sensitivity: LayerSensitivity) -> dict[str, list[Fraction]]:
    missing = [name for name in sensitivity.shapes if name not in sensitivity.spectrum]
    if missing:
        raise ConfigError(
            f"The rule {MARGINAL_GAIN} needs the spectrum of every module's mean gradient, and "
            f"{missing[0]} has none: measure by layer_sensitivity(..., spectrum=max_rank)."
        )
    spectra = {name: sorted(values, reverse=True) for name, values in sensitivity.spectrum.items()}
    largest = max((values[0] for values in spectra.values() if values), default=0.0)
    gains = {}
    for name, values in spectra.items():
        parts = fractions_of({f"{name} ({j})": value for j, value in enumerate(values)}, largest)
        gains[name] = [part**2 for part in parts.values()]
    return gains
