"""The processes of a run: start, stop, and the few collectives through which tensors go.

Only this folder and ``models/deepspeed`` use torch.distributed. What processes say to each other in
words is in ``sync``.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from sfed.distributed import devices
from sfed.distributed.rendezvous import open_store
from sfed.distributed.watchdog import Heartbeat, Watchdog
from sfed.utils.errors import MissingProcessError, UserError
from sfed.utils.launcher import Launch, launch

SECONDS_OF_SLACK = 15.0
"""What a collective waits beyond the deadline, at which ``watchdog`` says who keeps it waiting.

NCCL ends the process when it no longer waits; until then the reason must have been said.
"""
_COLLECTIVES_REMEMBERED = "500"


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    local_rank: int
    size: int
    processes_per_device: int
    device: torch.device
    deadline_seconds: float
    store: dist.Store
    side_store: dist.Store
    """The store over a second connection, for messages while a wait holds the first."""
    watch: Watchdog
    meetings: Counter[str] = field(default_factory=Counter)

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, the one that speaks and writes the run's own files."""
        return self.rank == 0


def start(deadline_seconds: float) -> World:
    """Join the other processes; the same path under torchrun, deepspeed and plain python.

    Collective: all processes call it once, before any other function here.

    Args:
        deadline_seconds: longest wait for another process, here and later.

    Raises:
        MissingProcessError: naming the processes that did not come before the deadline.
        UserError: where the heartbeat file cannot be written, torch.distributed is in use, or a GPU
            cannot be used.
    """
    if dist.is_initialized():
        raise UserError(
            "torch.distributed is initialised already in this process, and a run makes a process "
            "group of its own; call torch.distributed.destroy_process_group() before"
        )
    here = launch()
    heartbeat = Heartbeat.of_environment(here.local_rank)
    devices.set_arithmetic(here)
    device = devices.choose(here.local_rank)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _COLLECTIVES_REMEMBERED)
    store = open_store(here.rank, here.size, deadline_seconds, heartbeat.renew)
    whole: Any = store  # torch's types do not know clone
    side_store = whole.clone() if here.size > 1 else store
    watch = Watchdog(here, deadline_seconds, side_store, heartbeat, flight_record)
    sharing = _processes_on(device, here, store, deadline_seconds)
    timeout = datetime.timedelta(seconds=deadline_seconds + SECONDS_OF_SLACK)
    # NCCL refuses two processes on one device; gloo carries CUDA tensors through host memory.
    if device.type == "cuda" and sharing == 1:
        _join_over_nccl(here, store, timeout, device)
    else:
        dist.init_process_group(
            "gloo", store=store, rank=here.rank, world_size=here.size, timeout=timeout
        )
    return World(
        here.rank,
        here.local_rank,
        here.size,
        sharing,
        device,
        deadline_seconds,
        store,
        side_store,
        watch,
    )


def _join_over_nccl(
    here: Launch, store: dist.Store, timeout: datetime.timedelta, device: torch.device
) -> None:
    """Make the process group, and NCCL's buffers before anyone asks for free memory. Collective.

    NCCL connects at its first collective, which would otherwise be the mean of the first round.
    """
    dist.init_process_group(
        "nccl",
        store=store,
        rank=here.rank,
        world_size=here.size,
        timeout=timeout,
        device_id=device,
    )
    dist.all_reduce(torch.zeros(1, device=device))


def _processes_on(
    device: torch.device, here: Launch, store: dist.Store, deadline_seconds: float
) -> int:
    """How many processes compute on this process's device. Collective.

    Two processes may see one device under different numbers, or two devices under one, where the
    launcher shows each process a device of its own.
    """
    own = devices.identity(device, socket.gethostname())
    store.set(f"device/{here.rank}", own)
    keys = [f"device/{rank}" for rank in range(here.size)]
    try:
        store.wait(keys, datetime.timedelta(seconds=deadline_seconds))
    except RuntimeError:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise MissingProcessError(
            f"choosing devices: process {', '.join(missing)} of {here.size} did not come within "
            f"{deadline_seconds:g} s (federated.deadline_seconds)"
        ) from None
    return sum(store.get(key).decode() == own for key in keys)


def abandon(world: World) -> None:
    """Drop the connections to the other processes after an error, without waiting for any.

    NCCL's orderly end is a collective, which others do not come to: it would hang, and the reason
    of the error would not be seen. The watchdog ends the process where even this hangs.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        # No public name for it yet.
        dist.distributed_c10d._abort_process_group()
    stop(world)


def stop(world: World) -> None:
    """Leave the process group at a good end; see ``abandon`` for another end."""
    world.watch.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def flight_record() -> dict[str, Any]:
    """What torch remembers of this process's latest collectives; nothing without a process group.

    The watchdog asks for it also before there is one, and after its end.
    """
    if not dist.is_initialized():
        return {}
    # No public name for it yet; torch writes it to a file of its own only where NCCL times out.
    dump = "_dump_nccl_trace_json" if not is_on_host() else "_dump_fr_trace_json"
    record: dict[str, Any] = json.loads(getattr(torch._C._distributed_c10d, dump)())
    return record


def all_reduce_sum(flat: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes in place. Collective.

    The result is bitwise the same on every process.
    """
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    return flat


def is_on_host() -> bool:
    """Whether the processes gather in host memory, as gloo does."""
    return bool(dist.get_backend() == "gloo")


def all_gather_rows(world: World, rows: torch.Tensor) -> list[torch.Tensor]:
    """Return the equally shaped tensors of all processes, in the order of processes. Collective."""
    rows = rows.to("cpu" if is_on_host() else world.device).contiguous()
    gathered = [torch.empty_like(rows) for _ in range(world.size)]
    dist.all_gather(gathered, rows)
    return [one.cpu() for one in gathered]


def all_to_all(
    world: World, parts: Sequence[torch.Tensor], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Send each process a part of its own and return what each sent here. Collective.

    Args:
        world: the processes.
        parts: a flat tensor for each process, all of one dtype.
        sizes: numbers that come from each process.
    """
    where = torch.device("cpu") if is_on_host() else world.device
    sent = torch.cat(list(parts)).to(where)
    received = torch.empty(sum(sizes), dtype=sent.dtype, device=where)
    dist.all_to_all_single(received, sent, list(sizes), list(map(len, parts)))
    return list(torch.split(received.to(world.device), list(sizes)))


def all_gather_flat(world: World, share: torch.Tensor) -> torch.Tensor:
    """Return the equally long flat tensors of all processes as one, as ZeRO-3 does. Collective."""
    whole = torch.empty(world.size * share.numel(), dtype=share.dtype, device=share.device)
    dist.all_gather_into_tensor(whole, share)
    return whole


def pass_to_next(world: World, sent: torch.Tensor, senders: Collection[int]) -> torch.Tensor | None:
    """Pass a tensor on along the ring of processes. Collective.

    Args:
        world: the processes.
        sent: what this process sends if it is a sender; where the backend carries it, and of the
            same shape on all processes.
        senders: processes that send to the next one.

    Returns:
        What the previous process sent; None where it is no sender.
    """
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    received = torch.empty_like(sent) if before in senders else None
    passed = [dist.P2POp(dist.isend, sent, after)] if world.rank in senders else []
    if received is not None:
        passed.append(dist.P2POp(dist.irecv, received, before))
    for work in dist.batch_isend_irecv(passed) if passed else ():
        work.wait()
    return received
