"""Turns of a chat: `role` and `content`, or `from` and `value` as ShareGPT wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""What ShareGPT's `from` is as a role; any other is one already."""


def as_turn(message: Any) -> dict[str, Any] | None:
    """The message with `role` and `content`, without the keys that a table fills with None.

    None where it is no turn: no mapping, or one without a role that is text.
    """
    if not isinstance(message, Mapping):
        return None
    turn = {key: value for key, value in message.items() if value is not None}
    if "role" not in turn and isinstance(turn.get("from"), str):
        speaker, said = turn.pop("from"), turn.pop("value", None)
        turn["role"] = ROLES.get(speaker, speaker)
        if said is not None:
            turn["content"] = said
    return turn if isinstance(turn.get("role"), str) else None
