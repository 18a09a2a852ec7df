"""``--against``: rounds of the trainer beside loops that people write, each in its own process.

A process of its own makes peak memory that of one contestant. The processes work in turns, one
round at a time while the others wait, so that a busy minute of the machine meets all alike.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from sfed.bench.measure import Spread, describe_machine, interleaved, ratios, shape_of
from sfed.bench.peft_baseline import TrainerRounds
from sfed.bench.rounds import (
    LONGEST_SHARE,
    Job,
    Lean,
    Material,
    Parts,
    Rounds,
    SfedRounds,
    material,
)
from sfed.config.schema import DEFAULT_LOCAL_STEPS
from sfed.distributed import world as distributed
from sfed.methods import aggregation
from sfed.observability.third_party import quieten
from sfed.utils.errors import UserError

_DEADLINE_SECONDS = 600.0
_SECONDS_TO_END = 20.0
# Losses of a round that are further apart, relatively, are not of the same work.
_SAME = {"fp32": 1e-3, "bf16": 5e-2}

OTHERS: dict[str, tuple[str, Callable[[Material], Rounds]]] = {
    "lean": ("lean loop", Lean),
    "trainer": ("HF Trainer + PEFT", TrainerRounds),
}
"""What the trainer is measured against: the name in tables, and how it is made."""


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


@dataclass(frozen=True)
class Turn:
    """One round of a contestant."""

    parts: Parts
    cpu_seconds: float
    """Of all threads of its process: what a busy machine changes least."""


def job_of(given: Mapping[str, Any]) -> Job:
    """The job of the arguments of a command.

    Raises:
        UserError: where rows may be longer than the model reads.
    """
    default = "bf16" if torch.cuda.is_available() else "fp32"
    targets = given["targets"]
    job = Job(
        model=given["model"],
        model_folder=given["model_config"],
        num_layers=given["layers"],
        data=given["data"],
        task=given["task"] or "text",
        dtype=given["dtype"] or default,
        num_clients=given["clients"],
        rows=given["rows"],
        tokens=given["tokens"],
        steps=given["steps"] or DEFAULT_LOCAL_STEPS,
        lora_rank=given["rank"],
        target_modules=targets if targets == "all-linear" else tuple(targets.split(",")),
    )
    most = int(getattr(job.shape, "max_position_embeddings", 2**31))
    longest = job.tokens if job.data is not None else LONGEST_SHARE * job.tokens
    if longest > most:
        raise UserError(
            f"--tokens {job.tokens}: rows may have {longest} tokens and this model reads {most}; "
            f"give at most {most * job.tokens // longest}"
        )
    return job


def run(contest: Contest) -> dict[str, Any]:
    """Measure; returns all results, as they go into JSON.

    Raises:
        UserError: where a contestant cannot be made, or does not do the same work.
    """
    job, device = contest.job, torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    """The rounds of all contestants.

    Raises:
        UserError: where a contestant cannot be made, or does not do the same work.
    """
    names = [*contest.against, *(f"sfed {one}" for one in contest.passes)]
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(contest.job, name)) for name in names}
        for worker in workers.values():
            worker.ready()
        turns: dict[str, list[Turn]] = {name: [] for name in names}

        def task_of(name: str) -> Callable[[], float]:
            def task() -> float:
                turn: Turn = workers[name].ask("round")
                turns[name].append(turn)
                return sum(turn.parts.values())

            return task

        tasks = {name: task_of(name) for name in names}
        samples = interleaved(tasks, contest.repeat, contest.budget_seconds)
        told = {name: worker.ask("end") for name, worker in workers.items()}
    losses = {name: one.pop("losses") for name, one in told.items()}
    apart = require_same_losses(losses, _SAME[contest.job.dtype])
    counted = {name: some[1:] for name, some in turns.items()}  # the first turn warms up
    return {
        "steps_of_a_round": contest.job.steps,
        "losses_apart": apart,
        "contestants": [
            {
                "key": name,
                "name": OTHERS[name][0] if name in OTHERS else name,
                "as_fast_as": {
                    other: ratios(samples[other], samples[name]).as_json()
                    for other in contest.against
                    if other != name
                },
                **_described(counted[name]),
                **told[name],
            }
            for name in names
        ],
    }


def _described(turns: Sequence[Turn]) -> dict[str, Any]:
    """Seconds of one contestant."""
    whole = [sum(turn.parts.values()) for turn in turns]
    return {
        "seconds": Spread.of(whole).as_json(),
        "cpu_seconds": Spread.of([turn.cpu_seconds for turn in turns]).as_json(),
        "parts": {
            part: Spread.of([turn.parts[part] for turn in turns]).as_json()
            for part in turns[0].parts
        },
        "samples_seconds": whole,
        "samples_cpu_seconds": [turn.cpu_seconds for turn in turns],
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


class Worker:
    """A process with one contestant."""

    def __init__(self, job: Job, name: str) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        arguments = (there, job, name, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        there.close()

    def ready(self) -> None:
        """Wait until it has made its contestant."""
        self._answer()

    def ask(self, what: str) -> Any:
        """Let it do something and wait for the answer."""
        self._here.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._here.recv()
        except EOFError:
            self._process.join(_SECONDS_TO_END)
            raise UserError(
                f"--against: the process of {self._name!r} ended with exit code "
                f"{self._process.exitcode}; -9 is what the system does where memory is short: "
                "lower --clients, --rows or --tokens"
            ) from None
        if kind == "mistake":
            raise UserError(value)
        return value

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._here.close()  # then it ends by itself
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.terminate()


def _serve(pipe: Connection, job: Job, name: str, threads: int) -> None:
    """Make a contestant and do what is asked, in a process of its own."""
    torch.set_num_threads(threads)
    world = distributed.start(_DEADLINE_SECONDS)
    quieten(world.rank, world.device.type)
    imported = _peak_bytes_of_process()
    try:
        rounds = _made(material(job, world), name)
        # The bench imports more than such a loop would, and Trainer collects garbage each time.
        gc.collect()
        gc.freeze()
        pipe.send(("done", None))
        while pipe.recv() == "round":
            start = time.process_time()
            parts = rounds.round()
            pipe.send(("done", Turn(parts, time.process_time() - start)))
        pipe.send(
            (
                "done",
                {
                    "about": rounds.about,
                    "losses": rounds.losses,
                    "peak_bytes": _peak_bytes(world.device),
                    "imported_bytes": imported if world.device.type == "cpu" else 0,
                },
            )
        )
    except UserError as mistake:
        pipe.send(("mistake", str(mistake)))
    except (MemoryError, torch.OutOfMemoryError):
        told = f"{name!r} has too little memory: lower --clients, --rows, --tokens or --rank"
        pipe.send(("mistake", f"--against: {told}"))
    except EOFError:
        pass  # nobody asks any more
    finally:
        distributed.stop(world)


def _made(material_: Material, name: str) -> Rounds:
    if name in OTHERS:
        return OTHERS[name][1](material_)
    return SfedRounds(material_, name.removeprefix("sfed "))


def _peak_bytes(device: torch.device) -> int:
    """Peak memory of this process: by torch's allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _peak_bytes_of_process()


def _peak_bytes_of_process() -> int:
    """The most memory of this process that was resident; Linux, else 0: nobody counts it.

    Not getrusage: its figure includes the parent, up to the moment at which this process began.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
