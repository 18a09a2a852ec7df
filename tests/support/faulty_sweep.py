"""``python -m tests.support.faulty_sweep``: the sweep; SFED_FAULT says what its children meet.

``CELL:RANK=FAULT,...`` with the faults kill (the system ends the process), hang (it waits for ever
and ignores SIGTERM), raise, and stop (the sweep's process of this number gets SIGTERM in round 2,
and the child goes on once it has been asked to stop). Children import this file anew, under another
name.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from sfed.sweep import __main__ as sweep
from sfed.utils import command

_OWN_SWEEP = "SFED_OWN_SWEEP"
"""The process of the sweep that a child belongs to."""


def _meet_with(fault: str | None) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1e6)
    if fault == "raise":
        raise RuntimeError("a fault in the middle")
    if fault == "stop":
        disturbed.at(disturbed.Moment(int(os.environ["RANK"]), 2, 1), _stop_the_sweep)


def _stop_the_sweep(_run: Any, stop: Any) -> None:
    os.kill(int(os.environ[_OWN_SWEEP]), signal.SIGTERM)
    wait_until(lambda: stop.came_here)


if __name__ == "__mp_main__":
    from sfed.federated import rounds
    from tests.support import disturbed
    from tests.support.deadlines import wait_until

    _FAULTS = dict(pair.split("=") for pair in os.environ["SFED_FAULT"].split(","))
    _train = rounds.train

    def _train_with_fault(run: Any, *arguments: Any) -> bool:
        _meet_with(_FAULTS.get(f"{run.config.run_name}:{run.world.rank}"))
        return _train(run, *arguments)

    rounds.train = _train_with_fault

if __name__ == "__main__":
    os.environ[_OWN_SWEEP] = str(os.getpid())
    command.run_command(sweep.main)
