"""How often the samples of a rare class are drawn. NumPy only.

A class of few samples is learnt late or not at all in the epochs that fine-tuning takes: whether it
is seen often enough is chance (benchmarks/LOG.md). So one that has less than a part of an even
share of the draw is brought up to it, though no sample comes more than a few times as often: the
model's belief in a class moves with how often it comes, here by log 4 at most. What labels say is
counted as it is given, so wrong labels in a rare class make it less rare.
"""

from __future__ import annotations

import numpy as np

from tsqlora.credibility import Floats, Ints

FLOOR = 0.5
"""The part of an even share, 1/K of K classes, that no class has less of."""
MOST = 4.0
"""How often at most a sample comes for once."""


def raised(shares: Floats, classes: Ints) -> Floats:
    """How many times as often each sample is drawn (N), by their `shares` of the draw as it is.

    min(4, max(1, ½ · s/K · 1/s_k)), with s_k the sum of the shares of its class, s that of all, and
    K the number of classes that there are.
    """
    _, members = np.unique(classes, return_inverse=True)
    held = np.bincount(members, weights=shares)
    even = held.sum() / len(held)
    return np.clip(FLOOR * even / held, 1.0, MOST)[members]
