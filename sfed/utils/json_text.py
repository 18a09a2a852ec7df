"""JSON that others may have written, and values that are to be written as JSON.

What is read is bounded in size and depth, with one kind of error: Python's own reader runs out of
its stack on deep nesting, and what it lets through would do so later, in whoever walks the value.
"""

from __future__ import annotations

import enum
import errno
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

MOST_DEPTH = 100
"""Lists and objects within each other; nothing of ours or of a data set comes near it."""
MOST_BYTES = 2**30
"""Of a file that is read as one value: the partition of a hundred million examples fits."""
_MOST_DIGITS = 18
"""No count of ours is longer."""

Hook = Callable[[list[tuple[str, Any]]], Any]


def parse(text: str, hook: Hook | None = None, *, bound_numbers: bool = False) -> Any:
    """Read one JSON value.

    Args:
        text: of the value.
        hook: makes an object of its keys and values; see ``json.loads``.
        bound_numbers: read a whole number of more than 18 digits as a float, since as an integer
            it would overflow where it meets one.

    Raises:
        ValueError: where it is no JSON, or nested more deeply than ``MOST_DEPTH``.
    """
    parse_int = _int if bound_numbers else None
    try:
        value = json.loads(text, object_pairs_hook=hook, parse_int=parse_int)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    if text.count("[") + text.count("{") > MOST_DEPTH and _is_deep(value):
        raise ValueError(_too_deep())
    return value


def read(path: Path) -> Any:
    """Read a file that holds one JSON value; an empty one is None, as a lost power leaves it.

    Raises:
        OSError: where it cannot be read, or is no file (a pipe would be waited for for ever).
        ValueError: where it is not UTF-8, no JSON, too large or too deep.
    """
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise ValueError(f"the file is larger than {MOST_BYTES} bytes")
        text = file.read().decode()
    return parse(text) if text else None


def open_file(path: Path) -> BinaryIO:
    """Open a file for its bytes.

    Raises:
        OSError: where it is none, such as a pipe or a device, or cannot be read.
    """
    kind = path.stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return path.open("rb")


def plain_json(key: str, value: Any) -> Any:
    """Return a value of a configuration as JSON has it; sets become sorted lists.

    Args:
        key: for the error.
        value: null, bool, number, text, list, tuple, set or mapping, also within each other.

    Raises:
        TypeError: where it is anything else, whose printed form no reader could take back.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [plain_json(key, item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain_json(key, item) for item in value)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain_json(f"{key}.{name}", item) for name, item in value.items()}
    raise TypeError(f"{key} = {value!r} of an adapter's configuration has no form in JSON")


def _too_deep() -> str:
    return f"lists and objects are nested more than {MOST_DEPTH} deep"


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return False
    return any(isinstance(one, dict | list) for one in level)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)
