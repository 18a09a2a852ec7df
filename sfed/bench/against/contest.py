"""Rounds of the trainer and of loops that people write, in turns.

Each contestant has a process of its own. They make one round each while the others wait, so that a
busy minute of the machine meets all alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfed.bench.against.job import Job
from sfed.bench.against.processes import OTHERS, Process, Turn
from sfed.bench.measure import Spread, describe_machine, interleaved, ratios, shape_of
from sfed.methods import aggregation
from sfed.observability.third_party import quieten
from sfed.utils.errors import UserError

# Losses of a round that are further apart, relatively, are not of the same work.
_SAME = {"fp32": 1e-3, "bf16": 5e-2}


@dataclass(frozen=True)
class Contest:
    """What was asked for."""

    job: Job
    against: tuple[str, ...]
    """Some of ``OTHERS``."""
    passes: tuple[str, ...]
    """The trainer's federated.clients_per_pass: auto, all or numbers."""
    repeat: int
    budget_seconds: float | None


def run(contest: Contest) -> dict[str, Any]:
    """Measure; returns all results, as they go into JSON.

    Raises:
        UserError: where a contestant cannot be made, or does not do the same work.
    """
    job, device = contest.job, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quieten(0, device.type)
    asked = dataclasses.asdict(job)
    folders = {name: str(value) for name, value in asked.items() if isinstance(value, Path)}
    return {
        "machine": {**describe_machine(device), "processes": 1},
        "configuration": {
            **asked,
            **folders,
            "shape": shape_of(job.shape),
            "a_bytes": aggregation.message_bytes(job.layout, ("A",)),
            "about_rows": job.about_rows,
        },
        "against": _measured(contest),
        "notes": [],
    }


def _measured(contest: Contest) -> dict[str, Any]:
    """The rounds of all contestants."""
    names = [*contest.against, *(f"sfed {one}" for one in contest.passes)]
    with ExitStack() as stack:
        processes = {name: stack.enter_context(Process(contest.job, name)) for name in names}
        for process in processes.values():
            process.ready()
        turns: dict[str, list[Turn]] = {name: [] for name in names}

        def task_of(name: str) -> Callable[[], float]:
            def task() -> float:
                turns[name].append(processes[name].round())
                return turns[name][-1].seconds

            return task

        tasks = {name: task_of(name) for name in names}
        interleaved(tasks, contest.repeat, contest.budget_seconds)
        told = {name: process.told() for name, process in processes.items()}
    losses = {name: one.pop("losses") for name, one in told.items()}
    apart = require_same_losses(losses, _SAME[contest.job.dtype])
    counted = {name: some[1:] for name, some in turns.items()}  # the first turn warms up
    described = [
        {
            "key": name,
            "name": OTHERS[name][0] if name in OTHERS else name,
            **_described(counted[name]),
            "beside": {
                other: _beside(counted[other], counted[name])
                for other in contest.against
                if other != name
            },
            **told[name],
        }
        for name in names
    ]
    return {
        "steps_of_a_round": contest.job.steps,
        "losses_apart": apart,
        "contestants": described,
    }


def _described(turns: Sequence[Turn]) -> dict[str, Any]:
    """Seconds of one contestant."""
    whole, cpu = [turn.seconds for turn in turns], [turn.cpu_seconds for turn in turns]
    return {
        "seconds": Spread.of(whole).as_json(),
        "cpu_seconds": Spread.of(cpu).as_json(),
        "parts": {
            part: Spread.of([turn.parts[part] for turn in turns]).as_json()
            for part in turns[0].parts
        },
        "samples_seconds": whole,
        "samples_cpu_seconds": cpu,
    }


def _beside(others: Sequence[Turn], own: Sequence[Turn]) -> dict[str, Any]:
    """How many times as fast as another, turn by turn: by seconds, and by CPU seconds."""

    def ratio(read: Callable[[Turn], float]) -> dict[str, float]:
        return ratios(list(map(read, others)), list(map(read, own))).as_json()

    return {
        "as_fast_as": ratio(lambda turn: turn.seconds),
        "as_fast_as_by_cpu": ratio(lambda turn: turn.cpu_seconds),
    }


def require_same_losses(losses: Mapping[str, Sequence[Sequence[float]]], allowed: float) -> float:
    """Compare the losses of all clients and rounds with those of the first contestant.

    Args:
        losses: by contestant, round and client.
        allowed: relative difference.

    Returns:
        The largest relative difference.

    Raises:
        UserError: where one is larger than allowed, or a loss is not finite.
    """
    first, *others = losses
    flat = {name: torch.tensor(found, dtype=torch.float64) for name, found in losses.items()}
    apart = 0.0
    for name in others:
        found = float(((flat[name] - flat[first]) / flat[first]).abs().max())
        if not found <= allowed:
            raise UserError(
                f"--against: the losses of {name!r} and {first!r} differ by {found:.2g} of "
                f"themselves, and {allowed:g} is allowed; they do not do the same work on this "
                "model, so their times are not to be compared"
            )
        apart = max(apart, found)
    return apart
