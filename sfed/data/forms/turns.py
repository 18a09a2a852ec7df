"""The turns of a conversation as records hold them, brought to role and content. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Turn = Mapping[str, Any]
_ROLES_OF_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""The values of ``from`` in the format of ShareGPT -> roles of chat templates."""


def turns_of(value: Any) -> list[Turn]:
    """Return the turns of a conversation, each with role and content.

    Turns with ``from`` and ``value``, the format of ShareGPT, are read as well as those with
    ``role`` and ``content``. Content that is a list of text parts is their texts in turn.

    Raises:
        TypeError, ValueError: where it is no list of such turns.
    """
    if not value or not are_objects(value):
        raise TypeError("'messages' is no list of turns with role and content")
    return [_turn(turn, f"turn {number} of 'messages'") for number, turn in enumerate(value, 1)]


def are_objects(value: Any) -> bool:
    """Whether it is a list of JSON objects."""
    return isinstance(value, list) and all(isinstance(one, Mapping) for one in value)


def _turn(turn: Turn, what: str) -> Turn:
    if "role" not in turn and "from" in turn:
        turn = _of_sharegpt(turn, what)
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str):
        raise TypeError(f"{what} has no 'role', such as user or assistant")
    if content and are_objects(content):
        return {**turn, "content": _joined(content, f"{what} ({role})")}
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        kind = "null" if content is None else type(content).__name__
        raise TypeError(f"{what} ({role}): 'content' holds {kind}, not text")
    return turn


def _of_sharegpt(turn: Turn, what: str) -> Turn:
    said_by = turn["from"]
    if not isinstance(said_by, str) or said_by not in _ROLES_OF_SHAREGPT:
        raise ValueError(
            f"{what}: 'from' is {said_by!r}, which is none of {', '.join(_ROLES_OF_SHAREGPT)}"
        )
    return {"role": _ROLES_OF_SHAREGPT[said_by], "content": turn.get("value")}


def _joined(parts: list[Turn], what: str) -> str:
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise TypeError(
                f"{what}: 'content' has a part of type {part.get('type')!r}; only parts of type "
                "'text', with a text, are read"
            )
    return "".join(part["text"] for part in parts)
