"""Whether another process is still there. Needs no torch.

A process of this machine is looked up in the process table, which is exact and immediate. Of a
process on another machine the messages of its watchdog are counted: none for a while means that it,
its machine or the network is gone.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_SECONDS_OF_SILENCE = 30.0
"""Longer than a process that is alive keeps its watchdog thread from running."""
_SECONDS_OF_SILENCE_WHEN_STOPPED = 10.0
"""Silence that counts where this process was told to stop: its launcher lost a process."""
_PROCESSES = Path("/proc")
_ENDED_STATES = ("Z", "X")  # of a zombie, whose parent has not yet asked for its exit code


@dataclass(frozen=True)
class Identity:
    """Which process this is, and where it can be looked up."""

    pid: int
    host: str
    process_table: str
    """Names the kernel and the namespace in which the pid means this process."""
    started: str
    """When it started, in ticks of its kernel: another process may get the same pid."""

    @staticmethod
    def of_this_process(host: str) -> Identity:
        """The one that another process asks about."""
        return Identity(os.getpid(), host, _process_table(), _started(os.getpid()) or "")

    def as_json(self) -> dict[str, object]:
        """As plain values."""
        return asdict(self)

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None where it cannot be looked up from here."""
        if not self.started or self.process_table != _process_table():
            return None
        return _started(self.pid) != self.started


def _process_table() -> str:
    """Which kernel and which namespace of process numbers; empty where there is none to ask."""
    try:
        boot = (_PROCESSES / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink(_PROCESSES / 'self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started; None where it is not there, or has ended and waits for its parent."""
    try:
        text = (_PROCESSES / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name of the program, in parentheses, may hold anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in _ENDED_STATES else fields[19]


class Silence:
    """How long ago a process on another machine was heard last."""

    def __init__(self) -> None:
        self._count = -1
        self._since = time.monotonic()

    def is_too_long(self, count: int, *, is_told_to_stop: bool) -> bool:
        """Whether the process is taken for gone.

        Args:
            count: of the messages of its watchdog so far.
            is_told_to_stop: whether the process that asks was told to stop.
        """
        now = time.monotonic()
        if count != self._count:
            self._count, self._since = count, now
        limit = _SECONDS_OF_SILENCE_WHEN_STOPPED if is_told_to_stop else _SECONDS_OF_SILENCE
        return now - self._since > limit
