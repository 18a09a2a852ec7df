"""What a pretended GPU has noted, with the places in the code."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parents[3]) + "/"
_PACKAGES = "site-packages/"
_LEFT_OUT = ("tests/support/", "torch/")


@functools.cache
def _short(file: str) -> str:
    """How a file is named in a place; "" = torch, what tests share, and the standard library."""
    if _PACKAGES in file:
        found = file.rpartition(_PACKAGES)[2]
    else:
        found = file.removeprefix(_ROOT) if file.startswith(_ROOT) else ""
    return "" if found.startswith(_LEFT_OUT) else found


def _frames() -> Iterator[tuple[str, str]]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = _short(frame.f_code.co_filename)
        if file:
            yield file, f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back


def place() -> str:
    """The innermost line that belongs neither to torch nor to what tests share."""
    return next((shown for _, shown in _frames()), "?")


def trainer_place() -> str:
    """The same, and where that is another package, the line of this project that led there."""
    inner = ""
    for file, shown in _frames():
        if file.startswith(("sfed/", "tests/")):
            return f"{inner} < {shown}" if inner else shown
        inner = inner or shown
    return inner or "?"


class Findings:
    """Counters of everything that was noted since the start or the last ``reset``."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        """Kernel launches by operation."""
        self.host_waits: Counter[tuple[str, str]] = Counter()
        """Waits of the main thread for the device, by (kind, place)."""
        self.mixes: Counter[str] = Counter()
        """What CUDA or NCCL would refuse: operations on several devices, host tensors in NCCL."""
        self.races: Counter[str] = Counter()
        """Accesses without order, and memory freed while another stream uses it."""
        self.collectives: Counter[tuple[str, str]] = Counter()
        """Collectives by (kind, device)."""

    def reset(self) -> None:
        """Count from here."""
        for counter in vars(self).values():
            counter.clear()

    def as_json(self) -> dict[str, Any]:
        """All counters; keys of two words are joined."""
        return {
            name: {
                key if isinstance(key, str) else " | ".join(key): count
                for key, count in counter.most_common()
            }
            for name, counter in vars(self).items()
        }
