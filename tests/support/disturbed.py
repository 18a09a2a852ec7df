"""Runs that meet with something at a chosen moment: the process itself brings it about.

A signal that a test sends from outside comes when the machine happens to be that far; these come
after exactly so many steps of a round.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfed.clients.round_stats import RoundStats
from sfed.distributed.shutdown import StopRequest
from sfed.federated import local
from sfed.federated.context import RoundPlan, Run
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


def at(moment: Moment, act: Callable[[Run, StopRequest], None]) -> None:
    """Do something once, at a moment of this process's run: ``act(run, stop)``."""
    if os.environ["RANK"] != str(moment.process):
        return
    train, has_come = local.train, False

    def train_until(
        run: Run, plan: RoundPlan, stats: RoundStats, stop: StopRequest, on_step: local.OnStep
    ) -> None:
        def after_step(done: int, *facts: Any) -> None:
            nonlocal has_come
            on_step(done, *facts)
            now = (plan.finished_rounds, done)
            if not has_come and now == (moment.round_number, moment.step):
                has_come = True
                act(run, stop)

        train(run, plan, stats, stop, after_step)

    local.train = train_until


def train_with_signal(settings: dict[str, Any], moment: Moment, number: signal.Signals) -> None:
    """Train; one process gets a signal."""
    at(moment, lambda _run, _stop: os.kill(os.getpid(), number))
    runs.train_settings(settings)


def as_a_run_of_its_own() -> int:
    """Make this process the only one of a run; returns the number that it had."""
    number = int(os.environ["RANK"])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return number
