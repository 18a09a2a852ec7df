"""The fork server from which the runs of a sweep come."""

from __future__ import annotations

import sys

import pytest

from tests.support import launchers

_INTERRUPTED_WHILE_IT_IMPORTS = """
import multiprocessing as mp, os, signal
from multiprocessing import forkserver
from sfed.sweep import run_process

run_process.prepare()
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(forkserver._forkserver._forkserver_pid, number)
one = mp.get_context("forkserver").Process(target=print, args=("alive",))
one.start()
one.join()
"""


@pytest.mark.dist
@pytest.mark.slow
def test_signals_to_all_processes_do_not_end_the_fork_server_while_it_imports() -> None:
    """A Ctrl-C of the terminal reaches it too; the sweep stops in order and ends it."""
    done = launchers.run(sys.executable, "-c", _INTERRUPTED_WHILE_IT_IMPORTS)
    assert done.stdout == "alive\n", done.stderr
    assert "Traceback" not in done.stderr
