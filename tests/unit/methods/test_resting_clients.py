"""Sums over clients that rest in host memory are made on the GPU, and nobody waits for a copy."""

from __future__ import annotations

from collections import Counter

import torch

from sfed.clients.store import ClientStore
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.lora.layout import Layout
from sfed.methods import aggregation
from sfed.privacy.clipping import clipped_sum
from tests.support.deadlines import RUN_SECONDS
from tests.support.pretended_gpu import PretendedGpu

LAYOUT = Layout.of([("one", 5, 3), ("two", 2, 7)], lora_rank=2, head={"weight": (3, 4)})
CPU = torch.device("cpu")
Found = dict[str, torch.Tensor]


def store(num_clients: int, device: torch.device) -> ClientStore:
    """Clients of which one shares a pass, so that all rest."""
    clients = ClientStore(range(num_clients), LAYOUT, device, clients_per_pass=1, moments=())
    values = torch.randn(num_clients, LAYOUT.size, generator=torch.Generator().manual_seed(2))
    for client in clients.own:
        parts = {f.lower(): values[client, LAYOUT.columns(f)] for f in LAYOUT.factors}
        clients.set_own(client, parts)
    return clients


def sums(world: World, clients: ClientStore) -> Found:
    """What a round makes of the clients' factors."""
    found = aggregation.similarity(world, clients)
    clipped, balance = clipped_sum(clients, ("A", "B"), clients.own, 2.0)
    weights = [1 / len(clients.own)] * len(clients.own)
    mixed = aggregation.global_row(world, clients, weights, LAYOUT.factors)
    aggregation.share(world, clients, ("A",), weights)
    return {
        "similarity": torch.tensor([found["a"], found["b"]]),
        "clipped": clipped.double() / 2**40,
        "balance": torch.tensor(balance),
        "global": mixed,
        "mean of A": clients.shared("A").clone(),
    }


def waits(world: World, gpu: PretendedGpu, num_clients: int) -> Counter[tuple[str, str]]:
    clients = store(num_clients, world.device)
    gpu.reset()
    aggregation.similarity(world, clients)
    aggregation.share(world, clients, ("A",), [1 / num_clients] * num_clients)
    return Counter(gpu.host_waits)


def test_they_are_those_of_a_cpu() -> None:
    world = distributed.start(RUN_SECONDS)
    try:
        assert world.device == CPU
        expected = sums(world, store(3, CPU))
    finally:
        distributed.stop(world)
    with PretendedGpu(races=True) as gpu:
        world = distributed.start(RUN_SECONDS)
        try:
            assert world.device.type == "cuda"
            found = {name: one.cpu() for name, one in sums(world, store(3, world.device)).items()}
        finally:
            distributed.stop(world)
    assert not gpu.mixes and not gpu.races
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_the_host_waits_as_often_for_seven_clients_as_for_two() -> None:
    with PretendedGpu() as gpu:
        world = distributed.start(RUN_SECONDS)
        try:
            assert waits(world, gpu, 7) == waits(world, gpu, 2)
        finally:
            distributed.stop(world)


def test_the_sums_are_made_on_the_gpu() -> None:
    with PretendedGpu() as gpu:
        world = distributed.start(RUN_SECONDS)
        try:
            clients = store(4, world.device)
            gpu.reset()
            aggregation.similarity(world, clients)
            assert gpu.launches["linalg_vector_norm"] == 8  # four clients, A and B
        finally:
            distributed.stop(world)
