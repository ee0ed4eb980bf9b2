"""What a row of a data set says: its input and its target, as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsqlora.chats import turns_of
from tsqlora.config import DataConfig
from tsqlora.data import render
from tsqlora.errors import DataError
from tsqlora.labels import label_name


def said_of(
    row: Mapping[str, Any], data: DataConfig, features: Mapping[str, Any], lines: bool = True
) -> tuple[str, str]:
    """(input, target) of a row, whole, by the columns that are configured.

    Turns, and the texts of a pair, are on lines of their own, or all on one.

    Raises:
        DataError: a value is missing or is not text or a number.
    """
    if data.messages is not None:
        turns = [
            f"{turn['role']}: {turn.get('content')}" for turn in turns_of(row, data.messages)[0]
        ]
        return ("\n" if lines else " ").join(turns[:-1]), "".join(turns[-1:])
    specs = [data.text] if isinstance(data.text, str) else list(data.text or ())
    text = ("\n" if lines else " ‖ ").join(render(row, spec) for spec in specs)
    if data.target is None:
        return text, ""
    if data.target in features:
        return text, label_said(row[data.target], features[data.target])
    return text, render(row, data.target)


def label_said(value: Any, feature: Any) -> str:
    """The class's name where the data set names its classes, else as the task reads it."""
    names = getattr(feature, "names", None)
    if names and isinstance(value, int):
        return str(names[value]) if 0 <= value < len(names) else str(value)
    try:
        return label_name(value)
    except DataError:
        return str(value)
