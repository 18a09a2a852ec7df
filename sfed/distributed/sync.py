"""Where processes meet: small facts go as JSON through the launcher's key-value store.

Every wait has a deadline, names who is missing, and ends early where somebody has ended.
"""

from __future__ import annotations

import datetime
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from sfed.distributed.world import SECONDS_OF_SLACK, World
from sfed.utils.errors import MissingProcessError, UserError, kind_of, made_of

_SECONDS_BETWEEN_PAUSES = 1.0
_SECONDS_TO_PART = 30.0


class EndedProcessError(MissingProcessError):
    """Another process has ended while this one waited."""


def gather_json(world: World, name: str, value: Any) -> list[Any]:
    """Return what every process passed, in the order of processes. Collective.

    Raises:
        MissingProcessError: naming the processes that did not come before the deadline.
    """
    world.meetings[name] += 1
    prefix = f"{name}#{world.meetings[name]}"
    world.store.set(f"{prefix}/{world.rank}", json.dumps(value))
    keys = {peer: f"{prefix}/{peer}" for peer in range(world.size)}
    _wait(world, name, keys)
    return [json.loads(said) for said in world.store.multi_get(list(keys.values()))]


def _wait(world: World, name: str, keys: Mapping[int, str]) -> None:
    """Wait until all keys are there; each is set by the process of its number.

    A thread does the waiting, so that this one can renew the heartbeat and answer signals.
    """
    begin, has_warned = time.monotonic(), False
    with world.watch.waiting(name):
        come = keys_come(world, list(keys.values()))
        while not futures.wait([come], _SECONDS_BETWEEN_PAUSES).done:
            world.watch.pause()
            waited = time.monotonic() - begin
            if world.watch.has_somebody_ended and _missing(world, keys):
                raise EndedProcessError(f"{name}: another process has ended")
            if waited > world.deadline_seconds:
                _raise_missing(world, name, keys)
            if waited > world.deadline_seconds / 2 and not has_warned:
                has_warned = True
                _warn(world, name, _missing(world, keys), waited)
        come.result()


def _raise_missing(world: World, name: str, keys: Mapping[int, str]) -> None:
    missing = _missing(world, keys)
    if missing:
        raise MissingProcessError(
            f"{name}: process {', '.join(map(str, missing))} of {world.size} did not come within "
            f"{world.deadline_seconds:g} s (federated.deadline_seconds)"
        )


def _missing(world: World, keys: Mapping[int, str]) -> list[int]:
    return [peer for peer, key in keys.items() if not world.side_store.check([key])]


def _warn(world: World, name: str, missing: list[int], seconds: float) -> None:
    """The first of those who wait says for whom, while there is still time to look."""
    if next((peer for peer in range(world.size) if peer not in missing), -1) == world.rank:
        logging.getLogger(__name__).warning(
            "%s: waiting since %.0f s; %s",
            name,
            seconds,
            "; ".join(world.watch.whereabouts(peer) for peer in missing),
        )


def barrier(world: World, name: str) -> None:
    """Wait until every process is here. Collective.

    Raises:
        MissingProcessError: naming the processes that did not come before the deadline.
    """
    gather_json(world, name, None)


def leave_store_last(world: World) -> None:
    """Wait on process 0, which may serve the store, until all others have left. Collective.

    Otherwise a process that still reads what was said last would lose the store. From here on
    nobody misses anybody: the watchdog is off.
    """
    world.watch.leave()
    world.store.set(f"parted/{world.rank}", "")
    if world.is_main:
        keys = [f"parted/{peer}" for peer in range(world.size)]
        # Who ended badly meanwhile has nothing to read any more.
        futures.wait([keys_come(world, keys)], _SECONDS_TO_PART)


@contextmanager
def raise_everywhere(world: World, name: str) -> Iterator[None]:
    """Make a user's mistake met by one process the mistake of all of them. Collective.

    The body may be collective too: processes that wait in it for the one that failed are told.

    Raises:
        UserError: on every process, where the body raised it on any; of the subclass that it was.
    """
    mistake: UserError | None = None
    try:
        yield
    except UserError as error:
        mistake = error
        world.watch.tell_mistake(str(error))
    told = None if mistake is None else [str(mistake), kind_of(mistake)]
    try:
        mistakes = [other for other in gather_json(world, name, told) if other is not None]
    except MissingProcessError:
        if mistake is not None:  # the others wait for this process, and not the other way about
            raise mistake from None
        raise
    if mistakes:
        _wait_for_readers(world, name)
        message = "\n".join(sorted({text for text, _ in mistakes}))
        raise made_of({kind for _, kind in mistakes}, message)


def _wait_for_readers(world: World, name: str) -> None:
    """Wait on process 0, which may serve the store, until all have read what the meeting said.

    It is about to end: a process that is slow to read would lose the store, and with it the reason.
    """
    prefix = f"{name}#{world.meetings[name]}/read"
    with suppress(RuntimeError):  # the store has gone: this process has read what it needs
        world.store.set(f"{prefix}/{world.rank}", "")
        if world.is_main:
            keys = [f"{prefix}/{peer}" for peer in range(world.size)]
            futures.wait([keys_come(world, keys)], min(_SECONDS_TO_PART, world.deadline_seconds))


@contextmanager
def first_of_node_first(world: World, name: str) -> Iterator[None]:
    """Run the body in the first process of each node before the others, to fill a cache once.

    Raises:
        MissingProcessError: where it does not finish before the deadline.
    """
    world.meetings[name] += 1
    first = world.rank - world.local_rank
    key = f"{name}#{world.meetings[name]}/node-of-{first}"
    if world.local_rank != 0:
        _wait(world, name, {first: key})
    try:
        yield
    finally:
        if world.local_rank == 0:
            world.store.set(key, "done")


def keys_come(world: World, keys: Sequence[str]) -> Future[None]:
    """Return what is done once all keys of the store are there; it fails where the store has gone.

    A thread waits for them: the call never comes back when the network is gone, and whoever makes
    it does not answer signals.
    """
    come: Future[None] = Future()

    def wait() -> None:
        try:
            seconds = world.deadline_seconds + SECONDS_OF_SLACK
            world.store.wait(list(keys), datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            come.set_exception(error)
        else:
            come.set_result(None)

    if world.store.check(list(keys)):
        come.set_result(None)
    else:
        threading.Thread(target=wait, daemon=True).start()
    return come
