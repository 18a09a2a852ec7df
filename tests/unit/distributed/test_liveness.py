"""A process that is gone is told from one that is slow."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from sfed.distributed import liveness
from sfed.distributed.liveness import Identity, Silence


def identity_of(pid: int) -> Identity:
    own = Identity.of_this_process("here")
    started = liveness._started(pid)
    assert started is not None
    return dataclasses.replace(own, pid=pid, started=started)


def test_a_process_that_lives_is_not_gone() -> None:
    assert Identity.of_this_process("here").is_gone() is False


def test_a_killed_process_is_gone_before_its_parent_has_asked() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        who = identity_of(child.pid)
        assert who.is_gone() is False
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays in the table
        assert who.is_gone() is True
    finally:
        child.kill()
        child.communicate()
    assert who.is_gone() is True


def test_another_process_with_its_pid_is_not_it() -> None:
    other = dataclasses.replace(Identity.of_this_process("here"), started="1")
    assert other.is_gone() is True


@pytest.mark.parametrize("changed", [{"process_table": "another machine"}, {"started": ""}])
def test_a_process_of_another_machine_cannot_be_looked_up(changed: dict) -> None:
    assert dataclasses.replace(Identity.of_this_process("here"), **changed).is_gone() is None


def test_silence_is_counted_from_the_last_message(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now)
    silence = Silence()
    assert not silence.is_too_long(5, is_told_to_stop=False)
    now += 20.0
    assert not silence.is_too_long(5, is_told_to_stop=False)
    assert silence.is_too_long(5, is_told_to_stop=True)
    now += 20.0
    assert not silence.is_too_long(6, is_told_to_stop=False)
    now += 31.0
    assert silence.is_too_long(6, is_told_to_stop=False)
