"""Checks of the links between the processes: collectives timed, and each link of the ring."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from typing import Any

import torch

from sfed.bench.measure import Clock
from sfed.bench.round_parts import measure_collectives
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.doctor.job import Job
from sfed.doctor.report import Result, ok, skipped, warning
from sfed.plan.request import LINKS
from sfed.utils.text import size_text

_MESSAGE_BYTES = 64 * 2**20
_TURNS = 3
_RING_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Of a message, by where it is sent from: far longer under way than a kernel takes to start."""
_RING_TURNS = 8
_FAR_SLOWER = 4.0
"""A link that takes this many times as long as the fastest of its kind is named."""
_ALIKE = 3.0
"""Rates within this factor are those of the same kind of link."""
_ALONE = "one process sends nothing: start several with torchrun"


def collectives(job: Job) -> Result:
    """Seconds and bus rates of all_reduce and all_gather, by size, and whether they are right."""
    world = job.world
    if world.size == 1:
        return skipped(_ALONE)
    found = measure_collectives(world, _MESSAGE_BYTES, _TURNS)
    by_kind = {(one["kind"], one["bytes"]): one for one in found}
    smallest, largest = min(one["bytes"] for one in found), max(one["bytes"] for one in found)
    told = []
    for kind in ("all_reduce", "all_gather"):
        wait = 1e3 * by_kind[kind, smallest]["seconds"]["median"]
        rate = by_kind[kind, largest]["bus_bytes_per_second"]
        told.append(f"{kind} {wait:.3g} ms for {smallest // 1024} KiB, {rate / 1e9:.3g} GB/s")
    seen = "; ".join(told) + f" for {size_text(largest, 0)}"
    rate = by_kind["all_reduce", largest]["bus_bytes_per_second"]
    nearest = min(LINKS, key=lambda name: abs(math.log(LINKS[name] / rate)))
    if max(rate / LINKS[nearest], LINKS[nearest] / rate) < _ALIKE:
        seen += f" (for sfed plan: --link {nearest})"
    return ok(seen, collectives=found)


def ring(job: Job) -> Result:
    """The time that each process's message takes to the next process: names the slow link."""
    world = job.world
    if world.size == 1:
        return skipped(_ALONE)
    device = torch.device("cpu") if distributed.is_on_host() else world.device
    num_bytes = _RING_BYTES[device.type]
    clock, own = Clock(device), torch.full((num_bytes // 4,), float(world.rank), device=device)
    seconds, is_right = float("inf"), True
    for turn in range(2 * _RING_TURNS):
        # Every second process sends, so that who receives does nothing else meanwhile.
        senders = range(turn % 2, world.size, 2)
        distributed.all_reduce_sum(torch.zeros(1, device=device))  # all begin together
        start = clock.read()
        received = distributed.pass_to_next(world, own, senders)
        if received is not None:
            seconds = min(seconds, clock.read() - start)
            is_right = is_right and bool((received == (world.rank - 1) % world.size).all())
    facts = {"host": socket.gethostname(), "seconds": seconds, "is_right": is_right}
    found: list[dict[str, Any]] = sync.gather_json(world, "the ring", facts)
    links = [
        {
            "sender": (receiver - 1) % world.size,
            "receiver": receiver,
            "is_within_node": one["host"] == found[receiver - 1]["host"],
            "seconds": one["seconds"],
            "is_right": one["is_right"],
        }
        for receiver, one in enumerate(found)
    ]
    return judge_links(links, num_bytes)


def judge_links(links: list[dict[str, Any]], num_bytes: int) -> Result:
    """Compare the links of the ring with each other, those within nodes and the others apart.

    Args:
        links: sender, receiver, is_within_node, seconds of a message, is_right.
        num_bytes: of a message.
    """
    wrong = [_name(link) for link in links if not link["is_right"]]
    if wrong:
        return Result(
            "failed",
            f"a message arrived with other numbers than were sent: {', '.join(wrong)}",
            "take the machine of that link out of the job and test its memory and network",
            {"links": links},
        )
    slow, told = [], []
    for is_within in (True, False):
        kind = [link for link in links if link["is_within_node"] == is_within]
        if not kind:
            continue
        fastest = min(link["seconds"] for link in kind)
        slowest = max(link["seconds"] for link in kind)
        where = "within a node" if is_within else "between nodes"
        told.append(f"{1e3 * fastest:.3g} to {1e3 * slowest:.3g} ms {where}")
        slow += [link for link in kind if link["seconds"] > _FAR_SLOWER * fastest]
    seen = f"{size_text(num_bytes, 0)} to the next process: {', '.join(told)}"
    if not slow:
        return ok(seen, links=links)
    names = "; ".join(f"{_name(link)} takes {1e3 * link['seconds']:.3g} ms" for link in slow)
    return warning(
        f"{seen}; {names}",
        "compare the network of these nodes with the others (cable, port, NCCL_SOCKET_IFNAME or "
        "GLOO_SOCKET_IFNAME), or leave them out",
        links=links,
    )


def _name(link: Mapping[str, Any]) -> str:
    return f"from process {link['sender']} to process {link['receiver']}"
