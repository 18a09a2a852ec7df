"""``python -m tests.support.faulty_sweep``: the sweep; SFED_FAULT says what its children meet.

``CELL:RANK=FAULT,...`` with the faults kill (the system ends the process), hang (it waits for ever
and ignores SIGTERM) and raise. Children import this file anew, under another name.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from sfed.sweep import __main__ as sweep
from sfed.utils import command


def _meet_with(fault: str | None) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if fault == "raise":
        raise RuntimeError("a fault in the middle")


if __name__ == "__mp_main__":
    from sfed.federated import rounds

    _FAULTS = dict(pair.split("=") for pair in os.environ["SFED_FAULT"].split(","))
    _train = rounds.train

    def _train_with_fault(run: Any, *arguments: Any) -> bool:
        _meet_with(_FAULTS.get(f"{run.config.run_name}:{run.world.rank}"))
        return _train(run, *arguments)

    rounds.train = _train_with_fault

if __name__ == "__main__":
    command.run_command(sweep.main)
