"""What a classifier believed of its samples before it could know their labels by heart.

A network learns what is regular first and wrong labels later (Liu et al. 2020, "Early-learning
regularization", arXiv 2007.00151). Each sample's belief t_i is a running mean of what was predicted
when it was trained on, t_i = 0 before:

    t_i ← β t_i + (1 - β) p_i,    p_i = softmax(z_i), β = 0.7

Once a sample has had three visits, the loss of every further one has beside the cross-entropy

    (λ/n) log(1 - ⟨t_i, p_i⟩),    λ = 3

(theirs, with β and λ as they have them for ten classes), whose gradient by z,
λ p ⊙ (⟨t, p⟩ - t) / (1 - ⟨t, p⟩), holds the prediction to the belief where a label asks for another
class. Trainings of three epochs are the plain ones, bit for bit: in so few, little is learnt by
heart.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEPT = 0.7
"""β, the part of a belief that a further visit leaves."""
STRENGTH = 3.0
"""λ."""
VISITS = 3
"""After so many a belief is held to."""
LEAST = 1e-4
"""No probability is taken to be smaller, so that the logarithm is finite."""
_ENOUGH = 1 - KEPT ** (VISITS + 0.5)
"""Beliefs of k visits sum to 1 - βᵏ."""


def beliefs(before: Tensor, logits: Tensor) -> Tensor:
    """t_i (n, C) after a visit, from those `before` it (n, C; 0 where there was none)."""
    return KEPT * before + (1 - KEPT) * _probabilities(logits.detach())


def early_loss(believed: Tensor, logits: Tensor) -> Tensor:
    """λ log(1 - ⟨t_i, p_i⟩) of each sample (n), t_i (n, C) with this visit in; 0 of those with
    fewer than `VISITS` before.
    """
    agreed = (believed * _probabilities(logits)).sum(-1)
    return STRENGTH * torch.log1p(-agreed) * (believed.sum(-1) > _ENOUGH)


def _probabilities(logits: Tensor) -> Tensor:
    found = logits.float().softmax(-1).clamp(LEAST, 1 - LEAST)
    return found / found.sum(-1, keepdim=True)
