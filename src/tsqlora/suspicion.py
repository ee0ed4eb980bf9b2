"""Whether some of a text's targets are wrong, where the losses of a training do not say.

A few are asked for in each window after their own inputs and after others' (`pairs.py`). Which of
the others are wrong would take a forward of each: that is `tsqlora score`. Acting on it within a
training was tried and did harm where a small model knew the task little (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tsqlora.credibility import Floats, are_more
from tsqlora.pairs import from_contrast

WINDOWS = 2
"""The contrasts of so many windows say together whether the model knows the task."""
SETTLED = 200
"""After so many pairs of a model that knows the task no more are asked for."""
SUSPECT = 0.05
"""Users are told of more wrong targets than this."""


class Suspicion:
    """What a few pairs of each window have said so far.

    Attributes:
        recent: contrasts of the last windows.
        asked, above: of windows in which the model knew the task, how many, and how many above 0.
    """

    def __init__(self) -> None:
        self.recent: list[Floats] = []
        self.asked = self.above = 0

    @property
    def settled(self) -> bool:
        """Whether no more pairs are wanted."""
        return self.asked >= SETTLED

    @property
    def confirmed(self) -> bool:
        """Whether more than `SUSPECT` of the targets are wrong: so many above 0 are there by chance
        once in a hundred (a sign test)."""
        return are_more(self.above, self.asked, SUSPECT / 2)

    @property
    def share(self) -> float:
        """π̂ = 2 P(t > 0)."""
        return min(1.0, 2 * self.above / max(self.asked, 1))

    def add(self, contrast: Floats) -> None:
        """Take in a window's contrasts (M)."""
        self.recent = [*self.recent, contrast][-WINDOWS:]
        if from_contrast(np.concatenate(self.recent)).known:
            self.asked += len(contrast)
            self.above += int((contrast > 0).sum())

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays."""
        recent = {f"suspicion.{i}": each for i, each in enumerate(self.recent)}
        return {"suspicion.asked": np.asarray([self.asked, self.above]), **recent}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Put `state` back."""
        self.asked, self.above = map(int, state.get("suspicion.asked", [0, 0]))
        names = [f"suspicion.{i}" for i in range(WINDOWS)]
        self.recent = [state[name] for name in names if name in state]
