"""One examination: the checks as a table, and how they are made one after another.

Every process makes every check, since most are collective; process 0 prints. An error that all
processes meet is the result of its check, and the next one follows. A process that breaks ends the
examination as it would end a run: the others find out which one it was and end too.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sfed.bench.measure import describe_machine
from sfed.distributed import shutdown, sync
from sfed.distributed import world as distributed
from sfed.distributed.diagnosis import GO_ON
from sfed.distributed.shutdown import StoppedEarlyError, StopRequest
from sfed.distributed.world import World
from sfed.doctor import job as jobs
from sfed.doctor import links, machines, trainings
from sfed.doctor.benchmarks import BENCHMARKS
from sfed.doctor.faults import faults
from sfed.doctor.job import Job
from sfed.doctor.memory import memory
from sfed.doctor.report import Report, Result, failed
from sfed.observability.third_party import quieten
from sfed.utils.errors import DivergedError, MissingProcessError, TrainingFailedError, UserError
from sfed.utils.launcher import launch
from sfed.utils.text import one_line

Check = Callable[[Job], Result]

_LOG_LEVEL = "SFED_LOG_LEVEL"
DEADLINE_SECONDS = 300.0
"""Longest wait for another process."""
_RENDEZVOUS = (
    "Every node runs the same command, with the same --nnodes and the same MASTER_ADDR and "
    "MASTER_PORT; the nodes reach each other on all ports (firewall, network interface)."
)

# In this order: what the next ones stand on comes first. ZeRO-3 changes functions of torch for the
# whole process, so what is measured comes before it.
BEFORE: Mapping[str, Check] = {
    "processes": machines.processes,
    "versions": machines.software,
    "devices": machines.devices,
    "host": machines.host,
    "folder": machines.folder,
    "speed": machines.speed,
    "collectives": links.collectives,
    "ring": links.ring,
    "numbers": trainings.numbers,
    "learning": trainings.learning,
    "memory": memory,
}
AFTER: Mapping[str, Check] = {"zero3": trainings.zero3, "faults": faults}


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    parent: Path
    """Folder in which the runs of the examination are made, and removed."""
    json: Path | None
    only: tuple[str, ...]
    """Names of checks; empty = all."""
    benchmarks: bool


def chosen(options: Options) -> dict[str, Check]:
    """Return the checks that were asked for, in their order.

    Raises:
        UserError: where there is no check of such a name.
    """
    every: dict[str, Check] = {**BEFORE, **BENCHMARKS, **AFTER}
    unknown = [name for name in options.only if name not in every]
    if unknown:
        raise UserError(
            f"--only {','.join(unknown)}: no such check; the checks are {', '.join(every)}"
        )
    if options.only:
        return {name: check for name, check in every.items() if name in options.only}
    return every if options.benchmarks else {**BEFORE, **AFTER}


def run(options: Options, arguments: Sequence[str]) -> int:
    """Make an examination. Collective under a launcher.

    Args:
        options: what was asked for.
        arguments: of the command, for the record.

    Returns:
        The exit code: 0, or 1 where a check failed.

    Raises:
        SystemExit: with a text, where another process broke or the job was asked to stop.
        UserError: on every process, for wrong arguments.
    """
    checks = chosen(options)
    report = Report(speaks=launch().rank == 0, command=arguments)
    world = _meet()
    end = ""
    try:
        with shutdown.ending(world):
            _examine(world, options, checks, report)
            sync.leave_store_last(world)
    except StoppedEarlyError:
        end = "asked to stop (SIGTERM)"
    except MissingProcessError as failure:
        end = _without(str(failure), GO_ON)
    except UserError:
        distributed.abandon(world)
        raise
    except BaseException as error:
        report.break_off(f"process {world.rank}: {type(error).__name__}: {one_line(error)}")
        _finish(report, options)
        distributed.abandon(world)
        raise
    if end:
        report.break_off(end)
        _finish(report, options)
        distributed.abandon(world)
        sys.exit(f"sfed doctor: {end}")
    _finish(report, options)
    distributed.stop(world)
    return int(report.counts["failed"] > 0)


def _meet() -> World:
    try:
        return distributed.start(DEADLINE_SECONDS)
    except MissingProcessError as failure:
        sys.exit(f"sfed doctor: {failure}\nWhat to do: {_RENDEZVOUS}")


def _examine(world: World, options: Options, checks: Mapping[str, Check], report: Report) -> None:
    """Make all checks. Collective."""
    os.environ.setdefault(_LOG_LEVEL, "warning")  # what the runs say is not of interest here
    quieten(world.rank, world.device.type)
    stop = StopRequest(world)
    stop.listen()
    stop.training_begins(in_step=False)  # from here on a request is answered between checks
    report.facts["machine"] = {**describe_machine(world.device), "processes": world.size}
    world.watch.at("making a folder")
    folder = jobs.make_folder(world, options.parent)
    try:
        job = Job(world, stop, folder)
        for name, check in checks.items():
            world.watch.at(f"check {name}")
            report.begin(name)
            report.end(_result_of(job, name, check))
            report.write(options.json)
            if world.watch.is_asked_to_stop:
                raise StoppedEarlyError(1)
    finally:
        if world.is_main:
            folder.remove()


def _result_of(job: Job, name: str, check: Check) -> Result:
    """Make one check; an error that all processes meet is its result. Collective."""
    try:
        with sync.raise_everywhere(job.world, f"check {name}"):
            return _made(job, check)
    except (UserError, DivergedError, TrainingFailedError) as error:
        job.world.watch.mistake_was_met()
        return failed(str(error), "repair what the message names, then run the doctor again")


def _made(job: Job, check: Check) -> Result:
    """Make a check and free what it needed.

    Raises:
        UserError: where the device has too little memory.
    """
    try:
        return check(job)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{job.world.device} of process {job.world.rank} has too little memory, which other "
            f"programs may hold: {one_line(error)}"
        ) from None
    finally:
        if job.world.device.type == "cuda":
            gc.collect()  # models refer to themselves in circles
            torch.cuda.empty_cache()


def _finish(report: Report, options: Options) -> None:
    """Say and write what was found."""
    report.summarise()
    report.write(options.json)


def _without(text: str, last: str) -> str:
    """A text without a line that does not apply here."""
    return "\n".join(line for line in text.splitlines() if line.strip() != last)
