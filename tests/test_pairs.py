"""Free text is judged by what its target costs after its own input and after another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import looped_mirror
from tiny import KINDS, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora import asking, scoring
from tsqlora.asking import BLOCK, asked, own_losses, pair_blocks
from tsqlora.batches import forward_losses
from tsqlora.config import QualityConfig
from tsqlora.credibility import CREDIBLE, ENOUGH, Credibility
from tsqlora.losses import IGNORED, last_turn_losses, sample_losses
from tsqlora.mismatch import last_turn, matched_pairs, mismatched_pairs
from tsqlora.null import NULL_SAMPLES
from tsqlora.pairs import contrast, from_pairs
from tsqlora.parts import Parts

SAMPLES = 30


def texts(samples: int, wrong: float, seed: int, clear: float = 0.4) -> tuple[Any, Any, Any]:
    """Losses after own inputs and after others', hard and easy ones, and which are wrong."""
    random = np.random.default_rng(seed)
    hardness, bad = random.gamma(4.0, 0.5, samples), random.random(samples) < wrong
    own = hardness * random.lognormal(0, 0.1, samples)
    mismatched = hardness * random.lognormal(0, 0.1, samples)
    return np.where(bad, own, own * (1 - clear)), mismatched, bad


def adapted(name: str) -> Any:
    return with_lora(tiny_model(name), KINDS[name])


def pool(kind: str, seed: int = 0) -> Dataset:
    return Dataset.from_list(rows_of(tiny_batch(kind, SAMPLES, seed, longest=12)))


@given(st.integers(ENOUGH, 90), st.floats(0.03, 0.6), st.floats(0.1, 0.6), st.integers(0, 10**6))
def test_what_lies_above_zero_shows_how_much_below_is_wrong(
    samples: int, wrong: float, clear: float, seed: int
) -> None:
    own, mismatched, _ = texts(samples, wrong, seed, clear)
    found = from_pairs(own, mismatched)
    wanted = np.array(looped_mirror(list(zip(own, mismatched, strict=True))))
    if (found.values < 1).any():
        np.testing.assert_allclose(found.values, wanted, atol=1e-9)
    share = 2 * np.mean(own > mismatched)
    assert found.like_null == pytest.approx(min(1.0, share))


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1), st.floats(0.1, 10))
def test_the_contrast_changes_sign_with_the_inputs_and_not_with_the_targets_hardness(
    losses: list[tuple[float, float]], harder: float
) -> None:
    own, other = np.array(losses).T
    t = contrast(own, other)
    assert (np.abs(t) <= 1).all()
    np.testing.assert_allclose(contrast(other, own), -t)
    big = own + other > 1e-30
    np.testing.assert_allclose(contrast(own * harder, other * harder)[big], t[big], atol=1e-9)


@pytest.mark.parametrize("wrong", [0.1, 0.2, 0.4])
def test_wrong_targets_are_found_among_hard_ones(wrong: float) -> None:
    own, mismatched, bad = texts(4000, wrong, seed=1)
    found = from_pairs(own, mismatched)
    assert found.wrong_share == pytest.approx(wrong, abs=0.03)
    left_out = found.values < CREDIBLE
    assert left_out[bad].mean() > 0.85
    assert left_out[~bad].mean() < 0.07
    assert found.values.sum() == pytest.approx((~bad).sum(), rel=0.03)
    assert "go with other inputs as well" in found.verdict


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        (texts(1000, 0.0, 2), "no sign"),
        (texts(1000, 0.0, 3, clear=0.0), "does not know the task"),
        (texts(1000, 0.6, 4, clear=0.05), "cannot be told"),
        (texts(ENOUGH - 1, 0.5, 5), "too few"),
        ((np.zeros(50), np.zeros(50), None), "does not know the task"),
    ],
)
def test_nothing_is_doubted_where_nothing_is_wrong_or_nothing_known(
    losses: tuple[Any, ...], verdict: str
) -> None:
    found = from_pairs(*losses[:2])
    assert verdict in found.verdict
    assert (found.values == 1).all()
    assert found.known == (verdict == "no sign")


@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("wrong", [False, True])
def test_all_are_asked_for_where_some_of_the_first_look_wrong(
    name: str, wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = adapted(name), pool(KINDS[name])
    small(monkeypatch, wrong)
    scorer = scoring.Scorer(collate, QualityConfig(), batch_size=4)
    scorer.measure(model, rows, None, tmp_path, share=(0, 1))
    owners, mismatched = asked(tmp_path)
    assert (len(owners) > 12) == wrong, "12 come first"
    known = scorer.passes(KINDS[name], SAMPLES)
    assert scorer.passes(KINDS[name], SAMPLES, 0, tmp_path) == known - 0.5 * (12 - len(owners))
    np.testing.assert_array_equal(owners, np.unique(owners))
    found = scorer.scores(model, rows, None, tmp_path)
    assert (found.credibility < 1).any() == wrong
    own = own_losses(Parts(tmp_path / scoring.POOL, SAMPLES))
    np.testing.assert_allclose(own, slow_losses(model, KINDS[name], rows), rtol=1e-4)
    for block in pair_blocks(SAMPLES, scorer.seed):
        found_pairs = mismatched_pairs(rows.select(block), KINDS[name])
        assert found_pairs is not None
        pairs, of = found_pairs
        for pair, owner in zip(pairs, block[of], strict=True):
            if owner in owners:
                slow = slow_losses(model, KINDS[name], Dataset.from_list([pair]))
                assert mismatched[owners == owner] == pytest.approx(slow, rel=1e-4)


def small(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """Blocks of 12 and 8; a judgement of a tiny random model's pairs that doubts one, or none."""
    monkeypatch.setattr(asking, "NULL_SAMPLES", 12)
    monkeypatch.setattr(scoring, "NULL_SAMPLES", 12)
    monkeypatch.setattr(asking, "BLOCK", 8)

    def judged(own: Any, _: Any) -> Credibility:
        values = np.ones(len(own))
        values[0] = 0.0 if wrong else 1.0
        return Credibility(values, 0.1, "said so")

    monkeypatch.setattr(asking, "from_pairs", judged)
    monkeypatch.setattr("tsqlora.quality.from_pairs", judged)


def slow_losses(model: Any, kind: str, rows: Dataset) -> Any:
    with torch.no_grad():
        each = [forward_losses(model.eval(), kind, collate([dict(row)])) for row in rows]
    return torch.cat(each).numpy()


def test_pairs_that_are_there_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = adapted("llama"), pool("causal-lm")
    small(monkeypatch, wrong=True)
    scorer = scoring.Scorer(collate, QualityConfig(), batch_size=4)
    scorer.measure(model, rows, None, tmp_path, share=(0, 1))
    whole, (parts, calls) = asked(tmp_path), (Parts(tmp_path / "pairs", SAMPLES), [])
    assert len(parts.there()) == len(pair_blocks(SAMPLES, 0)) == 4
    (tmp_path / "pairs" / "part-000002.parquet").unlink()
    taken = asking.null_of_pairs

    def counting(*how: Any) -> Any:
        calls.append(len(how[2]))
        return taken(*how)

    monkeypatch.setattr(asking, "null_of_pairs", counting)
    scorer.measure(model, rows, None, tmp_path, share=(0, 1))
    assert calls == [8]
    for before, now in zip(whole, asked(tmp_path), strict=True):
        np.testing.assert_array_equal(before, now)


@given(st.integers(1, 3 * BLOCK), st.integers(0, 9))
@settings(max_examples=20)
def test_every_sample_is_in_one_block_of_pairs(samples: int, seed: int) -> None:
    blocks = pair_blocks(samples, seed)
    assert sorted(np.concatenate(blocks)) == list(range(samples))
    assert len(blocks[0]) == min(samples, NULL_SAMPLES)
    assert max(map(len, blocks[1:]), default=0) <= BLOCK


LABELS = st.lists(st.sampled_from([IGNORED, 3, 4, 5]), min_size=2, max_size=9)


@given(st.lists(LABELS, min_size=1, max_size=5), st.integers(0, 10**6))
def test_a_chats_last_turn_has_its_own_loss(labels: list[list[int]], seed: int) -> None:
    longest = max(map(len, labels))
    padded = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels])
    logits = torch.randn(*padded.shape, 7, generator=torch.Generator().manual_seed(seed))
    alone = padded.clone()
    for row, of in zip(alone, labels, strict=True):
        start, _ = last_turn(of)
        row[:start] = IGNORED
    losses = sample_losses("causal-lm", logits, padded)
    found = last_turn_losses(logits, padded, losses)
    torch.testing.assert_close(found, sample_losses("causal-lm", logits, alone))


def test_of_a_long_pair_it_is_the_input_that_is_cut() -> None:
    rows = [
        {"input_ids": [1, *range(10, 18), 50], "labels": [IGNORED] * 9 + [50]},
        {"input_ids": [1, 20, 51, 52, 53, 54], "labels": [IGNORED] * 2 + [51, 52, 53, 54]},
    ]
    data = Dataset.from_list([{**row, "attention_mask": [1] * len(row["labels"])} for row in rows])
    found = mismatched_pairs(data, "causal-lm")
    assert found is not None
    first, second = found[0]
    assert first["input_ids"] == [1, *range(13, 18), 51, 52, 53, 54]
    assert first["labels"] == [IGNORED] * 6 + [51, 52, 53, 54]
    assert second["input_ids"] == [1, 20, 50]
    assert found[1] == [1, 0]
    assert matched_pairs(data, "causal-lm")[:] == data[:]


def test_inputs_that_are_alike_are_no_mismatch() -> None:
    rows = Dataset.from_list(
        [{"input_ids": [5, 6], "labels": [i]} for i in range(3)]
        + [{"input_ids": [7], "labels": [9]}]
    )
    found = mismatched_pairs(rows, "seq2seq")
    assert found is not None
    assert found[1] == [3, 2]
