"""Scaling: whole rounds on this job's processes, weak and strong, and where their time goes.

A job measures its own number of processes; ``scaling_tables`` puts several jobs beside each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sfed.bench.measure import Clock, Spread, describe_machine
from sfed.bench.sharded import Sharded
from sfed.bench.steps import Sfed
from sfed.bench.workload import Workload, random_tokens
from sfed.config.schema import DEFAULT_LOCAL_STEPS
from sfed.data.partition import place
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.methods import aggregation
from sfed.models.synthetic import twin
from sfed.utils.launcher import launch

REPLICA, SHARDS, SECONDARY = "replica", "zero3", "zero3 hpZ"
_LOCAL, _WAIT, _MEAN = range(3)
"""Parts of a round: local steps, waiting for other processes, the mean of A."""


@dataclass(frozen=True)
class Nodes:
    """How the processes of a job lie on machines."""

    count: int
    processes_of_each: int
    """0 where they differ."""


@dataclass(frozen=True)
class Storage:
    """The trainer on a backbone that is stored in one way."""

    name: str
    trainer: Sfed
    shards: Sharded | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let its steps run as this storage needs them."""
        if self.shards is None:
            yield
        else:
            with self.shards.in_place():
                yield


def measure_scaling(
    world: World, model: PreTrainedModel, workload: Workload, repeat: int, budget: float | None
) -> dict[str, Any]:
    """Time rounds in turns. Collective.

    Args:
        world: the processes of the job.
        model: the backbone, whole on each process.
        workload: its clients are those of each process for weak scaling, and those of all
            processes together for strong scaling.
        repeat: counted turns.
        budget: begin no further turn after so many seconds, but count at least one; None = never
            end early.

    Returns:
        A job, as ``scaling_tables`` reads it.
    """
    nodes = _nodes_of(world)
    storages = _storages(world, model, workload, nodes)
    kinds = {"weak": [workload.num_clients] * world.size}
    if workload.num_clients >= world.size:
        kinds["strong"] = [len(own) for own in place(workload.num_clients, world.size)]
    seconds = _timed(world, storages, kinds, repeat, budget)
    return {
        "processes": world.size,
        "nodes": nodes.count,
        "processes_of_a_node": nodes.processes_of_each,
        "steps_of_a_round": DEFAULT_LOCAL_STEPS,
        "machine": describe_machine(world.device),
        "rounds": [
            _described(kind, name, clients, seconds, workload.tokens_per_client)
            for kind, clients in kinds.items()
            for name in storages
        ],
    }


def _nodes_of(world: World) -> Nodes:
    """Count the machines, which hold ranges of processes. Collective."""
    here = launch()
    told = sync.gather_json(world, "nodes", [here.local_rank, here.local_size])
    sizes = [size for local_rank, size in told if local_rank == 0]
    return Nodes(len(sizes), sizes[0] if len(set(sizes)) == 1 else 0)


def _storages(
    world: World, model: PreTrainedModel, workload: Workload, nodes: Nodes
) -> dict[str, Storage]:
    """The ways to store the backbone that differ among these processes. Collective."""
    ids = random_tokens(model.config, workload).to(world.device)
    replica = Sfed(twin(model), workload, ids, clients_per_pass=workload.num_clients)
    found = [Storage(REPLICA, replica)]
    if world.size > 1:
        shards = Sharded(model, workload, ids)
        found.append(Storage(SHARDS, shards.contestant, shards))
    if nodes.count > 1 and nodes.processes_of_each > 1:
        secondary = Sharded(model, workload, ids, nodes.processes_of_each)
        found.append(Storage(SECONDARY, secondary.contestant, secondary))
    return {storage.name: storage for storage in found}


Seconds = dict[tuple[str, str], list[torch.Tensor]]
"""By kind and storage: for each turn, (processes, 3) seconds of the parts of a round."""


def _timed(
    world: World,
    storages: Mapping[str, Storage],
    kinds: Mapping[str, list[int]],
    repeat: int,
    budget: float | None,
) -> Seconds:
    """Make rounds in turns; the first turn warms up. Collective."""
    seconds: Seconds = {(kind, name): [] for kind in kinds for name in storages}
    start = time.monotonic()
    for turn in range(repeat + 1):
        is_late = budget is not None and time.monotonic() - start > budget
        # Process 0 decides, since the clocks of the others may be ahead of it or behind.
        if turn > 1 and sync.gather_json(world, "a turn", is_late)[0]:
            break
        for kind, clients in kinds.items():
            for name, storage in storages.items():
                with storage.in_place():
                    mine = _round(world, storage.trainer, clients)
                parts = torch.stack(distributed.all_gather_rows(world, mine))
                if turn:
                    seconds[kind, name].append(parts)
    return seconds


def _round(world: World, trainer: Sfed, clients: list[int]) -> torch.Tensor:
    """One round; returns the (3,) seconds of its parts on this process. Collective."""
    clock, own, total = Clock(world.device), clients[world.rank], sum(clients)
    weights = [1.0 / total] * own + [0.0] * (trainer.workload.num_clients - own)
    trainer.enter_first(own)
    _meet(world)
    moments = [clock.read()]
    for _ in range(DEFAULT_LOCAL_STEPS):
        trainer.step()
    trainer.leave()
    moments.append(clock.read())
    _meet(world)
    moments.append(clock.read())
    aggregation.share(world, trainer.clients, ("A",), weights)
    moments.append(clock.read())
    return torch.tensor(moments, dtype=torch.float64).diff()


def _meet(world: World) -> None:
    """Wait for all processes, on the link on which the mean is taken."""
    distributed.all_reduce_sum(torch.zeros(1, device=world.device))
    Clock(world.device).read()


def _described(
    kind: str, name: str, clients: list[int], seconds: Seconds, tokens_per_client: int
) -> dict[str, Any]:
    """One row of the table: of a kind and a storage."""
    turns = seconds[kind, name]
    whole = [float(parts.sum(dim=1).mean()) for parts in turns]
    rate = DEFAULT_LOCAL_STEPS * sum(clients) * tokens_per_client / len(clients)
    return {
        "kind": kind,
        "storage": name,
        "clients": sum(clients),
        "most_clients_of_a_process": max(clients),
        "seconds": Spread.of(whole).as_json(),
        "tokens_per_second_and_process": Spread.of([rate / one for one in whole]).as_json(),
        "waiting_share": _share(turns, whole, _WAIT),
        "mean_share": _share(turns, whole, _MEAN),
        "gather_share": None if name == REPLICA else _gathers(seconds, kind, name, whole),
        "samples_seconds": [parts.tolist() for parts in turns],
    }


def _share(turns: list[torch.Tensor], whole: list[float], part: int) -> dict[str, float]:
    """Share of a part in the rounds, mean over processes."""
    pairs = zip(turns, whole, strict=True)
    return Spread.of([float(parts[:, part].mean()) / one for parts, one in pairs]).as_json()


def _gathers(seconds: Seconds, kind: str, name: str, whole: list[float]) -> dict[str, float]:
    """How much longer the local steps take than on a replica, as a share of the round."""
    turns = zip(seconds[kind, name], seconds[kind, REPLICA], whole, strict=True)
    longer = (
        float(parts[:, _LOCAL].mean() - replica[:, _LOCAL].mean()) / one
        for parts, replica, one in turns
    )
    return Spread.of(list(longer)).as_json()
