"""Samples are held to what was predicted of them early, from the fourth epoch on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference import looped_early_loss
from runs import classification_run
from test_online import assert_same_bytes, killed, trainer_of  # noqa: F401  killed is a fixture
from tsqlora.config import QualityConfig
from tsqlora.early_learning import KEPT, STRENGTH, beliefs, early_loss
from tsqlora.online_training import BELIEF, OnlineTrainer
from tsqlora.pipeline import train

NUMBERS = st.floats(-8, 8, width=32)


@given(st.data())
def test_the_loss_is_that_of_a_loop_over_samples_and_visits(data: st.DataObject) -> None:
    classes, visits = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 6))
    one = st.lists(NUMBERS, min_size=classes, max_size=classes)
    drawn = data.draw(st.lists(st.lists(one, min_size=visits, max_size=visits), min_size=1))
    logits = torch.tensor(drawn).transpose(0, 1)
    believed = torch.zeros_like(logits[0])
    for visit in logits:
        believed = beliefs(believed, visit)
    found = early_loss(believed, logits[-1])
    assert found.tolist() == pytest.approx(looped_early_loss(drawn), rel=1e-3, abs=1e-4)


def after(visits: int, logits: Tensor) -> Tensor:
    """The beliefs after so many visits that all gave these logits."""
    found = torch.zeros_like(logits)
    for _ in range(visits):
        found = beliefs(found, logits)
    return found


def test_the_gradient_holds_the_prediction_to_the_belief_where_the_label_is_another() -> None:
    """λ p (<t, p> - t) / (1 - <t, p>), against which the cross-entropy's p - y is small."""
    before = after(4, torch.tensor([[3.0, 0.0, -1.0]]))
    logits = torch.tensor([[2.0, 0.5, 0.0]], requires_grad=True)
    p, t = logits.detach().softmax(-1), beliefs(before, logits)
    early_loss(t, logits).sum().backward()
    agreed = (t * p).sum(-1, keepdim=True)
    expected = STRENGTH * p * (agreed - t) / (1 - agreed)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-6)
    assert logits.grad is not None
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1], "a step makes the believed class likelier"
    wrong = torch.nn.functional.one_hot(torch.tensor([1]), 3)
    assert logits.grad[0, 0] + (p - wrong)[0, 0] < (p - wrong)[0, 0] / 2


def test_beliefs_are_kept_by_seven_tenths_and_held_to_after_three_visits() -> None:
    logits = torch.tensor([[1.0, 0.0]])
    for visits in range(6):
        before = after(visits, logits)
        assert before.sum().item() == pytest.approx(1 - KEPT**visits, abs=1e-6)
        assert bool(early_loss(beliefs(before, logits), logits)) == (visits >= 3)


def labels_alone(folder: Path, early: bool, **settings: Any) -> OnlineTrainer:
    """A training of a tiny classifier that measures no gradient."""
    trainer = trainer_of("bert", folder, True, terms=False, logging_steps=1, **settings)
    assert isinstance(trainer, OnlineTrainer)
    quality: QualityConfig = trainer.scoring.scorer.quality
    trainer.scoring.scorer = replace(
        trainer.scoring.scorer, quality=replace(quality, early_learning=early)
    )
    return trainer


def losses_of(trainer: OnlineTrainer) -> list[float]:
    """The logged losses of a whole training."""
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_three_epochs_and_the_first_step_of_the_fourth_are_plain_training(tmp_path: Path) -> None:
    """What is logged is the cross-entropy, so it differs one step after the gradient does."""
    plain, early = (
        losses_of(labels_alone(tmp_path / str(early), early, num_train_epochs=5))
        for early in (False, True)
    )
    assert len(plain) == 15
    assert early[:10] == plain[:10]
    assert early[10:] != plain[10:]
    assert min(early) > 0
    for epochs in (2, 3):
        short = labels_alone(tmp_path / f"{epochs}", True, num_train_epochs=epochs)
        short.train()
        assert BELIEF not in short.visits.names


def test_accumulated_batches_are_held_as_one_of_their_size_is(tmp_path: Path) -> None:
    found = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        trainer = labels_alone(
            tmp_path / str(batch),
            True,
            num_train_epochs=5,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
        )
        found.append(trained(trainer))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-3, atol=1e-5)


def trained(trainer: OnlineTrainer) -> list[float]:
    """All trained weights after a whole training."""
    trainer.train()
    weights = (p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad)
    return torch.cat(list(weights)).tolist()


@pytest.mark.parametrize("at", [14, 18])
def test_a_run_killed_in_its_last_epochs_goes_on_to_the_same_bytes(
    at: int,
    tmp_path: Path,
    killed: Callable[[Path, int], None],  # noqa: F811
) -> None:
    def config(name: str) -> Path:
        (tmp_path / name).mkdir()
        settings = {
            "quality.mode": "online",
            "quality.weights": {"gradient_norm": 0.0, "convergence": 0.0},
            "training.num_train_epochs": 5,
            "training.save_strategy": "steps",
            "training.save_steps": 3,
            "training.per_device_train_batch_size": 16,
        }
        return classification_run(tmp_path / name, 60, **settings)

    interrupted = config("killed")
    killed(interrupted, at)
    whole = train(config("whole"))
    assert_same_bytes(train(interrupted, resume=True), whole)
