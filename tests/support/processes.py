"""Run a function on several processes over gloo and get what each returned.

Processes come from a fork server that has already imported torch, so a start takes a fraction of a
second; they meet through the trainer's own start-up. A deadline (tests/support/deadlines.py) kills
exactly what was started.
"""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.support import deadlines

PRELOAD = ["tests.support.preload"]


_PORTS = range(10000, 32000)
"""Below those that systems hand out for connections (from 32768 on Linux)."""
_next_port = itertools.count(os.getpid() * 101)


def free_port() -> int:
    """A port that nobody listens on just now, and that no other test process is about to take."""
    while True:
        port = _PORTS[next(_next_port) % len(_PORTS)]
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _enter(
    process: int,
    num_processes: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    folder: str,
    environment: Mapping[str, str],
) -> None:
    os.environ.update(
        RANK=str(process),
        LOCAL_RANK=str(process),
        WORLD_SIZE=str(num_processes),
        LOCAL_WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **environment,
    )
    torch.set_num_threads(1)
    _use_accelerator_of(environment)
    result = function(*arguments)
    (Path(folder) / str(process)).write_bytes(pickle.dumps(result))


def _use_accelerator_of(environment: Mapping[str, str]) -> None:
    """DeepSpeed has chosen one already, when the fork server imported it."""
    if "DS_ACCELERATOR" in environment:
        from deepspeed.accelerator import real_accelerator

        real_accelerator.ds_accelerator = None


@dataclass(frozen=True)
class End:
    """How a process ended."""

    code: int
    """Exit code; negative = the signal that ended it."""
    said: str
    """What it wrote on both of its outputs."""
    seconds: float
    """How long it ran."""


def enter_and_log(process: int, *arguments: Any) -> None:
    folder = Path(arguments[4])
    log = os.open(folder / f"log-{process}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _enter(process, *arguments)


def ends_of(
    num_processes: int,
    function: Callable[..., Any],
    *arguments: Any,
    grace_seconds: float = deadlines.GRACE_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> list[End]:
    """Run function(*arguments) on all processes and tell how each ended.

    As a launcher does, it kills whoever is still there some time after another has ended.

    Args:
        num_processes: how many.
        function: what each does.
        arguments: of the function.
        grace_seconds: from the first end to a kill.
        environment: goes over this process's.
    """
    mp.set_forkserver_preload(PRELOAD)
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        shared = (num_processes, free_port(), function, arguments, folder, environment or {})
        processes = [
            context.Process(target=enter_and_log, args=(process, *shared))
            for process in range(num_processes)
        ]
        for process in processes:
            process.start()
        begin = time.monotonic()
        limit, seconds = begin + deadlines.HANG_SECONDS, [0.0] * num_processes
        while living := [i for i, process in enumerate(processes) if process.is_alive()]:
            now = time.monotonic()
            for i in living:
                seconds[i] = now - begin
                if now > limit:
                    processes[i].kill()
            if len(living) < num_processes:
                limit = min(limit, now + grace_seconds)
            time.sleep(0.05)
        return [
            End(process.exitcode or 0, (Path(folder) / f"log-{i}").read_text(), seconds[i])
            for i, process in enumerate(processes)
        ]


def on_processes(
    num_processes: int,
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Return [function(*arguments) on process 0, ..., on process num_processes - 1].

    An exception in a process is raised here with its traceback.
    """
    mp.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _enter,
            (num_processes, free_port(), function, arguments, folder, environment or {}),
            nprocs=num_processes,
            join=False,
            start_method="forkserver",
        )
        end = time.monotonic() + deadlines.HANG_SECONDS
        while not context.join(timeout=0.2):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(
                    f"{function.__qualname__} on {num_processes} processes: no answer within "
                    f"{deadlines.HANG_SECONDS:g} s"
                )
        return [pickle.loads((Path(folder) / str(p)).read_bytes()) for p in range(num_processes)]
