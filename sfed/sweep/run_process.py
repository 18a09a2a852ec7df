"""One run in a process of its own, and how it ended.

The process comes from a fork server that has imported the trainer already, so a start takes a
fraction of a second; and whatever becomes of it, an exception, an end by the system for want of
memory, leftovers of a library, ends with it.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection

from sfed import train
from sfed.config.schema import Config
from sfed.utils.command import EXIT_MISTAKE, leave, print_masked
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask

_LONGEST_MESSAGE = 2000
_SECONDS_BETWEEN_REQUESTS = 1.0


@dataclass(frozen=True)
class End:
    """How a child ended."""

    process: int
    code: int
    """Exit code; negative = the signal that ended it."""
    message: str = ""
    is_consequence: bool = False
    """Whether it ended because another process had."""

    @property
    def reason(self) -> str:
        """In plain words."""
        if self.code >= 0:
            return f"exit code {self.code}{': ' if self.message else ''}{self.message}"
        name = signal.Signals(-self.code).name
        hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"process {self.process} was ended by {name}{hint}"


def main_reason(ends: Sequence[End]) -> str | None:
    """Why a run failed; None where no child did."""
    failed = [end for end in ends if end.code]
    return failed[0].reason if failed else None


def prepare() -> None:
    """Start the fork server, which imports the trainer meanwhile.

    It lives on when a launcher sends SIGTERM to all, or a terminal Ctrl-C, because it has to tell
    how its children ended; it inherits this from here.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    mp.set_forkserver_preload(["sfed.sweep.preload"])
    forkserver.ensure_running()
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


class RunProcess:
    """A process that runs one configuration."""

    def __init__(self, config: Config, environment: dict[str, str]) -> None:
        context = mp.get_context("forkserver")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_enter, args=(config, environment, sender))
        self._process.start()
        sender.close()
        self._asked = -math.inf
        self._is_ended = False

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def ask_to_end(self) -> None:
        """Send SIGTERM: training stops before the next step with everything on disk.

        Call it until the child has ended: at its very start a child does not listen yet.
        """
        now = time.monotonic()
        if now > self._asked + _SECONDS_BETWEEN_REQUESTS:
            self._asked = now
            self._process.terminate()

    def end(self, seconds: float) -> None:
        """End the child if it lives, by SIGTERM and, if that does not help, SIGKILL."""
        if self.is_alive():
            self._is_ended = True
            self._process.terminate()
            self._process.join(seconds)
            self._process.kill()
            self._process.join()

    def tell_end(self, process: int) -> End:
        """How it ended; ``process`` is its number."""
        message, is_consequence = "", False
        with suppress(EOFError):  # it ended without a word
            if self._receiver.poll():
                message, is_consequence = self._receiver.recv()
        code = self._process.exitcode
        return End(process, 1 if code is None else code, message, is_consequence or self._is_ended)


def _enter(config: Config, environment: dict[str, str], sender: Connection) -> None:
    """What a child does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C comes as the parent's SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow_parent, daemon=True).start()
    os.environ.update(environment)
    try:
        train.run(config, one_of_many=True)  # its imports are made in the fork server
    except UserError as mistake:
        sender.send((mask(str(mistake))[:_LONGEST_MESSAGE], False))
        leave(str(mistake), EXIT_MISTAKE)
    except SystemExit as end:
        # A session that has lost another process ends with a text, any other failure with a code.
        text = mask(end.code if isinstance(end.code, str) else str(end.__context__ or ""))
        sender.send((text[:_LONGEST_MESSAGE], isinstance(end.code, str)))
        raise
    except Exception as error:
        sender.send((mask(f"{type(error).__name__}: {error}")[:_LONGEST_MESSAGE], False))
        print_masked(type(error), error, error.__traceback__)
        raise SystemExit(1) from error


def _follow_parent() -> None:
    """Stop, as after SIGTERM, when the sweep's process is gone."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
