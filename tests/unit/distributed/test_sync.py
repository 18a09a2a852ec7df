"""A mistake of one process ends all of them soon, with its text, wherever the others wait."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from sfed.distributed import sync, watchdog
from sfed.distributed import world as distributed
from sfed.distributed.shutdown import ending
from sfed.utils import command
from sfed.utils.errors import DataError, UserError
from tests.support.deadlines import HANG_SECONDS
from tests.support.processes import ends_of

MISTAKE = "model.name = 'x': no room on this device"


def mistaken(where: str) -> None:
    """Process 0 makes a mistake in a body in which process 1 waits for it."""
    watchdog._SECONDS_TO_LEAVE = 1.0
    world = distributed.start(10 * HANG_SECONDS)
    if where == "at the meeting, read late" and os.environ["RANK"] == "1":
        come = sync._wait
        sync._wait = lambda *arguments: (come(*arguments), time.sleep(3.0))  # type: ignore[assignment]
    try:
        with ending(world), sync.raise_everywhere(world, "loading the backbone"):
            if os.environ["RANK"] == "0":
                raise DataError(MISTAKE)
            if where == "in a collective":
                dist.all_reduce(torch.ones(1))
    except UserError as mistake:
        kind = type(mistake).__name__
        command.leave(f"{kind} {mistake}", command.EXIT_MISTAKE)


@pytest.mark.dist
@pytest.mark.parametrize(
    "where", ["at the meeting", "at the meeting, read late", "in a collective"]
)
def test_a_mistake_of_one_process_is_what_all_of_them_say(where: str) -> None:
    first, other = ends_of(2, mistaken, where, grace_seconds=HANG_SECONDS)
    assert first.code == command.EXIT_MISTAKE
    assert f"DataError {MISTAKE}" in first.said
    assert MISTAKE in other.said and other.code in (1, command.EXIT_MISTAKE)
    assert "did not come" not in first.said + other.said


def part_slowly() -> None:
    """Process 1 takes longer to end than the watchdog would wait for a store that is gone."""
    world = distributed.start(10 * HANG_SECONDS)
    sync.leave_store_last(world)
    if os.environ["RANK"] == "1":
        time.sleep(6.0)
    distributed.stop(world)


@pytest.mark.dist
def test_a_process_that_ends_slowly_at_a_good_end_ends_well() -> None:
    """Process 0 serves the store and has gone meanwhile."""
    assert [end.code for end in ends_of(2, part_slowly)] == [0, 0]
