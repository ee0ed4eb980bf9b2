"""Trusted rows in a training that judges its targets: known to be right, at the end of its pool.

They are trained on as all others are, and never doubted. How often says what the others are worth
beside them. Where a share ρ of the targets says nothing of its input (as if drawn at random), a
sample's gradient is (1 - ρ) g + noise, and were the noise of both kinds as large, the combination
that finds g best would weigh a sample of the pool by 1 - ρ. That of wrong targets is larger, the
more so the longer they are not learnt, and a trusted row is drawn

    k = min(30, 1 / (1 - ρ)³)

times as often; of the powers 1, 2 and 3 the last was best (benchmarks/LOG.md). ρ follows from
losses, as shares u of the losses of wrong targets below them (`credibility.py`): uniform where a
target says nothing, so that

    mean u = (1 - ρ) mean u' + ρ / 2,

u' of trusted rows that the model has seen as often as the pool's. Hard is not taken for wrong, as
the trusted rows are as hard. One half of them is this control: as long as ρ is not known it comes
once an epoch, as every row does, the other half `UNKNOWN` times. The first steps, before anything
is measured under a new head, begin with that half: labels that are wrong in two of five teach a
model next to nothing in so few.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset, concatenate_datasets

from tsqlora.credibility import ENOUGH, Floats, Ints
from tsqlora.errors import DataError

UNKNOWN = 3.0
"""How often trusted rows of the half that is no control are drawn as long as ρ is not known."""
MOST = 0.9
"""ρ at most."""
POWER, MOST_OFTEN = 3, 30.0
"""Of 1 / (1 - ρ) in k, and k at most."""
KNOWS, CLEAR = 3.0, 2.0
"""Standard errors by which the control's mean u must lie below that of wrong targets, ½, and below
the pool's."""


def joined(pool: Dataset, trusted: Dataset) -> Dataset:
    """Both encoded; the trusted rows are numbered on.

    Raises:
        DataError: there is no trusted row.
    """
    if len(trusted) == 0:
        raise DataError("quality.reference holds no row: give trusted samples, or leave it out.")
    ids = np.arange(len(pool), len(pool) + len(trusted))
    renumbered = trusted.remove_columns("id").add_column("id", ids.tolist())
    renumbered = renumbered.select_columns(pool.column_names)
    if renumbered.features != pool.features:
        renumbered = renumbered.cast(pool.features)
    return concatenate_datasets([pool, renumbered])


def halves(rows: int, trusted: int, seed: int) -> tuple[Ints, Ints]:
    """Of the last `trusted` of so many rows: the positions for the first steps, and the control."""
    order = rows - trusted + np.random.default_rng(seed).permutation(trusted)
    return np.sort(order[: trusted // 2]), np.sort(order[trusted // 2 :])


def first_rows(rows: Dataset, trusted: int, draws: int, seed: int) -> Dataset:
    """So many for the first steps: the trusted half that is no control, then some of the pool."""
    if 0 in (trusted, draws):
        return rows
    shown = halves(len(rows), trusted, seed)[0][:draws]
    others = np.random.default_rng(seed).permutation(len(rows) - trusted)
    lacking = np.resize(others, draws - len(shown))
    return rows.select(np.concatenate([shown, lacking]))


def random_share(u: Floats, control: Floats) -> float:
    """ρ of the pool, by its u (N) and the control's (M), NaN where there is none; 0 where chance
    could be all of it.

    NaN, not known, by fewer than `ENOUGH` control rows and by a model that does not tell their
    targets from wrong ones yet.
    """
    u, control = u[~np.isnan(u)], control[~np.isnan(control)]
    if min(len(control), len(u)) < ENOUGH:
        return np.nan
    gap, above = 0.5 - control.mean(), u.mean() - control.mean()
    error = np.sqrt(control.var() / len(control) + u.var() / len(u))
    if gap < KNOWS * error:
        return np.nan
    return float(min(above / gap, MOST)) if above > CLEAR * error else 0.0


def worth(random: float, left_out: float) -> float:
    """k, where a share of the pool is left out, taken for a part of `random`, its ρ."""
    left = max(0.0, random - left_out) / max(1e-9, 1 - left_out)
    return min(MOST_OFTEN, (1 - min(left, MOST)) ** -POWER)
