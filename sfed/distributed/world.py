"""The processes of a run: start, stop, and the few collectives through which tensors go.

Only this folder and ``models/deepspeed`` use torch.distributed. What processes say to each other in
words is in ``sync``.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from sfed.distributed.rendezvous import open_store
from sfed.distributed.watchdog import Heartbeat, Watchdog
from sfed.utils.errors import UserError
from sfed.utils.launcher import launch

SECONDS_OF_SLACK = 5.0
"""What a collective waits beyond the deadline, at which ``watchdog`` says who keeps it waiting."""
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
    """The same over a connection of its own, for what is said while a wait holds the other."""
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
        UserError: where the heartbeat file cannot be written, or torch.distributed is in use.
    """
    if dist.is_initialized():
        raise UserError(
            "torch.distributed is initialised already in this process, and a run makes a process "
            "group of its own; call torch.distributed.destroy_process_group() before"
        )
    environment, here = os.environ, launch()
    process, size, local_rank = here.rank, here.size, here.local_rank
    heartbeat = Heartbeat.of_environment(local_rank)
    device, per_device = torch.device("cpu"), here.local_size
    if "OMP_NUM_THREADS" not in environment:  # torchrun sets it, deepspeed and python do not
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here.local_size))
    if torch.cuda.is_available():
        num_devices = torch.cuda.device_count()
        device = torch.device("cuda", local_rank % num_devices)
        per_device = -(-here.local_size // num_devices)
        torch.cuda.set_device(device)
    # fp32 is fp32: no matrix product is rounded to TF32, whatever the GPU or the environment says.
    torch.set_float32_matmul_precision("highest")
    # NCCL refuses two processes on one device; gloo carries CUDA tensors through host memory.
    backend = "nccl" if device.type == "cuda" and per_device == 1 else "gloo"
    store = open_store(process, size, deadline_seconds, heartbeat.renew)
    whole: Any = store  # torch's types do not know clone
    side_store = whole.clone() if size > 1 else store
    watch = Watchdog(process, size, deadline_seconds, side_store, heartbeat, flight_record)
    environment.setdefault("TORCH_FR_BUFFER_SIZE", _COLLECTIVES_REMEMBERED)
    timeout = datetime.timedelta(seconds=deadline_seconds + SECONDS_OF_SLACK)
    dist.init_process_group(backend, store=store, rank=process, world_size=size, timeout=timeout)
    return World(
        process,
        local_rank,
        size,
        per_device,
        device,
        deadline_seconds,
        store,
        side_store,
        watch,
    )


def stop(world: World) -> None:
    """Leave the process group. No collective: it is safe after an error on one process."""
    world.watch.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def flight_record() -> dict[str, Any]:
    """What torch remembers of this process's latest collectives."""
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


def all_gather_flat(world: World, share: torch.Tensor) -> torch.Tensor:
    """Return the equally long flat tensors of all processes as one, as ZeRO-3 does. Collective."""
    whole = torch.empty(world.size * share.numel(), dtype=share.dtype, device=share.device)
    dist.all_gather_into_tensor(whole, share)
    return whole
