"""What was received of a round is compared between processes, changes of the weights too."""

from __future__ import annotations

import pytest
import torch

from sfed.clients.store import ClientStore
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.federated.fingerprints import require_same_mean
from sfed.lora.layout import Layout
from sfed.utils.errors import DivergedError
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

LAYOUT = Layout.of([("x.up_proj", 3, 5)], lora_rank=2)


def compared(altered: int) -> str:
    """Process ``altered`` has received a change with one number in another last bit."""
    world = distributed.start(RUN_SECONDS)
    try:
        clients = ClientStore(
            [world.rank], LAYOUT, torch.device("cpu"), clients_per_pass=1, moments=()
        )
        u, v = torch.ones(5, 4), torch.ones(4, 3)
        if world.rank == altered:
            v[3, 2] = torch.nextafter(v[3, 2], torch.tensor(2.0))
        said = ""
        try:
            require_same_mean(world, clients, ("A", "B"), {"x.up_proj": (u, v)}, 7)
        except DivergedError as error:
            said = str(error)
        sync.leave_store_last(world)
        return said
    finally:
        distributed.stop(world)


@pytest.mark.dist
def test_a_bit_that_differs_in_a_change_of_the_weights_is_found() -> None:
    assert on_processes(2, compared, -1) == ["", ""]
    for said in on_processes(2, compared, 1):
        assert said.startswith("round 7: after the mean the processes hold different values")
        assert "change of the frozen weights: " in said
        assert "  A: " not in said
