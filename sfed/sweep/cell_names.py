"""What the runs of a sweep are called: readable, unique, safe as folders: sfed-r4-N2-seed0."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Choice = Mapping[str, Any]
"""Values of some varied keys."""
_UNSAFE = r"[^A-Za-z0-9._-]+"
_LONGEST_VALUE = 24
_LONGEST_NAME = 120
_SHORT = {"lora.rank": "r", "federated.num_clients": "N", "federated.method": ""}


def name_cells(choices: Sequence[Choice], keys: Sequence[str]) -> list[str]:
    """Name each cell by the values of its varied keys: readable, unique, safe as a folder.

    A name depends on the cell's own values and on which keys vary, not on the other values: a
    grid that grows keeps the folders it has.
    """
    names = [_name(choice, keys) for choice in choices]
    folded = Counter(name.lower() for name in names)  # some file systems do not tell r from R
    return [
        f"{name}-{_digest(choice)}" if folded[name.lower()] > 1 else name
        for name, choice in zip(names, choices, strict=True)
    ]


def _name(choice: Choice, keys: Sequence[str]) -> str:
    parts = [_part(key, choice[key], keys) for key in keys if key in choice]
    name = "-".join(parts).lstrip("._-") or "cell"
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{_digest(choice)}"


def _part(key: str, value: Any, keys: Sequence[str]) -> str:
    word, number = _slug(value), isinstance(value, int | float) and not isinstance(value, bool)
    label = re.sub(_UNSAFE, "_", label_of(key, keys))
    return f"{label}{'' if number or not label else '-'}{word}"


def label_of(key: str, keys: Sequence[str]) -> str:
    """A short word for a varied key: r, N, seed, or its last part where that is unambiguous."""
    leaf = key.rpartition(".")[2]
    alone = sum(other.rpartition(".")[2] == leaf for other in keys) == 1
    return _SHORT.get(key, leaf if alone else key)


def _slug(value: Any) -> str:
    """A value as letters, digits, dot, dash and underscore; with a digest where that loses some."""
    text = _text(value)
    slug = re.sub(_UNSAFE, "_", text)[:_LONGEST_VALUE]
    return slug if slug == text else f"{slug}-{_digest(value)}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "_".join(map(_text, value)) or "none"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True)


def _digest(value: Any) -> str:
    text = json.dumps(value, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]
