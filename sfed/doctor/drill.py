"""A job that one process breaks: ``python -m sfed.doctor.drill error|kill``.

Every process makes the same steps, each with one collective; at one of them the last process raises
an error or kills itself. The others must end soon and say which process is the cause. ``faults``
starts one such process beside each process of the doctor's own job and watches them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import torch

from sfed.distributed import shutdown, sync
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.utils import command
from sfed.utils.errors import MissingProcessError

KINDS = ("error", "kill")
DEADLINE_SECONDS = 120.0
NOW = "the fault comes now"
"""Line on stdout of every process just before the step of the fault."""
INJECTED = "injected by sfed doctor"
_STEP_OF_FAULT = 3
_NUMBERS = 2**16


def main(arguments: Sequence[str]) -> None:
    """Make steps until the fault.

    Raises:
        SystemExit: with the diagnosis, where another process is the cause.
    """
    (kind,) = arguments
    world = distributed.start(DEADLINE_SECONDS)
    try:
        with shutdown.ending(world):
            _make_steps(world, kind)
            sync.leave_store_last(world)
    except MissingProcessError as failure:
        sys.exit(str(failure))
    except BaseException:
        distributed.abandon(world)
        raise
    distributed.stop(world)


def _make_steps(world: World, kind: str) -> None:
    numbers = torch.ones(_NUMBERS, device=world.device)
    for step in range(_STEP_OF_FAULT + 1):
        world.watch.at(f"drill, step {step}")
        if step == _STEP_OF_FAULT:
            sync.barrier(world, "the step before the fault")
            sys.stdout.write(f"{NOW}\n")
            sys.stdout.flush()
            if world.rank == world.size - 1:
                _break(kind)
        distributed.all_reduce_sum(numbers)
        float(numbers.sum())  # waits for the device


def _break(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError(INJECTED)


if __name__ == "__main__":
    command.run_command(main)
