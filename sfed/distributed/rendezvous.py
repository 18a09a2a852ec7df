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
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future

import torch.distributed as dist

from sfed.distributed.store import Store
from sfed.utils import launcher
from sfed.utils.errors import MissingProcessError, UserError
from sfed.utils.text import one_line, shown

_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_BETWEEN_PAUSES = 0.5


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
        """Name the processes that are missing."""
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
        """Name the processes that are missing."""
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
        MissingProcessError: naming the processes that did not come before the deadline, or the
            launcher or the store that are gone.
        UserError: where another program uses the port.
    """
    environment = os.environ
    if size == 1:
        return dist.HashStore()
    agent_serves = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, is_master = _master_address(size), process == 0 and not agent_serves

    def look_and_pause() -> None:
        _require_torchrun()
        pause()

    store = _connect(address, size, deadline_seconds, look_and_pause, is_master=is_master)
    of_group = dist.PrefixStore(f"sfed/{environment.get('SFED_GROUP', 'run')}", store)
    try:
        # torchrun keeps its store over a restart, with all that the processes said that died.
        attempt = agree_on_attempt(of_group, process, size, deadline_seconds, look_and_pause)
    except MissingProcessError:
        raise
    except RuntimeError as error:
        _require_torchrun()
        raise MissingProcessError(
            f"joining: the store at {address[0]}:{address[1]} (MASTER_ADDR, MASTER_PORT) is lost "
            f"({one_line(error)}): torchrun, or the process that keeps it, has ended; start the "
            "job again"
        ) from None
    return dist.PrefixStore(attempt, of_group)


def _require_torchrun() -> None:
    """Refuse to wait for others where the launcher, which would bring them here, is gone."""
    if (parent := launcher.lost_torchrun()) is not None:
        raise MissingProcessError(
            f"joining: torchrun (process {parent}), which started this process, has ended without "
            "it; start the job again"
        )


def _master_address(size: int) -> tuple[str, int]:
    """Host and port where process 0 serves the store.

    Raises:
        UserError: where the launcher did not say them, or the port is none.
    """
    host, port = (os.environ.get(name, "").strip() for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port:
        missing = " and ".join(
            name for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)) if not value
        )
        raise UserError(
            f"WORLD_SIZE={size} and no {missing}: the processes cannot find each other; start them "
            "with torchrun, or set MASTER_ADDR and MASTER_PORT on all of them"
        )
    if not (port.isascii() and port.isdecimal()) or not 0 < int(port[:6]) < 2**16:
        raise UserError(f"MASTER_PORT={shown(port)} is no port from 1 to 65535")
    return host, int(port)


def _connect(
    address: tuple[str, int],
    size: int,
    deadline_seconds: float,
    pause: Callable[[], None],
    *,
    is_master: bool,
) -> dist.Store:
    """Serve the store or connect to it.

    A thread does it: where another program holds the port and says nothing, the call stays for
    longer than the deadline.
    """
    host, port = address
    opened: Future[dist.Store] = Future()

    def connect() -> None:
        try:
            opened.set_result(
                dist.TCPStore(
                    host,
                    port,
                    size,
                    is_master=is_master,
                    timeout=datetime.timedelta(seconds=deadline_seconds),
                    wait_for_workers=False,  # it cannot say who is missing
                )
            )
        except RuntimeError as error:
            opened.set_exception(error)

    threading.Thread(target=connect, name="sfed store", daemon=True).start()
    end = time.monotonic() + deadline_seconds
    while time.monotonic() < end:
        if futures.wait([opened], _SECONDS_BETWEEN_PAUSES).done:
            return _store_of(opened, address)
        pause()
    raise MissingProcessError(
        f"joining: {host}:{port} (MASTER_ADDR, MASTER_PORT) did not answer as process 0 within "
        f"{deadline_seconds:g} s (federated.deadline_seconds); is process 0 there, or does another "
        "program use this port? set MASTER_PORT to a free one on all processes"
    )


def _store_of(opened: Future[dist.Store], address: tuple[str, int]) -> dist.Store:
    try:
        return opened.result()
    except RuntimeError as error:
        reason = one_line(error)
        if "EADDRINUSE" in reason or "already in use" in reason:
            raise UserError(
                f"MASTER_PORT = {address[1]}: another program on this machine uses the port; set "
                "MASTER_PORT to a free one on all processes"
            ) from None
        raise MissingProcessError(
            f"joining: {address[0]}:{address[1]} (MASTER_ADDR, MASTER_PORT): {reason}"
        ) from None


def prefixed(store: dist.Store, prefix: str) -> dist.Store:
    """Return the same store, in which all keys begin with a prefix."""
    return dist.PrefixStore(prefix, store)
