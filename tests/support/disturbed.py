"""Runs that meet with something at a chosen moment: the process itself brings it about.

A signal that a test sends from outside comes when the machine happens to be that far; these come
after exactly so many steps of a round.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfed.observability.console import Console
from tests.support import runs


@dataclass(frozen=True)
class Moment:
    """When something happens, and in which process."""

    process: int
    round_number: int
    """1-based, as in the metrics."""
    step: int
    """Steps that the process has made of the round; of the first group of clients, where there
    are several."""


def at(moment: Moment, act: Callable[[], None]) -> None:
    """Do something once, at a moment of this process's run."""
    if os.environ["RANK"] != str(moment.process):
        return
    begin_round, step = Console.begin_round, Console.step
    current = 0

    def begin(self: Console, round_index: int) -> None:
        nonlocal current
        current = round_index + 1
        begin_round(self, round_index)

    def after_step(self: Console, done: int, *facts: Any) -> None:
        step(self, done, *facts)
        if (current, done) == (moment.round_number, moment.step):
            Console.begin_round, Console.step = begin_round, step  # type: ignore[method-assign]
            act()

    Console.begin_round, Console.step = begin, after_step  # type: ignore[method-assign]


def train_with_signal(settings: dict[str, Any], moment: Moment, number: signal.Signals) -> None:
    """Train; one process gets a signal."""
    at(moment, lambda: os.kill(os.getpid(), number))
    runs.train_settings(settings)


def as_a_run_of_its_own(environment: Mapping[str, str] | None = None) -> int:
    """Make this process the only one of a run; returns the number that it had."""
    number = int(os.environ["RANK"])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(environment or {})
    return number
