"""How processes come together and part."""

from __future__ import annotations

import time

import pytest

from sfed.distributed import sync
from sfed.distributed import world as distributed
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes


def read_late() -> str:
    """Process 1 reads what process 0 said long after process 0 is done."""
    world = distributed.start(RUN_SECONDS)
    try:
        world.store.set(f"word/{world.rank}", "hello")
        if world.rank == 1:
            time.sleep(2.0)
        word = world.store.get("word/0").decode()
        sync.leave_store_last(world)
        return word
    finally:
        distributed.stop(world)


@pytest.mark.dist
def test_process_0_which_serves_the_store_is_the_last_to_go():
    assert on_processes(2, read_late) == ["hello", "hello"]
