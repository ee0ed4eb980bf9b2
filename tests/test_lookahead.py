"""Each sample's loss after its own step, against steps really taken one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import looped_curvature, looped_gradients, looped_lookahead, loss_of
from tiny import KINDS, all_terms, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.lookahead import NUDGE, first_order, one_step, second_order
from tsqlora.per_sample_grads import Keep, PerSampleGradients, SquaredNorms
from tsqlora.scoring import Scorer

LOOKAHEADS: tuple[Any, ...] = ("exact", "first_order", "second_order")
NAMES = ["bert", "albert", "bart", "t5", "gpt2", "llama", "qwen2-moe"]


@pytest.fixture(scope="module", autouse=True)
def _math_attention() -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def measured(model: Any, kind: str, batch: dict[str, Tensor]) -> Any:
    """The engine after one batch: gradients, kept ones, losses, squared norms."""
    keep, norms = Keep(), SquaredNorms()
    with PerSampleGradients(model, keep, norms) as gradients:
        losses = loss_of(model, kind, batch)
        gradients.backward(losses)
    return gradients, keep, losses.detach(), torch.as_tensor(norms.total)


@settings(max_examples=25)
@given(
    name=st.sampled_from(NAMES),
    samples=st.integers(1, 5),
    longest=st.integers(4, 10),
    displacement=st.sampled_from([1e-3, 0.5, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_lookahead_of_a_batch_equals_steps_really_taken_one_by_one(
    name: str, samples: int, longest: int, displacement: float, seed: int
) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, seed, double=True), kind)
    batch = tiny_batch(kind, samples, seed, longest)
    gradients, keep, _, squared = measured(model, kind, batch)
    steps = displacement / squared.sqrt()
    with torch.no_grad(), one_step(gradients, keep, steps):
        got = loss_of(model, kind, batch)
    assert torch.allclose(got, looped_lookahead(model, kind, batch, steps), rtol=1e-10)


@pytest.mark.parametrize("name", ["bert", "bart", "gpt2"])  # Llama's norms round to float32
def test_estimates_are_the_taylor_series_of_the_step(name: str) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, double=True), kind)
    batch = tiny_batch(kind)
    gradients, keep, losses, squared = measured(model, kind, batch)
    steps = 1e-3 / squared.sqrt()

    def forward() -> Tensor:
        return loss_of(model, kind, batch)

    first = first_order(squared, steps)
    second = second_order(gradients, keep, losses, squared, steps, forward, nudge=1e-5)
    assert torch.allclose(first, 1e-3 * squared.sqrt())
    bend = 0.5 * steps.square() * looped_curvature(model, kind, batch)
    assert torch.allclose(first - second, bend, rtol=0.02, atol=float(bend.abs().max()) / 100)


def test_the_model_is_as_it_was_after_a_step() -> None:
    model = with_lora(tiny_model("bert", double=True), "classification")
    batch = tiny_batch("classification")
    gradients, keep, losses, squared = measured(model, "classification", batch)
    with torch.no_grad(), one_step(gradients, keep, 1 / squared.sqrt()):
        loss_of(model, "classification", batch)
    assert torch.equal(loss_of(model, "classification", batch), losses)


@settings(max_examples=10)
@given(
    name=st.sampled_from(["bert", "bart", "gpt2"]),
    samples=st.integers(1, 5),
    preset=st.sampled_from(["default", "paper"]),
    seed=st.integers(0, 10**6),
)
def test_scores_take_the_estimate_that_was_asked_for(
    name: str, samples: int, preset: Any, seed: int
) -> None:
    """First order: η‖g‖²; second: with the curvature of a small step really taken; exact: steps."""
    kind = KINDS[name]
    model = with_lora(tiny_model(name, seed), kind)
    rows = Dataset.from_list(rows_of(tiny_batch(kind, samples, seed)))
    batch = collate(list(rows))
    double = with_lora(tiny_model(name, seed, double=True), kind)
    double.load_state_dict(model.state_dict())
    gradients = looped_gradients(double, kind, batch)
    squared = torch.stack([sum(g.square().sum() for g in each.values()) for each in gradients])
    steps = 0.5 / squared.sqrt() if preset == "default" else torch.full_like(squared, 1e-3)
    before, small = loss_of(double, kind, batch).detach(), NUDGE / squared.sqrt()
    nudged = looped_lookahead(double, kind, batch, small)
    slope = steps * squared
    bend = (steps / small).square() * (nudged - before + small * squared)
    wanted = {
        "first_order": slope,
        "second_order": torch.where(bend > 0, slope.square() / (slope + bend), slope - bend),
        "exact": before - looped_lookahead(double, kind, batch, steps),
    }
    for lookahead, expected in wanted.items():
        scorer = Scorer(collate, all_terms(preset=preset, lookahead=lookahead))
        got = torch.from_numpy(scorer.score(model, rows).loss_reduction)
        assert torch.allclose(got.double(), expected, rtol=1e-3, atol=2e-4), lookahead


def test_the_first_order_costs_no_forward() -> None:
    wanted = [Scorer(collate, all_terms(lookahead=each)).wanted for each in LOOKAHEADS]
    assert [each.halves for each in wanted] == [3, 2, 3]
    forwards = []
    for lookahead in LOOKAHEADS:
        model, calls = with_lora(tiny_model("bert"), "classification"), []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        rows = Dataset.from_list(rows_of(tiny_batch("classification", samples=6)))
        Scorer(collate, all_terms(lookahead=lookahead)).score(model, rows)
        forwards.append(len(calls))
    assert forwards[0] == forwards[2] == forwards[1] + 1
