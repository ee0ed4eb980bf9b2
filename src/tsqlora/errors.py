"""What is wrong, where, and what to do: the errors a user sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

E = TypeVar("E", bound="TsqloraError")


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class TsqloraError(Exception):
    """A mistake the user can mend; `str(error)` is the whole message."""

    @classmethod
    def of(cls: type[E], problems: Sequence[str]) -> E:
        """One error for several problems."""
        return cls("\n".join(f"- {p}" for p in problems) if len(problems) > 1 else problems[0])


class ConfigError(TsqloraError):
    """The configuration, or an argument that mirrors it."""


class DataError(TsqloraError):
    """A data set: a file, a row or a field."""


class ModelError(TsqloraError):
    """A model or tokenizer."""


class RunError(TsqloraError):
    """A run folder or one of its artefacts."""


class TrainingError(TsqloraError):
    """Training cannot go on."""
