"""Check of how a job ends when one of its processes breaks.

The processes of the doctor's own job must stay, so each starts a process that stands for it in a
second job, with the same devices and the same launcher's store, which then breaks (``drill``).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sfed.distributed import sync
from sfed.distributed.world import World
from sfed.doctor import drill
from sfed.doctor.job import Job
from sfed.doctor.report import Result, failed, ok, warning

_MOST_SECONDS = 200.0
"""After which a process of the drill is killed: the drill's own deadline and what follows it."""
_SOON_SECONDS = 60.0
"""A job that takes longer to end after a fault is worth a look."""
_WHAT = {"error": "an error", "kill": "kill -9"}


@dataclass
class End:
    """How a process of the drill ended."""

    process: int
    code: int | None
    """Exit code, negative for a signal; None where it had to be killed."""
    seconds: float | None
    """From the fault to its end; None where it ended before."""
    said: str
    """The end of what it wrote."""


def faults(job: Job) -> Result:
    """An error and a kill -9 on the last process end all others, which name it."""
    found: dict[str, Any] = {}
    told = []
    for kind in drill.KINDS:
        ends = _drill(job.world, kind)
        found[kind] = [asdict(end) for end in ends]
        if problem := judge(kind, ends):
            return failed(*problem, **found)
        slowest = max(end.seconds or 0.0 for end in ends)
        told.append((slowest, f"after {_WHAT[kind]} all had ended in {slowest:.1f} s"))
    size = len(found[drill.KINDS[0]])
    seen = f"{'; '.join(text for _, text in told)}; process {size - 1} of {size} was named"
    if max(seconds for seconds, _ in told) > _SOON_SECONDS:
        return warning(seen, "expect as much idle time after each fault, and report it", **found)
    return ok(seen, **found)


def judge(kind: str, ends: list[End]) -> tuple[str, str] | None:
    """What is wrong with the ends of a drill, and what to do; None where nothing is."""
    broken = len(ends) - 1
    early = [end for end in ends if end.seconds is None]
    if early:
        one = early[0]
        return (
            f"process {one.process} of a second job ended before the fault with {one.code}: "
            f"{_last_line(one.said)}",
            "a GPU in exclusive mode refuses a second process: set it to the default mode for "
            "this check (nvidia-smi -c 0); otherwise see what the process wrote, in the JSON",
        )
    stuck = [str(end.process) for end in ends if end.code is None]
    if stuck:
        return (
            f"after {_WHAT[kind]} on process {broken}, process {', '.join(stuck)} did not end "
            f"within {_MOST_SECONDS:g} s",
            "a run here would hang after a fault: let the platform restart it by the heartbeat "
            "(docs, Faults), and report it with the JSON of this examination",
        )
    well = [str(end.process) for end in ends if end.code == 0]
    if well:
        return (
            f"after {_WHAT[kind]} on process {broken}, process {', '.join(well)} ended as if "
            "nothing had happened",
            "report it with the JSON of this examination",
        )
    silent = [str(end.process) for end in ends[:-1] if f"process {broken} (pid" not in end.said]
    if silent:
        return (
            f"after {_WHAT[kind]} on process {broken}, process {', '.join(silent)} did not name it",
            "the cause of a fault would have to be looked for in the logs of all nodes; report it "
            "with the JSON of this examination",
        )
    return None


def _last_line(said: str) -> str:
    return next(iter(reversed(said.strip().splitlines())), "it wrote nothing")


def _drill(world: World, kind: str) -> list[End]:
    """Run one drill; returns the ends in the order of processes. Collective."""
    world.watch.at(f"drill: {kind}", is_bounded=False)
    places = _places(world, kind)
    started = [_Watched(process, kind, place) for process, place in places.items()]
    own = [asdict(one.end()) for one in started]
    gathered = sync.gather_json(world, f"drill {kind}", own)
    return [End(**end) for ends in gathered for end in ends]


def _places(world: World, kind: str) -> dict[int, dict[str, str]]:
    """Environments of the processes that this one starts: one, or two where it is alone.

    A process of several joins through the store of this job's launcher, under a name of its own.
    """
    group = {"SFED_GROUP": f"doctor-{kind}-{os.getpid() if world.size == 1 else ''}"}
    if world.size > 1:
        # Whoever serves the store of this job goes on to do so.
        return {world.rank: {**group, "TORCHELASTIC_USE_AGENT_STORE": "True"}}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {**group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    return {
        process: {**shared, "RANK": str(process), "LOCAL_RANK": str(process)}
        for process in range(2)
    }


class _Watched:
    """A process of the drill; a thread reads what it writes."""

    def __init__(self, process: int, kind: str, place: Mapping[str, str]) -> None:
        environment = {**os.environ, **place, "SFED_HEARTBEAT_FILE": ""}
        self._process, self._at_fault = process, 0.0
        self._lines: list[str] = []
        self._child = subprocess.Popen(  # noqa: S603  (this Python and a module of ours)
            [sys.executable, "-m", "sfed.doctor.drill", kind],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._ended_at = 0.0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.strip() == drill.NOW:
                self._at_fault = time.monotonic()
            else:
                self._lines.append(line)
        self._child.wait()
        self._ended_at = time.monotonic()

    def end(self) -> End:
        """Wait for the end, which comes by itself or after a time that nobody should need."""
        self._reader.join(_MOST_SECONDS)
        code: int | None = None
        if self._reader.is_alive():
            self._child.kill()
            self._reader.join()
        else:
            code = self._child.returncode
        seconds = self._ended_at - self._at_fault if self._at_fault else None
        return End(self._process, code, seconds, "".join(self._lines)[-4000:])
