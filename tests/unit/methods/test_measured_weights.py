"""Weights that follow from what clients have trained: the same on all processes, sum 1."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from sfed.clients.store import ClientStore
from sfed.data import partition
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.lora.layout import Layout
from sfed.methods.aggregation import measured_weights
from sfed.methods.product import norm_of_products
from sfed.utils.errors import UserError
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

LAYOUT = Layout.of([("x.up_proj", 3, 5), ("y.o_proj", 4, 2)], lora_rank=2)
N = 5
ROWS = torch.randn(N, LAYOUT.size, generator=torch.Generator().manual_seed(1))
Layers = Mapping[str, Mapping[str, torch.Tensor]]


def nothing(layers: Layers) -> float:
    return 0.0


def negative(layers: Layers) -> float:
    return -1.0


def weights(measure, participants: tuple[int, ...]) -> list[float]:
    world = distributed.start(RUN_SECONDS)
    try:
        own = partition.place(N, world.size)[world.rank]
        clients = ClientStore(
            own, LAYOUT, torch.device("cpu"), clients_per_pass=len(own), moments=()
        )
        for client in own:
            parts = {f.lower(): ROWS[client][LAYOUT.columns(f)] for f in ("A", "B")}
            clients.set_own(client, parts)
        found = measured_weights(world, clients, N, participants, measure)
        sync.leave_store_last(world)
        return found
    finally:
        distributed.stop(world)


@pytest.mark.dist
def test_weights_of_the_participants_follow_the_norms_of_their_products() -> None:
    norms = []
    for row in ROWS.double():
        square = 0.0
        for name, width, out in (("x.up_proj", 3, 5), ("y.o_proj", 4, 2)):
            a, b = (
                next(
                    row[p.start : p.end].view(p.shape)
                    for p in LAYOUT.pieces
                    if (p.layer, p.factor) == (name, factor)
                )
                for factor in ("A", "B")
            )
            assert (b @ a).shape == (out, width)
            square += float((b @ a).square().sum())
        norms.append(square**0.5)
    members = (0, 2, 3)
    expected = [norms[c] / sum(norms[m] for m in members) if c in members else 0 for c in range(N)]
    for num_processes in (1, 2, 3):
        for found in on_processes(num_processes, weights, norm_of_products, members):
            assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.dist
def test_clients_count_alike_where_nobody_has_trained() -> None:
    """In the beginning all B are 0."""
    assert weights(nothing, (1, 4)) == [0, 0.5, 0, 0, 0.5]


@pytest.mark.dist
def test_a_measure_that_is_no_weight_is_refused() -> None:
    with pytest.raises(UserError, match=r"the weight of client 0 by federated\.method is -1\.0"):
        weights(negative, (0, 1))
