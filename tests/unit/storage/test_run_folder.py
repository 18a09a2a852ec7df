"""A run folder belongs to one run at a time."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sfed.storage import run_folder
from sfed.storage.run_folder import RunLock
from sfed.utils.errors import UserError


def hold(folder: Path, sender: Connection) -> None:
    held = RunLock()
    held.take(folder)
    sender.send(os.getpid())
    signal.pause()


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the folder."""
    receiver, sender = mp.Pipe(duplex=False)
    process = mp.get_context("fork").Process(target=hold, args=(tmp_path, sender))
    process.start()
    receiver.recv()
    yield process
    process.kill()
    process.join()


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_folder, "_SECONDS_TO_FREE", 0.3)


def test_a_folder_in_use_is_refused_by_name_and_free_once_its_run_was_killed(
    tmp_path: Path, holder: mp.Process
):
    with pytest.raises(
        UserError, match=rf"using {tmp_path} \(process {holder.pid} on .+ since .+\)"
    ):
        RunLock().take(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    mine = RunLock()
    mine.take(tmp_path)
    mine.take(tmp_path)
    mine.free()


def test_a_folder_that_is_not_there_is_nobodys(tmp_path: Path):
    RunLock().take(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_folder_that_was_moved_aside_is_another_one(tmp_path: Path):
    (tmp_path / "run").mkdir()
    held = RunLock()
    held.take(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "run.old-1")
    (tmp_path / "run").mkdir()
    held.take(tmp_path / "run")
    receiver, sender = mp.Pipe(duplex=False)
    process = mp.get_context("fork").Process(target=refused, args=(tmp_path / "run", sender))
    process.start()
    assert receiver.recv(), "the new folder is held, not the old one"
    process.join()
    held.free()


def refused(folder: Path, sender: Connection) -> None:
    try:
        RunLock().take(folder)
        sender.send(False)
    except UserError:
        sender.send(True)
