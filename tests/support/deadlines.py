"""How long a test waits before it takes something for hung.

Deadlines are for hangs only. No test depends on how fast the machine is: what takes seconds gets
minutes, and SFED_TEST_DEADLINE_SCALE multiplies every deadline for machines slower still.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

VARIABLE = "SFED_TEST_DEADLINE_SCALE"


def scaled(seconds: float) -> float:
    """A deadline of this many seconds, on this machine."""
    return seconds * float(os.environ.get(VARIABLE, "1"))


HANG_SECONDS = scaled(600.0)
"""After which a process, a command or an event that a test waits for will never come."""
RUN_SECONDS = scaled(120.0)
"""``federated.deadline_seconds`` of runs in which nothing hangs."""
GRACE_SECONDS = scaled(60.0)
"""For the other processes to end, from the end of the first; then they are killed."""


def wait_until(is_so: Callable[[], bool], keep_waiting: Callable[[], None] = lambda: None) -> None:
    """Wait until something is so.

    Args:
        is_so: asked many times a second.
        keep_waiting: raises where that has become pointless.

    Raises:
        TimeoutError: where it is never so.
    """
    end = time.monotonic() + HANG_SECONDS
    while not is_so():
        keep_waiting()
        if time.monotonic() > end:
            raise TimeoutError(f"{is_so.__qualname__}: not so after {HANG_SECONDS:g} s")
        time.sleep(0.01)
