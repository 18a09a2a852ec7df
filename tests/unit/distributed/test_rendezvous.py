"""Processes of one attempt find each other, whatever earlier attempts left in the store."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

import pytest
import torch.distributed as dist

from sfed.distributed import rendezvous
from sfed.distributed.rendezvous import agree_on_attempt
from sfed.distributed.store import LocalStore
from sfed.utils import launcher
from sfed.utils.errors import MissingProcessError, UserError
from tests.support.deadlines import HANG_SECONDS, RUN_SECONDS, wait_until
from tests.support.processes import ends_of


class MemoryStore(LocalStore):
    """A store in memory, as a launcher keeps it over restarts."""

    @property
    def num_here(self) -> int:
        """How many processes have said that they are here."""
        return sum(key.startswith("here/") for key in list(self._values))


class Joining:
    """Processes, in threads, that join."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.found: dict[str, str] = {}
        self._threads: list[threading.Thread] = []

    def begin(self, label: str, process: int, size: int, *, dies: Callable[[], bool]) -> None:
        class DiedError(Exception):
            pass

        def pause() -> None:
            if dies():
                raise DiedError

        def join() -> None:
            try:
                self.found[label] = agree_on_attempt(self.store, process, size, RUN_SECONDS, pause)
            except DiedError:
                self.found[label] = "died"

        self._threads.append(threading.Thread(target=join))
        self._threads[-1].start()

    def wait_for(self, label: str) -> None:
        """Wait until this one has joined or died: a launcher replaces only the dead."""
        wait_until(lambda: label in self.found)

    def end(self) -> dict[str, str]:
        for thread in self._threads:
            thread.join(HANG_SECONDS)
        return self.found


def join_all(store: MemoryStore, size: int) -> str:
    joining = Joining(store)
    for process in reversed(range(size)):
        joining.begin(str(process), process, size, dies=lambda: False)
    names = set(joining.end().values())
    assert len(names) == 1
    return names.pop()


def test_attempts_share_a_store_and_never_a_name():
    store = MemoryStore()
    names = [join_all(store, size) for size in (3, 3, 2, 4)]
    assert len(set(names)) == 4 and "died" not in names


def test_a_process_0_that_died_while_joining_is_forgotten():
    store = MemoryStore()
    joining = Joining(store)
    is_dead = threading.Event()
    joining.begin("old 0", 0, 3, dies=is_dead.is_set)  # waits for process 2, which never comes
    joining.begin("1", 1, 3, dies=lambda: False)
    wait_until(lambda: store.num_here > 0)
    is_dead.set()
    joining.wait_for("old 0")
    joining.begin("new 0", 0, 3, dies=lambda: False)
    joining.begin("2", 2, 3, dies=lambda: False)
    found = joining.end()
    assert found.pop("old 0") == "died"
    assert len(set(found.values())) == 1


def test_a_process_that_died_while_joining_is_forgotten():
    store = MemoryStore()
    joining = Joining(store)
    is_dead = threading.Event()
    joining.begin("0", 0, 3, dies=lambda: False)
    joining.begin("old 1", 1, 3, dies=is_dead.is_set)
    wait_until(lambda: store.num_here > 0)
    is_dead.set()
    joining.wait_for("old 1")
    joining.begin("new 1", 1, 3, dies=lambda: False)
    wait_until(lambda: store.num_here == 2)
    joining.begin("2", 2, 3, dies=lambda: False)
    found = joining.end()
    assert found.pop("old 1") == "died"
    assert len(set(found.values())) == 1


@pytest.mark.parametrize(("process", "words"), [(0, "process 1, 2 of 3"), (2, "process 0 of 3")])
def test_who_does_not_come_is_named(process: int, words: str):
    with pytest.raises(MissingProcessError, match=f"joining: {words} did not come within 0.1 s"):
        agree_on_attempt(MemoryStore(), process, 3, 0.1)


def test_a_port_that_another_program_serves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(UserError, match=f"MASTER_PORT = {port}: another program"):
            rendezvous.open_store(0, 2, 60.0)


def test_a_process_whose_torchrun_is_gone_does_not_wait_for_the_store() -> None:
    [_, end] = ends_of(2, join_as_an_orphan)
    assert end.code == 0, end.said


def join_as_an_orphan() -> None:
    """Process 1 finds itself with another parent than at its start; nobody serves the store."""
    if os.environ["RANK"] == "1":
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        launcher.STARTED = (os.getpid(), os.getppid() + 1)
        words = rf"torchrun \(process {os.getppid() + 1}\), .* has ended without it"
        with pytest.raises(MissingProcessError, match=words):
            rendezvous.open_store(1, 2, 2 * HANG_SECONDS)


def test_only_a_process_of_torchrun_itself_misses_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others may be left to themselves in order; a forked process has another parent anyway."""
    other, here = os.getppid() + 1, os.getpid()
    monkeypatch.setattr(launcher, "STARTED", (here, other))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert launcher.lost_torchrun() is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert launcher.lost_torchrun() == other
    monkeypatch.setattr(launcher, "STARTED", (here + 1, other))
    assert launcher.lost_torchrun() is None
    monkeypatch.setattr(launcher, "STARTED", (here, os.getppid()))
    assert launcher.lost_torchrun() is None


def test_a_store_that_goes_while_processes_join_is_no_traceback() -> None:
    [_, end] = ends_of(2, lose_the_store)
    assert end.code == 0, end.said


def lose_the_store() -> None:
    """Process 0 serves as torchrun's agent does, and ends when process 1 has said hello."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0":
        served = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
        wait_until(lambda: served.check(["sfed/run/hello/1"]))
        os._exit(0)
    words = rf"joining: the store at {host}:{port} \(MASTER_ADDR, MASTER_PORT\) is lost \("
    with pytest.raises(MissingProcessError, match=words):
        rendezvous.open_store(1, 2, HANG_SECONDS)


def connect_to_a_stranger() -> None:
    with pytest.raises(MissingProcessError, match="another program use this port"):
        rendezvous.open_store(1, 2, 2.0)


def test_a_port_that_accepts_and_says_nothing_is_given_up_at_the_deadline() -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = str(stranger.getsockname()[1])
        [_, end] = ends_of(2, stranger_of, port)
    assert end.code == 0, end.said


def stranger_of(port: str) -> None:
    if os.environ["RANK"] == "1":
        os.environ["MASTER_PORT"] = port
        connect_to_a_stranger()
