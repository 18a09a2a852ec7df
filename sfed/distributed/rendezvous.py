"""How the processes of one attempt find each other in a store that outlives attempts.

A launcher that restarts processes keeps its store, with all that the dead ones said in it; and its
restart counts differ between nodes. So nothing in the store is believed because it is there. Every
process draws a name of its own at its start. Process 0 draws the attempt's, and answers under each
name that it finds; whoever is alive confirms the answer. What dead processes left behind never
confirms anything, and what a dead process 0 answered is overwritten by the living one.
"""

from __future__ import annotations

import datetime
import os
import secrets
import time
from collections.abc import Callable

import torch.distributed as dist

from sfed.distributed.store import Store
from sfed.utils.errors import MissingProcessError

_SECONDS_BETWEEN_LOOKS = 0.02


def agree_on_attempt(
    store: Store,
    process: int,
    size: int,
    deadline_seconds: float,
    pause: Callable[[], None] = lambda: None,
) -> str:
    """Return a name that the living processes of this attempt share, and no others. Collective.

    Args:
        store: shared by all processes, and by attempts before this one.
        process: the number of this one.
        size: number of processes.
        deadline_seconds: longest wait for the others.
        pause: called between looks.

    Raises:
        MissingProcessError: naming the processes that did not come before the deadline.
    """
    end = time.monotonic() + deadline_seconds
    side = _Leader(store, size) if process == 0 else _Member(store, process, size)
    while not side.look():
        if time.monotonic() > end:
            raise MissingProcessError(
                f"joining: {side.missing()} of {size} did not come within {deadline_seconds:g} s "
                "(federated.deadline_seconds)"
            )
        pause()
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return side.attempt


class _Leader:
    """Process 0: answers whoever says hello, until everybody has confirmed."""

    def __init__(self, store: Store, size: int) -> None:
        self._store, self._size = store, size
        self.attempt = secrets.token_hex(4)
        self._present: dict[int, str] = {}
        self._answered: set[str] = set()

    def look(self) -> bool:
        """Whether everybody is here."""
        for peer in range(1, self._size):
            name = _hello(self._store, peer, self._size)
            if name is None:
                continue
            if name not in self._answered:
                self._answered.add(name)
                self._store.set(f"welcome/{name}", self.attempt)
            if self._store.check([f"here/{self.attempt}/{name}"]):
                self._present[peer] = name  # a process that started again has another name
            else:
                self._present.pop(peer, None)
        if len(self._present) < self._size - 1:
            return False
        self._store.set(f"begin/{self.attempt}", "")
        return True

    def missing(self) -> str:
        """Who is not here."""
        others = range(1, self._size)
        return "process " + ", ".join(str(peer) for peer in others if peer not in self._present)


class _Member:
    """Any other process: says hello and confirms each answer, until its host begins."""

    def __init__(self, store: Store, process: int, size: int) -> None:
        self._store, self._name = store, secrets.token_hex(8)
        self.attempt = ""
        store.set(f"hello/{process}", f"{self._name}/{size}")

    def look(self) -> bool:
        """Whether the host has begun."""
        if not self._store.check([f"welcome/{self._name}"]):
            return False
        answer = self._store.get(f"welcome/{self._name}").decode()
        if answer != self.attempt:  # the host may have died meanwhile, and another has answered
            self.attempt = answer
            self._store.set(f"here/{self.attempt}/{self._name}", "")
        return self._store.check([f"begin/{self.attempt}"])

    def missing(self) -> str:
        """Who is not here."""
        return "a process whom process 0 expects" if self.attempt else "process 0"


def _hello(store: Store, peer: int, size: int) -> str | None:
    """The name of a process, where one of a world of this size has said hello."""
    if not store.check([f"hello/{peer}"]):
        return None
    name, _, of_size = store.get(f"hello/{peer}").decode().partition("/")
    return name if int(of_size) == size else None


def open_store(
    process: int,
    size: int,
    deadline_seconds: float,
    pause: Callable[[], None] = lambda: None,
) -> dist.Store:
    """Open the key-value store of the launcher, with keys of its own for each attempt. Collective.

    Runs that share a store, one after another, each have a name of their own in SFED_GROUP.

    Args:
        process: the number of this one.
        size: number of processes.
        deadline_seconds: longest wait for the others.
        pause: called between looks for them.

    Raises:
        MissingProcessError: naming the processes that did not come before the deadline.
    """
    environment = os.environ
    if size == 1:
        return dist.HashStore()
    agent_serves = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        size,
        is_master=process == 0 and not agent_serves,
        timeout=datetime.timedelta(seconds=deadline_seconds),
        wait_for_workers=False,  # it cannot say who is missing
    )
    of_group = dist.PrefixStore(f"sfed/{environment.get('SFED_GROUP', 'run')}", store)
    # torchrun keeps its store over a restart, with all that the processes said that died.
    attempt = agree_on_attempt(of_group, process, size, deadline_seconds, pause)
    return dist.PrefixStore(attempt, of_group)


def prefixed(store: dist.Store, prefix: str) -> dist.Store:
    """The same store, in which all keys begin with a prefix."""
    return dist.PrefixStore(prefix, store)
