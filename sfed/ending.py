"""How a process ends whose run cannot go on: it tells the others, and says what they know."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sfed.distributed import World, is_lost_contact
from sfed.joining import MissingProcessError
from sfed.stopping import StoppedEarlyError

_LONGEST_REASON = 300


@contextmanager
def ending(world: World) -> Iterator[None]:
    """Within it, a process that fails lets the others know; one that has lost another says whom.

    Raises:
        SystemExit: with a text, where another process is the cause.
    """
    try:
        yield
    except MissingProcessError as failure:
        _follow(world, str(failure))
    except RuntimeError as error:
        if not is_lost_contact(error):
            _tell(world, error)
            raise
        _follow(world, f"lost contact with another process ({_short(error)})")
    except StoppedEarlyError:
        raise  # it has told the others
    except BaseException as error:
        _tell(world, error)
        raise


def _follow(world: World, reason: str) -> None:
    verdict = world.watch.give_up(reason)
    # Process 0 may be the one that is missing: everybody who waited says so.
    sys.exit(f"sfed: process {world.rank}: {verdict}")


def _tell(world: World, error: BaseException) -> None:
    world.watch.tell_end(f"{type(error).__name__}: {_short(error)}")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:_LONGEST_REASON]
