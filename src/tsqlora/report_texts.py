"""What the training data says of the samples that a report shows."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tsqlora.artefacts import read_json
from tsqlora.config import RunConfig
from tsqlora.errors import DataError, TsqloraError
from tsqlora.run_folder import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("tsqlora")

READ = 8_000
"""Characters of a text that are looked at."""

_UNSEEN = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


class Said(NamedTuple):
    """The beginning of a text, up to `READ` characters, and how long it is."""

    start: str
    length: int

    def line(self, limit: int) -> str:
        """At most `limit` characters on one line, and how long it was if there were more.

        Characters that cannot be seen, or change the direction of others, are spaces; what UTF-8
        cannot hold is a question mark.
        """
        line = _UNSEEN.sub(" ", self.start[: 4 * limit]).strip().encode("utf-8", "replace").decode()
        if self.length <= 4 * limit and len(line) <= limit:
            return line
        return f"{line[:limit]} … ({self.length:,} characters)"


@dataclass(frozen=True)
class Texts:
    """Inputs and targets of the samples that were asked for, in their order.

    Attributes:
        inputs, targets: as they stand.
        labels: the names of the classes in the model's order; empty where there are none.
        classes: every sample's class by id, where there are classes.
        problem: why there is nothing, or "".
    """

    inputs: list[Said] = field(default_factory=list)
    targets: list[Said] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    classes: dict[int, str] = field(default_factory=dict)
    problem: str = ""


def read_texts(folder: RunFolder, config: RunConfig, ids: np.ndarray) -> Texts:
    """What the training data says about the samples `ids`; nothing, and why, if it is gone."""
    from tsqlora.data import load_dataset
    from tsqlora.row_texts import said_of
    from tsqlora.sources import said

    try:
        dataset = load_dataset(config.data.train, "data.train")
        if len(ids) and ids.max() >= len(dataset):
            raise DataError(
                f"data.train: {said(config.data.train)} has fewer rows than when it was scored."
            )
        rows = [said_of(row, config.data, dataset.features, False) for row in _rows(dataset, ids)]
        return Texts(
            [_start(text) for text, _ in rows],
            [_start(target) for _, target in rows],
            _labels(folder, config, dataset),
            _classes(dataset, config),
        )
    except (TsqloraError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The report shows no texts: %s", error)
        return Texts(problem=one_line(error, 300))


def one_line(value: object, limit: int) -> str:
    """Any value as `Said.line` has it."""
    return _start(str(value)).line(limit)


def _start(text: str) -> Said:
    return Said(text[:READ], len(text))


def _rows(dataset: Dataset, ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """The rows of these ids, which are their numbers, read many at once."""
    for batch in dataset.select(ids).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _labels(folder: RunFolder, config: RunConfig, dataset: Dataset) -> tuple[str, ...]:
    """As training found them, or as it would."""
    from tsqlora.labels import class_names

    if config.task != "classification" or config.data.target not in dataset.features:
        return ()
    if folder.task.exists():
        return tuple(read_json(folder.task)["labels"])
    return class_names(dataset, str(config.data.target), "data.train")


def _classes(dataset: Dataset, config: RunConfig) -> dict[int, str]:
    from tsqlora.row_texts import label_said

    column, features = config.data.target, dataset.features
    if config.task != "classification" or column not in features:
        return {}
    named = (label_said(value, features[column]) for value in dataset[column][:])
    return dict(zip(dataset["id"][:], named, strict=True))
