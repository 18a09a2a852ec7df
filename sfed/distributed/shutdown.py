"""How a process ends: as asked by SIGTERM, or because the run cannot continue.

SIGTERM is an orderly end, wherever a process is. So is SIGUSR1, with which Slurm tells that the
time of a job is nearly over, and a first Ctrl-C; a second one ends a process at once. A process
whose run cannot continue tells the others, and says what they know.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist

from sfed.distributed.sync import EndedProcessError
from sfed.distributed.world import World
from sfed.utils.errors import MissingProcessError
from sfed.utils.text import one_line

_SECONDS_OF_ONE_INTERRUPT = 1.0
"""A Ctrl-C comes from the terminal, and soon afterwards once more from torchrun."""
_HEARD = b"\nsfed: stopping with everything on disk; Ctrl-C again ends at once\n"


class StoppedEarlyError(SystemExit):
    """This process was asked to stop before there was anything to write."""


class StopRequest:
    """SIGTERM on any process stops all of them, so that none waits forever.

    Before training there is nothing to write: the process says so to the others and ends. From
    then on, without sharding, processes run freely and each stops before its next step as soon as
    it hears of it; the end of the round brings them together. Under ZeRO-3 every pass gathers
    weights from all processes, so nobody can be two passes ahead, and all count alike: the process
    that is asked announces "two passes from here", and everybody looks before each pass.
    """

    _KEY = "stop"

    def __init__(self, world: World) -> None:
        self._world = world
        self._in_step = False
        self._trains = False
        self._asked = False
        self._passes = 0
        self._is_due = False
        self._interrupted_at: float | None = None
        world.watch.on_pause = self._announce

    def listen(self) -> None:
        """Install handlers that make SIGTERM, SIGUSR1 and Ctrl-C requests to stop.

        Only commands call it: signal handlers belong to the process, not to a library.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGINT, self._on_interrupt)
        self._world.watch.hear_signals()

    def training_begins(self, *, in_step: bool) -> None:
        """From now on there is something to write; ``in_step`` = all count passes alike."""
        self._trains, self._in_step = True, in_step

    @property
    def came_here(self) -> bool:
        """Whether the request came to this process, and not to another one."""
        return self._asked

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        if self._trains:
            self._asked = True  # nothing else: the handler may interrupt any line
            return
        self._world.watch.tell_end("it was asked to stop before training began")
        raise StoppedEarlyError(0)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self._world.is_main:
                os.write(2, _HEARD)  # a buffered stream may be in the middle of a line
            self._on_signal(number, frame)
        elif now - self._interrupted_at > _SECONDS_OF_ONE_INTERRUPT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def _announce(self) -> None:
        if self._asked:
            self._world.watch.is_asked_to_stop = True
            self._world.side_store.compare_set(self._KEY, "", str(self._passes + 2))

    def due(self, place: str) -> bool:
        """Whether to stop before the coming pass or step; asked before each. Once due, always.

        Args:
            place: where the loop is now, for whoever waits for it.

        Raises:
            EndedProcessError: where another process has ended: nothing of this round can be kept.
        """
        self._passes += 1
        watch, store = self._world.watch, self._world.store
        watch.at(place)
        if watch.has_somebody_ended:
            raise EndedProcessError(f"{place}: another process has ended")
        if self._asked and not watch.is_asked_to_stop:
            self._announce()
        if self._in_step:
            told = store.check([self._KEY])
            self._is_due = told and self._passes >= int(store.get(self._KEY))
        else:
            self._is_due = watch.is_asked_to_stop
        return self._is_due


@contextmanager
def ending(world: World) -> Iterator[None]:
    """Within it, a process that fails tells the others; one that lost another finds out which.

    Raises:
        MissingProcessError: where another process is the cause, with a diagnosis of which one.
    """
    try:
        yield
    except MissingProcessError as failure:
        raise _diagnosed(world, str(failure)) from failure
    except RuntimeError as error:
        if not is_lost_contact(error):
            _tell(world, error)
            raise
        reason = f"lost contact with another process ({one_line(error)})"
        raise _diagnosed(world, reason) from error
    except StoppedEarlyError:
        raise  # it has told the others
    except BaseException as error:
        _tell(world, error)
        raise


def _diagnosed(world: World, reason: str) -> MissingProcessError:
    # Process 0 may be the one that is missing: everybody who waited says so.
    return MissingProcessError(f"process {world.rank}: {world.watch.give_up(reason)}")


def _tell(world: World, error: BaseException) -> None:
    world.watch.tell_end(f"{type(error).__name__}: {one_line(error)}")


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that a collective failed because another process is not there."""
    marks = ("gloo", "Connection reset", "Connection closed", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(mark in str(error) for mark in marks)
