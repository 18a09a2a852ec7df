"""The processes of a run: start, stop, and the few things they say to each other.

Every wait has a deadline and names who is missing. Tensors go through one process group; small
facts (mistakes, counts) go as JSON through the launcher's key-value store.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from sfed.cli import UserError

_SECONDS_TO_PART = 30.0


class MissingProcessError(RuntimeError):
    """Another process did not come to a meeting point before the deadline."""


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
    _meetings: Counter[str] = field(default_factory=Counter)

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, the one that speaks and writes the run's own files."""
        return self.rank == 0


def start(deadline_seconds: float) -> World:
    """Join the other processes; the same path under torchrun, deepspeed and plain python.

    Collective: all processes call it once, before any other function here.

    Args:
        deadline_seconds: longest wait for another process, here and later.
    """
    environment = os.environ
    process, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    # torchrun says LOCAL_WORLD_SIZE, deepspeed says LOCAL_SIZE.
    local_size = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or size)
    timeout = datetime.timedelta(seconds=deadline_seconds)
    device, per_device = torch.device("cpu"), local_size
    if "OMP_NUM_THREADS" not in environment:  # torchrun sets it, deepspeed and python do not
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if torch.cuda.is_available():
        num_devices = torch.cuda.device_count()
        device = torch.device("cuda", local_rank % num_devices)
        per_device = -(-local_size // num_devices)
        torch.cuda.set_device(device)
    # NCCL refuses two processes on one device; gloo carries CUDA tensors through host memory.
    backend = "nccl" if device.type == "cuda" and per_device == 1 else "gloo"
    store = open_store(process, size, timeout)
    dist.init_process_group(backend, store=store, rank=process, world_size=size, timeout=timeout)
    return World(process, local_rank, size, per_device, device, deadline_seconds, store)


def open_store(process: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """Open the key-value store of the launcher, with keys of its own for each restart.

    Runs that share a store, one after another, each have a name of their own in SFED_GROUP.
    """
    environment = os.environ
    if size == 1:
        return dist.HashStore()
    agent_serves = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        size,
        is_master=process == 0 and not agent_serves,
        timeout=timeout,
    )
    # torchrun keeps its store over a restart, with the addresses of the processes that died.
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    group = environment.get("SFED_GROUP", "run")
    return dist.PrefixStore(f"sfed/{group}/attempt-{attempt}", store)


def stop() -> None:
    """Leave the process group. No collective: it is safe after an error on one process."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def gather_json(world: World, name: str, value: Any) -> list[Any]:
    """Return what every process passed, in the order of processes. Collective.

    Raises:
        MissingProcessError: naming the processes that did not come before the deadline.
    """
    world._meetings[name] += 1
    prefix = f"{name}#{world._meetings[name]}"
    world.store.set(f"{prefix}/{world.rank}", json.dumps(value))
    keys = [f"{prefix}/{peer}" for peer in range(world.size)]
    try:
        world.store.wait(keys, datetime.timedelta(seconds=world.deadline_seconds))
    except dist.DistStoreError:
        missing = [peer for peer, key in enumerate(keys) if not world.store.check([key])]
        raise MissingProcessError(
            f"{name}: process {', '.join(map(str, missing))} of {world.size} did not come within "
            f"{world.deadline_seconds:g} s (federated.deadline_seconds)"
        ) from None
    return [json.loads(world.store.get(key)) for key in keys]


def meet(world: World, name: str) -> None:
    """Wait until every process is here. Collective.

    Raises:
        MissingProcessError: naming the processes that did not come before the deadline.
    """
    gather_json(world, name, None)


def part(world: World) -> None:
    """Let process 0, which may serve the store, be the last to go. Collective, at a good end.

    Otherwise a process that still reads what was said last would lose the store.
    """
    world.store.set(f"parted/{world.rank}", "")
    if world.is_main:
        keys = [f"parted/{peer}" for peer in range(world.size)]
        # Who ended badly meanwhile has nothing to read any more.
        with suppress(dist.DistStoreError):
            world.store.wait(keys, datetime.timedelta(seconds=_SECONDS_TO_PART))


@contextmanager
def together(world: World, name: str) -> Iterator[None]:
    """Make a user's mistake met by one process the mistake of all of them. Collective.

    Raises:
        UserError: on every process, where the body raised it on any.
    """
    mistake: str | None = None
    try:
        yield
    except UserError as error:
        mistake = str(error)
    mistakes = sorted({other for other in gather_json(world, name, mistake) if other is not None})
    if mistakes:
        raise UserError("\n".join(mistakes))


@contextmanager
def first_of_node_first(world: World, name: str) -> Iterator[None]:
    """Let the first process of each node run the body before the others, to fill a cache once.

    Raises:
        MissingProcessError: where it does not finish before the deadline.
    """
    world._meetings[name] += 1
    key = f"{name}#{world._meetings[name]}/node-of-{world.rank - world.local_rank}"
    if world.local_rank != 0:
        try:
            world.store.wait([key], datetime.timedelta(seconds=world.deadline_seconds))
        except dist.DistStoreError:
            raise MissingProcessError(
                f"{name}: process {world.rank - world.local_rank} did not finish within "
                f"{world.deadline_seconds:g} s (federated.deadline_seconds)"
            ) from None
    try:
        yield
    finally:
        if world.local_rank == 0:
            world.store.set(key, "done")


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that a collective failed because another process is not there."""
    marks = ("gloo", "Connection reset", "Connection closed", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(mark in str(error) for mark in marks)


class StopRequest:
    """SIGTERM on any process stops all of them before the same step, so that none waits forever.

    So does SIGUSR1, with which Slurm tells that the time of a job is nearly over.

    Under ZeRO-3 every pass of a step gathers weights from all processes: nobody can be two steps
    ahead. So the process that is asked announces "two steps from here" and everybody sees it in
    time. Without sharding the processes run freely, and each stops as soon as it is at or beyond
    that step.
    """

    _KEY = "stop-before"
    # Positions order steps over the whole run; no round has this many of them.
    _STEPS_PER_ROUND = 10**9

    def __init__(self, world: World) -> None:
        self._store = world.store
        self._asked = False
        self._announced = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        self._asked = True  # nothing else: the handler may interrupt any line

    def due(self, round_index: int, step: int) -> bool:
        """Whether to stop before this step, counted over all passes of a process in a round."""
        position = round_index * self._STEPS_PER_ROUND + step
        if self._asked and not self._announced:
            self._announced = True
            self._store.compare_set(self._KEY, "", str(position + 2))
        return self._store.check([self._KEY]) and position >= int(self._store.get(self._KEY))
