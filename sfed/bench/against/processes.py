"""A contestant in a process of its own, so that peak memory is that of one contestant."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from sfed.bench.against.hf_trainer import TrainerRounds
from sfed.bench.against.job import Job
from sfed.bench.against.lean import Lean
from sfed.bench.against.material import Material, material
from sfed.bench.against.rounds import Parts, Rounds
from sfed.bench.against.sfed_rounds import SfedRounds
from sfed.distributed import world as distributed
from sfed.observability.third_party import quieten
from sfed.utils import command
from sfed.utils.errors import UserError
from sfed.utils.text import duration

_DEADLINE_SECONDS = 600.0
_ANSWER_SECONDS = 3600.0
"""For a contestant to be made, or for one of its rounds."""
OTHERS: dict[str, tuple[str, Callable[[Material], Rounds]]] = {
    "lean": ("lean loop", Lean),
    "trainer": ("HF Trainer + PEFT", TrainerRounds),
}
"""What the trainer is measured against: the name in tables, and how it is made."""
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Turn:
    """One round of a contestant."""

    parts: Parts
    cpu_seconds: float
    """Of all threads of its process: what a busy machine changes least."""

    @property
    def seconds(self) -> float:
        """Of the whole round."""
        return sum(self.parts.values())


class Process:
    """A process with one contestant, which begins to be made at once."""

    def __init__(self, job: Job, name: str) -> None:
        self._name = name
        spawning = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, spawning, initializer=command.quieten_imports)
        self._made = self._pool.submit(_Here.make, job, name, torch.get_num_threads())

    def ready(self) -> None:
        """Wait until its contestant is made."""
        self._result(self._made)

    def round(self) -> Turn:
        """Let it make a round."""
        return self._result(self._pool.submit(_Here.round))

    def told(self) -> dict[str, Any]:
        """What it says of itself at the end: about, losses, peak_bytes, imported_bytes."""
        return self._result(self._pool.submit(_Here.told))

    def _result(self, coming: Future[_Value]) -> _Value:
        try:
            return coming.result(_ANSWER_SECONDS)
        except FutureTimeoutError:
            told = f"has not answered for {duration(_ANSWER_SECONDS)}"
        except BrokenProcessPool:
            told = "ended; the system does that where memory is short"
        except (MemoryError, torch.OutOfMemoryError):
            told = "has too little memory"
        raise UserError(
            f"--against: the process of {self._name!r} {told}: lower --clients, --rows, --tokens "
            "or --rank"
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for child in multiprocessing.active_children():  # it may compute for hours
                child.kill()
        self._pool.shutdown(cancel_futures=True)


class _Here:
    """The contestant of this process."""

    _rounds: Rounds
    _imported_bytes: int

    @classmethod
    def make(cls, job: Job, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        world = distributed.start(_DEADLINE_SECONDS)
        atexit.register(distributed.stop, world)
        quieten(world.rank, world.device.type)
        cls._imported_bytes = _peak_bytes_of_process()
        made = material(job, world)
        cls._rounds = (
            OTHERS[name][1](made)
            if name in OTHERS
            else SfedRounds(made, name.removeprefix("sfed "))
        )
        # The bench imports more than such a loop would, and Trainer collects garbage each time.
        gc.collect()
        gc.freeze()

    @classmethod
    def round(cls) -> Turn:
        start = time.process_time()
        parts = cls._rounds.round()
        return Turn(parts, time.process_time() - start)

    @classmethod
    def told(cls) -> dict[str, Any]:
        device = cls._rounds.material.world.device
        on_host = device.type == "cpu"
        peak = _peak_bytes_of_process() if on_host else torch.cuda.max_memory_allocated(device)
        return {
            "about": cls._rounds.about,
            "losses": cls._rounds.losses,
            "peak_bytes": peak,
            "imported_bytes": cls._imported_bytes if on_host else 0,
        }


def _peak_bytes_of_process() -> int:
    """The most memory of this process that was resident; Linux, else 0: nobody counts it.

    Not getrusage: its figure includes the parent, up to the moment at which this process began.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
