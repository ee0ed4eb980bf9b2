"""Measurements of every sample to its quality score and probability. NumPy only, no torch.

Symbols as in docs/method.md: gᵢ the gradient of the mean token loss of sample i in the LoRA
factors, sketched to a few hundred numbers; θ the factors; η or ρ a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tsqlora.columns import blocks_of, column, copied, kept, release
from tsqlora.config import QualityConfig
from tsqlora.convergence import width, with_mean, with_others
from tsqlora.credibility import (
    Credibility,
    beside,
    drawable,
    foreseen,
    from_agreement,
    from_null,
    from_reference,
    null_percentiles,
)
from tsqlora.errors import RunError
from tsqlora.measurements import Measurements
from tsqlora.pairs import from_pairs

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

CLIP = 3.0
"""Robust z-scores beyond this count as this."""
ROWS = 65_536
"""Rows of a group in `scores.parquet`, which is written and can be read a group at a time."""
UNIFORM_SHARE = 0.1
"""Share of the draw that ignores the quality score (never the credibility)."""


@dataclass(frozen=True)
class QualityScores:
    """The score of every sample, as the columns of `scores.parquet`, each of length N.

    `gradient_norm`, `loss_reduction` and `convergence` are the raw terms; `quality` is Q_i,
    `probability` p_i (adds up to 1), `selected` the seeded draw of the first epoch. `prediction` is
    what the model said when it was scored, a class's number (-1: never scored) or a number; None
    for generation.
    """

    ids: Ints
    loss: Floats
    gradient_norm: Floats
    loss_reduction: Floats
    convergence: Floats
    credibility: Floats
    quality: Floats
    probability: Floats
    selected: NDArray[np.bool_]
    prediction: Ints | Floats | None = field(default=None, compare=False)
    wrong_share: float = field(default=float("nan"), compare=False)
    verdict: str = field(default="", compare=False)

    def to_parquet(self, path: str | Path) -> None:
        """Write one row a sample: `id`, then the other columns under their own names."""
        columns = {_column(name): getattr(self, name) for name in _COLUMNS}
        if self.prediction is not None:
            columns["prediction"] = self.prediction
        table = pa.table(columns).replace_schema_metadata(
            {"wrong_share": repr(float(self.wrong_share)), "verdict": self.verdict}
        )
        pq.write_table(table, path, row_group_size=ROWS)

    @classmethod
    def from_parquet(cls, path: str | Path) -> QualityScores:
        """Read what `to_parquet` wrote.

        Raises:
            RunError: the file is missing or lacks a column.
        """
        try:
            with pq.ParquetFile(path) as file:
                arrays = {name: _read(file, _column(name)) for name in _COLUMNS}
                if "prediction" in file.schema_arrow.names:
                    arrays["prediction"] = _read(file, "prediction")
                notes = file.schema_arrow.metadata or {}
        except (OSError, KeyError, pa.ArrowException) as error:
            raise RunError(
                f"{path} holds no quality scores ({error}): run `tsqlora score`."
            ) from error
        return cls(
            **arrays,
            wrong_share=float(notes.get(b"wrong_share", b"nan")),
            verdict=notes.get(b"verdict", b"").decode(),
        )

    @property
    def effective_samples(self) -> float:
        """1 / Σ p_i², Kish's effective sample size of the draw, between 1 and N."""
        return float(1 / np.dot(self.probability, self.probability))


_COLUMNS = [f.name for f in fields(QualityScores) if f.compare]


def _column(name: str) -> str:
    return "id" if name == "ids" else name


def _read(file: pq.ParquetFile, name: str) -> np.ndarray:
    made = column(file.metadata.num_rows, file.schema_arrow.field(name).type.to_pandas_dtype())
    start = 0
    for rows in file.iter_batches(ROWS, columns=[name]):
        made[start : start + len(rows)] = rows[0].to_numpy(zero_copy_only=False)
        start += len(rows)
    release()
    return made


def quality_scores(
    pool: Measurements,
    config: QualityConfig,
    reference: Measurements | None = None,
) -> QualityScores:
    """Q_i = α₁‖g_i‖ + α₂Δℓ_i + α₃ΔC_i and p_i = exp(Q_i/τ) / Σ exp(Q_j/τ) (TsqLoRA §3).

    Preset `paper` is the literal sum, ΔC_i the cosine with the pool's mean gradient. Preset
    `default` puts each term on a robust scale, takes their weighted mean, and draws
    p_i ∝ c_i·exp(Q_i/τ) among the credible, mixed with a little uniform; with `reference`
    (trusted samples) ΔC is the cosine with their mean gradient and they calibrate c. `selected` is
    left all true: `Scorer.scores` marks the draw.
    """
    if config.preset == "paper":
        convergence = _pool_cosine(pool)
        credible = Credibility(
            column(len(pool.ids), fill=1), float("nan"), "not judged by preset paper"
        )
        terms = [pool.gradient_norm, pool.loss_reduction, convergence]
        quality = _weighted(iter(terms), config)
        probability = softmax(quality / config.temperature)
    else:
        convergence = convergence_terms(pool)
        credible = credibility(pool, reference)
        terms_in_turn = default_terms(pool, convergence)
        quality = _weighted(terms_in_turn, config)
        quality /= _total_weight(config)
        np.clip(quality, -CLIP, CLIP, out=quality)
        probability = tempered(quality, credible.values, config.temperature)
    return QualityScores(
        ids=pool.ids,
        loss=pool.loss,
        gradient_norm=pool.gradient_norm,
        loss_reduction=pool.loss_reduction,
        convergence=convergence,
        credibility=credible.values,
        quality=quality,
        probability=probability,
        selected=np.ones(len(pool.ids), dtype=bool),
        prediction=pool.predicted,
        wrong_share=credible.wrong_share,
        verdict=credible.verdict,
    )


def default_terms(pool: Measurements, convergence: Floats) -> Iterator[Floats]:
    """The three terms of preset `default` as robust z; log ‖g‖ without its trend in length."""
    logarithm, length = column(len(pool.ids)), column(len(pool.ids))
    for rows in blocks_of(len(pool.ids)):
        logarithm[rows] = np.log(pool.gradient_norm[rows] + 1e-12, dtype=np.float64)
        length[rows] = np.log(pool.length[rows], dtype=np.float64)
    yield robust_z(without_trend(logarithm, length))
    yield robust_z(pool.loss_reduction)
    yield robust_z(convergence)


def credibility(
    pool: Measurements, reference: Measurements | None = None, random: float = 0.0
) -> Credibility:
    """c_i by the permutation null, the reference, or ρ where it is known (`credibility.py`); of
    free text by pairs (`pairs.py`).

    Class labels are judged by predictions too, for what is left unexplained, and both multiplied.
    """
    found = _by_loss(pool, reference, random)
    if len(pool.agrees) == 0:
        return found
    values = _by_predictions(pool, float(np.nan_to_num(found.wrong_share)))
    values *= found.values
    doubtful = int((~drawable(values)).sum())
    if doubtful <= (~drawable(found.values)).sum():
        return found
    text = f"{found.verdict}; the model contradicts {doubtful} labels that it should know"
    return replace(found, values=values, verdict=text)


def _by_predictions(pool: Measurements, explained: float) -> Floats:
    assert pool.predicted is not None
    classes, told = pool.classes or 2, foreseen(pool.group, pool.predicted)
    if told.all():
        return from_agreement(pool.confidence, pool.agrees, classes, explained)
    values, sure = column(len(told), fill=1), kept(pool.confidence, told)
    values[told] = from_agreement(sure, kept(pool.agrees, told), classes, explained)
    return values


def _by_loss(pool: Measurements, reference: Measurements | None, random: float) -> Credibility:
    if len(pool.null_loss) == 0:
        why = "targets are not judged: no wrong ones to compare"
        return Credibility(column(len(pool.ids), fill=1), float("nan"), why)
    if pool.null_owner is not None:
        return _by_pairs(pool, pool.null_owner)
    null = (pool.null_loss, pool.null_group)
    u, size = null_percentiles(pool.loss, pool.group, *null), min(len(null[0]), len(pool.loss))
    trusted = (
        None if reference is None else null_percentiles(reference.loss, reference.group, *null)
    )
    measured = ~np.isnan(u)
    if measured.all():
        return _by_percentiles(u, trusted, size, pool.classes, random)
    found = _by_percentiles(kept(u, measured), trusted, size, pool.classes, random)
    values = column(len(u), fill=1)
    values[measured] = found.values
    few = f"{found.verdict}; {(~measured).sum():,} are not, as too few samples have another label"
    return replace(found, values=values, verdict=few)


def _by_percentiles(
    u: Floats, trusted: Floats | None, size: int, classes: int | None, random: float
) -> Credibility:
    if random > 0 and len(u):
        return beside(u, random, classes)
    if trusted is None:
        return from_null(u, size, classes)
    return from_reference(u, trusted[~np.isnan(trusted)], size, classes)


def _by_pairs(pool: Measurements, owner: Ints) -> Credibility:
    found = from_pairs(pool.null_own, pool.null_loss)
    values = column(len(pool.ids), fill=1)
    values[owner] = found.values
    return replace(found, values=values)


def convergence_terms(pool: Measurements) -> Floats:
    """ΔC_i (N): the cosine of g_i with the mean unit gradient it should agree with.

    With a reference: the mean over the reference, exact, as it was known when g_i was at hand.
    Without: the mean over its *other* kin (leave one out), of sketches: the class, or the numbers
    that are predicted too high, or too low, as these pull apart; of a text's, the whole pool. NaN
    where neither was measured.
    """
    samples = len(pool.ids)
    if pool.alignment is not None:
        return pool.alignment
    if width(pool.sketch) == 0:
        return column(samples, fill=np.nan)
    kin = np.zeros(samples, dtype=np.int8) if pool.kin is None else pool.kin
    return with_others(pool.sketch, kin)


def _pool_cosine(pool: Measurements) -> Floats:
    if width(pool.sketch) == 0:
        return column(len(pool.ids), fill=np.nan)
    return with_mean(pool.sketch, len(pool.ids))


def robust_z(values: Floats) -> Floats:
    """(x - median) / (1.4826 · median absolute deviation), clipped to ±3; 0 if x is not finite."""
    scaled, finite = column(len(values)), kept(values, np.isfinite(values), np.float64)
    if len(finite) == 0:
        return scaled
    centre = np.median(finite, overwrite_input=True)
    finite -= centre
    deviation = np.median(np.abs(finite, out=copied(finite)), overwrite_input=True)
    spread = 1.4826 * deviation or np.std(finite) or 1.0
    np.divide(np.subtract(values, centre, out=scaled), spread, out=scaled)
    np.nan_to_num(np.clip(scaled, -CLIP, CLIP, out=scaled), copy=False, nan=0.0)
    release()
    return scaled


def without_trend(values: Floats, of: Floats) -> Floats:
    """The residual of the least-squares line of `values` on `of`, mean kept."""
    centred = np.subtract(of, of.mean(), out=column(len(of)))
    variance = float(centred @ centred)
    if variance < 1e-12:
        return values
    own = np.subtract(values, values.mean(), out=column(len(of)))
    centred *= float(centred @ own) / variance
    return np.subtract(values, centred, out=own)


def softmax(scores: Floats) -> Floats:
    """exp(x_i) / Σ exp(x_j), without overflow; what underflows stays possible."""
    powers = np.subtract(scores, scores.max(), out=column(len(scores)))
    np.exp(powers, out=powers)
    powers /= powers.sum()
    return np.maximum(powers, np.finfo(np.float64).tiny, out=powers)


def tempered(quality: Floats, credible: Floats, temperature: float) -> Floats:
    """p_i ∝ c_i·exp(Q_i/τ) over `drawable` samples, mixed with c_i-weighted uniform; sums to 1.

    Where nothing is credible, everything is.
    """
    weight = np.multiply(credible, drawable(credible), out=column(len(credible)))
    if not weight.any():
        weight.fill(1)
    sharp = np.divide(quality, temperature, out=column(len(quality)))
    sharp -= sharp.max()
    sharp = np.multiply(np.exp(sharp, out=sharp), weight, out=sharp)
    sharp *= (1 - UNIFORM_SHARE) / sharp.sum()
    weight *= UNIFORM_SHARE / weight.sum()
    sharp += weight
    return sharp


def _weights(config: QualityConfig) -> list[float]:
    weights = config.weights
    return [weights.gradient_norm, weights.loss_reduction, weights.convergence]


def _total_weight(config: QualityConfig) -> float:
    return sum(abs(weight) for weight in _weights(config)) or 1.0


def _weighted(terms: Iterator[Floats], config: QualityConfig) -> Floats:
    """Σ α_k·term_k; the terms come one at a time, as each is as long as the pool."""
    total: Floats | None = None
    for weight, term in zip(_weights(config), terms, strict=True):
        if total is None:
            total = column(len(term))
        for rows in blocks_of(len(term) if weight else 0):
            total[rows] += weight * term[rows]
    assert total is not None
    return total
