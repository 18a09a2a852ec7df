"""Variables of a launcher that are there in part, or are no numbers."""

from __future__ import annotations

import pytest

from sfed.distributed.rendezvous import open_store
from sfed.utils.errors import UserError
from sfed.utils.launcher import Launch, launch, rank_or_first

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture(autouse=True)
def _without_launcher(monkeypatch):
    for name in (*NAMES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2"),
        ({"LOCAL_RANK": "\x1b"}, r"LOCAL_RANK='\\x1b'"),
    ],
)
def test_what_is_wrong_is_named_and_somebody_speaks(monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        launch()
    assert rank_or_first() == 0


def test_empty_variables_count_as_not_set(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")
    assert launch() == Launch(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "no MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_ADDR": "127.0.0.1"}, "no MASTER_PORT"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT='x' is no port"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "is no port from 1 to 65535"),
    ],
)
def test_processes_that_cannot_meet_say_so(monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        open_store(0, 2, 5.0)
