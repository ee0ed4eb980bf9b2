"""Turns of a chat: `role` and `content`, or `from` and `value` as ShareGPT wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsqlora.errors import DataError

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""What ShareGPT's `from` is as a role; any other is one already."""


Columns = str | tuple[str, str]
"""Of a chat (`data.messages`): one of all its turns, or a prompt's and the completion's."""


def chat_columns(columns: Columns) -> tuple[str, ...]:
    """Their names."""
    return (columns,) if isinstance(columns, str) else columns


def turns_of(row: Mapping[str, Any], columns: Columns) -> tuple[list[dict[str, Any]], int]:
    """A row's turns, and how many of them at the beginning are the prompt column's.

    Raises:
        DataError: a message is no turn.
    """
    parts = [row[name] or () for name in chat_columns(columns)]
    turns = [as_turn(message) for part in parts for message in part]
    known = [turn for turn in turns if turn is not None]
    if len(known) < len(turns):
        raise DataError(
            "a message is not a mapping with `role` and `content` (or `from` and `value`). Mend "
            "the row."
        )
    return known, sum(map(len, parts[:-1]))


def question_and_answer(text: str, target: str) -> list[dict[str, Any]]:
    """Two turns (`data.chat`), without the space around them.

    Raises:
        DataError: there is nothing but space in the question.
    """
    if not text.strip():
        raise DataError("the text is blank. Fill it in or drop the row.")
    said = {"user": text.strip(), "assistant": target.strip()}
    return [{"role": role, "content": content} for role, content in said.items()]


def as_turn(message: Any) -> dict[str, Any] | None:
    """The message with `role` and `content`, without the keys that a table fills with None.

    Content in parts is one text, if all of them are. None where it is no turn: no mapping, or one
    without a role that is text.
    """
    if not isinstance(message, Mapping):
        return None
    turn = {key: value for key, value in message.items() if value is not None}
    if "role" not in turn and isinstance(turn.get("from"), str):
        speaker, said = turn.pop("from"), turn.pop("value", None)
        turn["role"] = ROLES.get(speaker, speaker)
        if said is not None:
            turn["content"] = said
    if isinstance(parts := turn.get("content"), list) and all(map(_is_text, parts)):
        turn["content"] = "".join(part["text"] for part in parts)
    return turn if isinstance(turn.get("role"), str) else None


def _is_text(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return kind == "text" and isinstance(part.get("text"), str)
