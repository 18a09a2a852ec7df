"""Scaling: whole rounds on this job's processes, weak and strong, and where their time goes.

A job measures its own number of processes; ``scaling_tables`` puts several jobs beside each other.
``measure_clients`` measures whole runs against the number of clients, on one process.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sfed.bench.measure import Clock, Spread, describe_machine
from sfed.bench.sharded import Sharded
from sfed.bench.steps import Sfed
from sfed.bench.workload import Workload, random_tokens
from sfed.config import load as config_load
from sfed.config.sections.train import DEFAULT_LOCAL_STEPS
from sfed.data import demo, splits
from sfed.data.partition import place
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.federated import evaluate, local, preflight, rounds, session
from sfed.federated.log.round_metrics import RoundLog
from sfed.methods import aggregation
from sfed.models.synthetic import twin
from sfed.observability.third_party import quieten
from sfed.storage import checkpoint
from sfed.storage.checkpoint_writer import Writer
from sfed.storage.previous_run import FINISHED_FILE
from sfed.storage.run_folder import RunFolder
from sfed.utils import command
from sfed.utils.errors import UserError
from sfed.utils.launcher import launch

REPLICA, SHARDS, SECONDARY = "replica", "zero3", "zero3 hpZ"
_LOCAL, _WAIT, _MEAN = range(3)
"""Parts of a round: local steps, waiting for other processes, the mean of A."""


@dataclass(frozen=True)
class Nodes:
    """How the processes of a job lie on machines."""

    count: int
    processes_of_each: int
    """0 where they differ."""


@dataclass(frozen=True)
class Storage:
    """The trainer on a backbone that is stored in one way."""

    name: str
    trainer: Sfed
    shards: Sharded | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let its steps run as this storage needs them."""
        if self.shards is None:
            yield
        else:
            with self.shards.in_place():
                yield


def measure_scaling(
    world: World, model: PreTrainedModel, workload: Workload, repeat: int, budget: float | None
) -> dict[str, Any]:
    """Time rounds in turns. Collective.

    Args:
        world: the processes of the job.
        model: the backbone, whole on each process.
        workload: its clients are those of each process for weak scaling, and those of all
            processes together for strong scaling.
        repeat: counted turns.
        budget: begin no further turn after so many seconds, but count at least one; None = never
            end early.

    Returns:
        A job, as ``scaling_tables`` reads it.
    """
    nodes = _nodes_of(world)
    storages = _storages(world, model, workload, nodes)
    kinds = {"weak": [workload.num_clients] * world.size}
    if workload.num_clients >= world.size:
        kinds["strong"] = [len(own) for own in place(workload.num_clients, world.size)]
    seconds = _timed(world, storages, kinds, repeat, budget)
    return {
        "processes": world.size,
        "nodes": nodes.count,
        "processes_of_a_node": nodes.processes_of_each,
        "steps_of_a_round": DEFAULT_LOCAL_STEPS,
        "machine": describe_machine(world.device),
        "rounds": [
            _described(kind, name, clients, seconds, workload.tokens_per_client)
            for kind, clients in kinds.items()
            for name in storages
        ],
    }


def _nodes_of(world: World) -> Nodes:
    """Count the machines, which hold ranges of processes. Collective."""
    here = launch()
    told = sync.gather_json(world, "nodes", [here.local_rank, here.local_size])
    sizes = [size for local_rank, size in told if local_rank == 0]
    return Nodes(len(sizes), sizes[0] if len(set(sizes)) == 1 else 0)


def _storages(
    world: World, model: PreTrainedModel, workload: Workload, nodes: Nodes
) -> dict[str, Storage]:
    """The ways to store the backbone that differ among these processes. Collective."""
    ids = random_tokens(model.config, workload).to(world.device)
    replica = Sfed(twin(model), workload, ids, clients_per_pass=workload.num_clients)
    found = [Storage(REPLICA, replica)]
    if world.size > 1:
        shards = Sharded(model, workload, ids)
        found.append(Storage(SHARDS, shards.contestant, shards))
    if nodes.count > 1 and nodes.processes_of_each > 1:
        secondary = Sharded(model, workload, ids, nodes.processes_of_each)
        found.append(Storage(SECONDARY, secondary.contestant, secondary))
    return {storage.name: storage for storage in found}


Seconds = dict[tuple[str, str], list[torch.Tensor]]
"""By kind and storage: for each turn, (processes, 3) seconds of the parts of a round."""


def _timed(
    world: World,
    storages: Mapping[str, Storage],
    kinds: Mapping[str, list[int]],
    repeat: int,
    budget: float | None,
) -> Seconds:
    """Make rounds in turns; the first turn warms up. Collective."""
    seconds: Seconds = {(kind, name): [] for kind in kinds for name in storages}
    start = time.monotonic()
    for turn in range(repeat + 1):
        is_late = budget is not None and time.monotonic() - start > budget
        # Process 0 decides, since the clocks of the others may be ahead of it or behind.
        if turn > 1 and sync.gather_json(world, "a turn", is_late)[0]:
            break
        for kind, clients in kinds.items():
            for name, storage in storages.items():
                with storage.in_place():
                    mine = _round(world, storage.trainer, clients)
                parts = torch.stack(distributed.all_gather_rows(world, mine))
                if turn:
                    seconds[kind, name].append(parts)
    return seconds


def _round(world: World, trainer: Sfed, clients: list[int]) -> torch.Tensor:
    """One round; returns the (3,) seconds of its parts on this process. Collective."""
    clock, own, total = Clock(world.device), clients[world.rank], sum(clients)
    weights = [1.0 / total] * own + [0.0] * (trainer.workload.num_clients - own)
    trainer.enter_first(own)
    _meet(world)
    moments = [clock.read()]
    for _ in range(DEFAULT_LOCAL_STEPS):
        trainer.step()
    trainer.leave()
    moments.append(clock.read())
    _meet(world)
    moments.append(clock.read())
    aggregation.share(world, trainer.clients, ("A",), weights)
    moments.append(clock.read())
    return torch.tensor(moments, dtype=torch.float64).diff()


def _meet(world: World) -> None:
    """Wait for all processes, on the link on which the mean is taken."""
    distributed.all_reduce_sum(torch.zeros(1, device=world.device))
    Clock(world.device).read()


def _described(
    kind: str, name: str, clients: list[int], seconds: Seconds, tokens_per_client: int
) -> dict[str, Any]:
    """One row of the table: of a kind and a storage."""
    turns = seconds[kind, name]
    whole = [float(parts.sum(dim=1).mean()) for parts in turns]
    rate = DEFAULT_LOCAL_STEPS * sum(clients) * tokens_per_client / len(clients)
    return {
        "kind": kind,
        "storage": name,
        "clients": sum(clients),
        "most_clients_of_a_process": max(clients),
        "seconds": Spread.of(whole).as_json(),
        "tokens_per_second_and_process": Spread.of([rate / one for one in whole]).as_json(),
        "waiting_share": _share(turns, whole, _WAIT),
        "mean_share": _share(turns, whole, _MEAN),
        "gather_share": None if name == REPLICA else _gathers(seconds, kind, name, whole),
        "samples_seconds": [parts.tolist() for parts in turns],
    }


def _share(turns: list[torch.Tensor], whole: list[float], part: int) -> dict[str, float]:
    """Share of a part in the rounds, mean over processes."""
    pairs = zip(turns, whole, strict=True)
    return Spread.of([float(parts[:, part].mean()) / one for parts, one in pairs]).as_json()


def _gathers(seconds: Seconds, kind: str, name: str, whole: list[float]) -> dict[str, float]:
    """How much longer the local steps take than on a replica, as a share of the round."""
    turns = zip(seconds[kind, name], seconds[kind, REPLICA], whole, strict=True)
    longer = (
        float(parts[:, _LOCAL].mean() - replica[:, _LOCAL].mean()) / one
        for parts, replica, one in turns
    )
    return Spread.of(list(longer)).as_json()


# --- whole runs against the number of clients -----------------------------------------------------

_ROWS_OF_A_CLIENT = 4
"""Three to train on and one that is held out."""


class Parts:
    """CPU seconds of the parts of a run, each without those within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._of_thread = threading.local()

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the CPU seconds of this thread within to a part, and to no part around it."""
        inner: list[float] = getattr(self._of_thread, "inner", [])
        self._of_thread.inner = inner
        started = time.thread_time()
        inner.append(0.0)
        try:
            yield
        finally:
            used, within = time.thread_time() - started, inner.pop()
            self.seconds[part] = self.seconds.get(part, 0.0) + used - within
            if inner:
                inner[-1] += used

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count each call of a function of a module or class as a part, from now on."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            with self.of(part):
                return function(*arguments, **named)

        setattr(owner, name, counted)


def measure_clients(
    counts: Sequence[int], clients_per_pass: int, cohort: int | None
) -> dict[str, Any]:
    """Measure runs of the demo's model with these numbers of clients, each in processes of its own.

    A run is one round of one step of every client, with an evaluation before and after it, a
    checkpoint and the adapters. It is then started again twice: as if it had been killed while it
    wrote the adapters, and when there is nothing to do.

    Args:
        counts: numbers of clients, N.
        clients_per_pass: most clients that share a pass.
        cohort: number of clients of the round, and of those that are evaluated; None = all.

    Returns:
        The results, as ``scaling_tables`` reads them.

    Raises:
        UserError: where a run ends with an error.
    """
    points = []
    for num_clients in counts:
        with tempfile.TemporaryDirectory(prefix="sfed-bench-") as folder:
            settings = _settings_of(Path(folder), num_clients, clients_per_pass)
            if cohort is not None:
                settings["federated"]["clients_per_round"] = min(cohort, num_clients)
                settings["evaluation"] = {"clients": min(cohort, num_clients)}
            started = [_in_a_process(settings, start) for start in _STARTS]
            points.append(
                {"clients": num_clients, "starts": dict(zip(_STARTS, started, strict=True))}
            )
    machine = describe_machine(torch.device("cpu")) | {"processes": 1, "threads": 1}
    return {"machine": machine, "cohort": cohort, "points": points}


def _settings_of(folder: Path, num_clients: int, clients_per_pass: int) -> dict[str, Any]:
    """Write the rows of the demo for so many clients; returns the settings of the run."""
    per_kind = -(-_ROWS_OF_A_CLIENT * num_clients // len(demo.KINDS))
    rows = demo.rows("train", per_kind, 0)[: _ROWS_OF_A_CLIENT * num_clients]
    lines = (
        json.dumps({"prompt": row["question"], "completion": row["answer"]}) + "\n" for row in rows
    )
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "model": {"name": "demo"},
        "data": {
            "task": "text",
            "train_files": str(folder / "rows.jsonl"),
            "eval_fraction": 1 / _ROWS_OF_A_CLIENT,
            "max_tokens": 64,
        },
        "federated": {
            "num_clients": num_clients,
            "num_rounds": 1,
            "clients_per_pass": clients_per_pass,
        },
        "train": {"local_steps": 1, "batch_size": 2},
        "output": {"dir": str(folder), "name": "run"},
    }


_STARTS = ("first", "again", "nothing to do")


def _in_a_process(settings: dict[str, Any], start: str) -> dict[str, Any]:
    """Start a run in a new process; returns what it measured of itself."""
    spawning = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, spawning, initializer=command.quieten_imports) as pool:
            return pool.submit(_start, settings, start).result()
    except (BrokenProcessPool, UserError) as error:
        told = error if isinstance(error, UserError) else "it ended without a word"
        clients = settings["federated"]["num_clients"]
        raise UserError(f"--scaling-clients: the run of {clients} clients failed: {told}") from None


def _start(settings: dict[str, Any], start: str) -> dict[str, Any]:
    """One start of a run, in a process of its own; returns what it took."""
    config, parts = config_load.validate(settings), Parts()
    folder = Path(config.output.dir) / config.run_name
    torch.set_num_threads(1)  # the seconds of a part are those of its thread
    if start == "again":
        (folder / FINISHED_FILE).unlink()
    _watch_all(parts)
    began = time.process_time()
    with parts.of("checking the files"):
        preflight.check(config)
        is_complete = preflight.look_back(config) is not None
    if not is_complete:
        session.run_session(
            config, on_start=lambda world, _stop: quieten(world.rank, world.device.type)
        )
    total = time.process_time() - began
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "cpu_seconds": total,
        "parts": {**parts.seconds, "the rest": total - math.fsum(parts.seconds.values())},
        "peak_bytes": _peak_bytes(),
        "did_nothing": is_complete,
        "checkpoint_files": sum(path.parent.parent.name == "checkpoints" for path in files),
        "adapter_files": sum(path.parent.parent.name == "adapters" for path in files),
    }


def _watch_all(parts: Parts) -> None:
    watched: list[tuple[Any, str, str]] = [
        (RunFolder, "look", "looking at the run folder"),
        (RunFolder, "make", "making the run folder"),
        (session, "build", "loading"),
        (splits, "load", "reading"),
        (rounds, "prepare", "drawing A"),
        (checkpoint, "load", "resuming"),
        (local, "train", "steps"),
        (rounds, "_compare_clients", "similarity"),
        (rounds, "_average", "mean"),
        (evaluate, "evaluate", "evaluation"),
        (RoundLog, "end", "events"),
        (Writer, "save", "checkpoint"),
        (Writer, "_write", "checkpoint"),
        (Writer, "_complete", "checkpoint"),
        (session, "_write_adapters", "export"),
        (session, "_close", "closing table"),
    ]
    for owner, name, part in watched:
        parts.watch(owner, name, part)


def _peak_bytes() -> int:
    """Most memory of this process so far.

    ru_maxrss is that of the process which started it, where that was larger.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
