"""The economical mode: some samples measured whole, the others predicted from their last layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tiny import KINDS, all_terms, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora import QualityScores, calibration
from tsqlora.calibration import LEAST, ONE_IN, Known, calibrated, drawn_whole, measured_whole
from tsqlora.config import QualityWeights
from tsqlora.measuring import Meter, Wanted
from tsqlora.scoring import Scorer

ALL = ("gradient_norm", "loss_reduction", "convergence")
NAMES = ["bert", "albert", "bart", "gpt2", "llama", "mixtral", "openai-gpt", "xlm"]


def known(samples: int, seed: int = 0) -> Known:
    random = np.random.default_rng(seed)
    length = random.integers(1, 40, samples)
    return Known(random.gamma(2.0, 1.0, samples), length, random.gamma(2.0, 1.0, samples) + 0.1)


def rows(kind: str, samples: int) -> Dataset:
    return Dataset.from_list(rows_of(tiny_batch(kind, samples)))


def adapted(name: str) -> Any:
    experts = ["mlp.experts.down_proj"] if name == "mixtral" else None
    return with_lora(tiny_model(name), KINDS[name], target_parameters=experts)


@given(st.integers(0, 5000), st.integers(0, 10**6))
def test_one_in_so_many_is_measured_whole_but_enough_to_learn_from(samples: int, seed: int) -> None:
    drawn = drawn_whole(samples, seed)
    assert len(drawn) == measured_whole(samples) == len(np.unique(drawn))
    assert min(samples, LEAST) <= len(drawn) <= max(LEAST, samples / ONE_IN + 1)
    assert ((drawn >= 0) & (drawn < samples)).all()
    np.testing.assert_array_equal(drawn, drawn_whole(samples, seed))


@given(st.integers(0, 300), st.integers(0, 10**6))
def test_what_was_measured_stays_and_all_else_is_predicted(samples: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    norms, reductions = random.gamma(2.0, 1.0, samples) + 0.1, random.normal(size=samples)
    whole = np.isin(np.arange(samples), drawn_whole(samples, seed))
    got = calibrated(
        known(samples, seed),
        np.where(whole, norms, np.nan),
        np.where(whole, reductions, np.nan),
        np.square,
    )
    for found, true in zip(got, (norms, reductions), strict=True):
        np.testing.assert_array_equal(found[whole], true[whole])
        assert np.isfinite(found).all()
    assert (got[0] > 0).all()


@pytest.mark.parametrize("rate", [None, 1e-3])
def test_laws_between_cheap_and_dear_are_found(rate: float | None) -> None:
    """‖g‖ a product of powers, and a share of the first order that falls with the loss."""
    cheap, wanted = known(2000), Wanted(ALL, rate)
    norms = 3 * cheap.last_norm**0.7 * cheap.length**-0.2
    reductions = (0.9 - 0.1 * cheap.loss) * wanted.first_order(norms)
    whole = np.isin(np.arange(2000), drawn_whole(2000, 0))
    blank = np.where(whole, 0, np.nan)
    got = calibrated(cheap, norms + blank, reductions + blank, wanted.first_order)
    np.testing.assert_allclose(got[0], norms, rtol=1e-3)
    np.testing.assert_allclose(got[1], reductions, rtol=1e-2, atol=1e-3 * reductions.std())


def test_terms_that_nobody_measured_stay_unknown() -> None:
    norms, unknown = np.ones(5), np.full(5, np.nan)
    got = calibrated(known(5), norms, unknown, np.square)
    np.testing.assert_array_equal(got[0], norms)
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_measurement_is_the_full_one_beside_that_of_the_last_layers(name: str) -> None:
    model, kind = adapted(name), KINDS[name]
    batch = tiny_batch(kind, 6)
    full, last = Wanted(ALL), Wanted(ALL, depth=0.4)
    found, all_layers, few = (
        Meter(model, kind, wanted).measure(batch)
        for wanted in (replace(last, whole=True), full, last)
    )
    assert found.keys() == few.keys()
    for term in ("loss", "length", "gradient_norm", "loss_reduction"):
        np.testing.assert_array_equal(found[term], all_layers[term])
    for term in ("loss", "length", "last_norm", "sketch"):
        np.testing.assert_allclose(found[term], few[term], rtol=1e-5, atol=1e-6)
    assert np.isnan(few["gradient_norm"]).all()
    assert np.isnan(few["loss_reduction"]).all()
    assert (found["last_norm"] < found["gradient_norm"]).all()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_with_every_sample_measured_whole_the_scores_are_the_full_ones(preset: Any) -> None:
    weights = QualityWeights(1.0, 1.0, 0.0)
    full, economical = (
        Scorer(
            collate, all_terms(preset=preset, weights=weights, depth=depth), batch_size=32
        ).score(adapted("bert"), rows("classification", 24))
        for depth in (1.0, 0.4)
    )
    for term in ("loss", "gradient_norm", "loss_reduction", "quality", "probability"):
        np.testing.assert_array_equal(getattr(economical, term), getattr(full, term))


def economical_scores(tmp_path: Path, shares: int, batch_size: int = 4) -> QualityScores:
    model, pool = adapted("llama"), rows("causal-lm", 60)
    scorer = Scorer(collate, all_terms(depth=0.4), batch_size=batch_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tsqlora.asking.Asking.ask", lambda *_: None)  # until all parts are there
        for first in range(shares):
            scorer.measure(model, pool, None, tmp_path, share=(first, shares))
    scorer.measure(model, pool, None, tmp_path, share=(0, shares))
    return scorer.scores(model, pool, None, tmp_path)


def test_economical_scores_depend_neither_on_the_processes_nor_on_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "LEAST", 20)
    monkeypatch.setattr("tsqlora.scoring.PART", 2)
    one = economical_scores(tmp_path / "one", 1)
    two = economical_scores(tmp_path / "two", 2)
    other = economical_scores(tmp_path / "other", 1, batch_size=7)
    for term in (*ALL, "quality", "loss"):
        np.testing.assert_array_equal(getattr(one, term), getattr(two, term))
        np.testing.assert_allclose(getattr(one, term), getattr(other, term), rtol=1e-3, atol=1e-3)
    assert np.isfinite(one.quality).all()


def test_the_economical_mode_costs_what_it_says() -> None:
    """Most samples: forward and 0.4 of a backward; one in 16: forward, backward, forward."""
    scorer = Scorer(collate, all_terms(depth=0.4), batch_size=32)
    assert scorer.passes("classification", 1600) == pytest.approx(1500 * 0.7 + 100 * 1.5)
    full = Scorer(collate, all_terms()).passes("classification", 1600)
    assert scorer.passes("classification", 1600) / full == pytest.approx(0.5)
    model, pool = adapted("bert"), rows("classification", 200)
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, given: counts.append(len(given["input_ids"])), with_kwargs=True
    )
    assert torch.isfinite(torch.from_numpy(scorer.score(model, pool).quality)).all()
    probed = 3 + 3
    assert sum(counts) == 200 + 64 + probed
