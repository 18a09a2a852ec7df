"""One training session from a configuration to adapters on disk: start, build, train, export."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfed.config.schema import Config
from sfed.distributed import consistency, devices, sync
from sfed.distributed import world as distributed
from sfed.distributed.shutdown import StoppedEarlyError, StopRequest, ending
from sfed.distributed.world import World
from sfed.federated import fingerprints, preflight, rounds
from sfed.federated.build import build
from sfed.federated.context import Run
from sfed.federated.evaluate import score_names
from sfed.federated.export import export_adapters, set_aside_former
from sfed.federated.log.header import describe_run
from sfed.federated.log.round_metrics import RoundLog
from sfed.observability import metrics
from sfed.observability.console import Console
from sfed.observability.trackers import MetricLogger
from sfed.storage import checkpoint, origin, resume
from sfed.storage.card_facts import privacy_of
from sfed.storage.checkpoint import State
from sfed.storage.checkpoint_folder import CheckpointRef
from sfed.storage.checkpoint_writer import RunIdentity, Writer
from sfed.storage.run_folder import RunFolder
from sfed.storage.run_record import METRICS_FILE, RunRecord, open_run, read_rounds, was_evaluated
from sfed.utils import garbage

OnStart = Callable[[World, StopRequest], None]
"""What a command does at the start of a session, such as to listen to signals."""


@dataclass(frozen=True)
class SessionEnd:
    """How a session ended."""

    folder: Path
    """The run folder."""
    is_finished: bool = False
    """Whether all rounds are done and the adapters are written; False after a request to stop."""
    was_asked_here: bool = False
    """Whether the request to stop came to this process, and not to another one."""


def fit(config: Config) -> RunRecord:
    """Train a configuration to its end and read the run folder that it made. Collective.

    Every process of the launcher calls it with the same configuration: one process in a plain
    script, all of them under torchrun. A run that was stopped is resumed, as ``output.resume``
    says. It raises and never calls ``sys.exit``, and it installs neither signal handlers nor log
    handlers: what a run says goes to the logger ``sfed``. Thread counts, the precision of matrix
    products, random state and environment variables are afterwards what they were.

    With several processes a watchdog ends a process that makes no progress for longer than
    ``federated.deadline_seconds``, because no exception reaches a call that never returns.

    Args:
        config: the run, such as from ``load_config``.

    Returns:
        The record of the run folder; the same on every process.

    Raises:
        ConfigError: on every process, for errors in the configuration.
        DataError: on every process, for errors in the data.
        CheckpointError: on every process, where the run in the folder cannot be resumed.
        UserError: on every process, for what is none of these, such as a model that is not found.
        TrainingFailedError: where the losses or gradients of clients keep being non-finite, or a
            client has made fewer or more local steps than its round has.
        DivergedError: where processes hold different values of what has to be the same.
        MissingProcessError: where another process ended or did not come before the deadline.
    """
    preflight.check(config)
    with _unchanged_process():
        end = run_session(config)
    return open_run(end.folder)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restore what a session changes in the process of its caller."""
    environment, frozen = dict(os.environ), gc.get_freeze_count()
    # DeepSpeed, which other libraries import too, otherwise announces its own guess.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        with devices.unchanged_arithmetic():
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if frozen:  # and the rounds have let go of all
            gc.collect()
            gc.freeze()


def run_session(
    config: Config,
    *,
    one_of_many: bool = False,
    import_seconds: float = 0.0,
    on_start: OnStart | None = None,
) -> SessionEnd:
    """Run a configuration to its end. Collective: every process of the launcher calls it.

    Args:
        config: the run.
        one_of_many: leave out the closing table, because another one holds all runs.
        import_seconds: what the imports of this process took, for the record.
        on_start: called once the processes have met, before anything is loaded.

    Returns:
        How it ended.

    Raises:
        UserError, TrainingFailedError, DivergedError, MissingProcessError: as of ``fit``.
    """
    config = origin.adopted(config)
    world = distributed.start(config.federated.deadline_seconds)
    stop = StopRequest(world)
    console = Console(is_main=world.is_main, import_seconds=import_seconds)
    folder = RunFolder(config, one_of_many=one_of_many)
    world.watch.debug_folder = folder.path / "debug"
    try:
        with ending(world):
            if on_start is not None:
                on_start(world, stop)
            finished = _build_and_train(config, world, folder, console, stop)
            sync.leave_store_last(world)
    except StoppedEarlyError:
        distributed.abandon(world)
        console.say("stopped as asked, before training began")
        return SessionEnd(folder.path, was_asked_here=True)
    except BaseException:
        distributed.abandon(world)
        raise
    finally:
        console.end_rounds()
        folder.close()
        distributed.stop(world)
    return SessionEnd(folder.path, finished, stop.came_here)


def train_among(world: World, config: Config, stop: StopRequest) -> RunRecord | None:
    """Train a configuration among processes that have met already. Collective.

    Whoever calls it started the processes and ends them, so that a job may train several
    configurations; a failure is to be met within ``shutdown.ending``.

    Args:
        world: the processes.
        config: the run.
        stop: of the job.

    Returns:
        The record of the run folder; None where somebody asked to stop before the end.

    Raises:
        UserError, TrainingFailedError, DivergedError, MissingProcessError: as of ``fit``.
    """
    preflight.check(config, world.size)
    config = origin.adopted(config)
    console = Console(is_main=world.is_main)
    folder = RunFolder(config, one_of_many=True)
    try:
        finished = _build_and_train(config, world, folder, console, stop)
        sync.barrier(world, "the end of a run")  # process 0 has written what all read now
    finally:
        console.end_rounds()
        folder.close()
    return open_run(folder.path) if finished else None


def _build_and_train(
    config: Config, world: World, folder: RunFolder, console: Console, stop: StopRequest
) -> bool:
    """Find what there is of the run, build it and train it; returns whether all rounds are done."""
    start = fingerprints.at_start(config)
    consistency.require_same(world, "configuration and versions", start)
    found, num_clients = folder.look(world, console)
    run = build(config, world, num_clients, console, found)
    finished = _train_and_export(run, found, folder, console, stop)
    if finished and not folder.one_of_many:
        _close(run, folder.path, console)
    return finished


def _train_and_export(
    run: Run, found: CheckpointRef | None, folder: RunFolder, console: Console, stop: StopRequest
) -> bool:
    """Resume or begin, train, write the adapters; returns whether all rounds are done."""
    state = None if found is None else _resume(run, found, console)
    log = _make_folder(run, found, folder, state, console)
    stop.training_begins(in_step=run.backbone.sharding.is_sharded)
    total = run.config.federated.num_rounds
    console.begin_rounds(0 if state is None else state.finished_rounds, total, score_names(run))
    reported = RoundLog(run, console, log)
    with Writer(_identity(run), run.world, run.clients, folder.path, found) as writer:
        with garbage.only_of_the_body():
            finished = rounds.train(run, state, writer, reported, stop)
        writer.finish()
    console.end_rounds()
    export_seconds = _export(run, folder, console) if finished else None
    if not finished:
        console.say(
            f"stopped as asked; the same command resumes from {folder.path / 'checkpoints'}"
        )
        console.say(f"report     sfed report {folder.path}  (the rounds so far)")
    reported.end_of_start(writer.take_seconds()[0], export_seconds)
    if log is not None:
        log.close()
    return finished


def _make_folder(
    run: Run,
    found: CheckpointRef | None,
    folder: RunFolder,
    state: State | None,
    console: Console,
) -> MetricLogger | None:
    """Make the run folder, begin the secret key of its noise; the log, on process 0. Collective."""
    log = None
    with sync.raise_everywhere(run.world, "making the run folder"):
        if run.world.is_main:
            held = run.data.summary["clients"]
            log = folder.make(describe_run(run), held, found, state, console)
            if run.privacy is not None and run.privacy.secret is not None:
                run.privacy.secret.begin()
    if log is not None:
        log.add_to_next(console.end_of_start())
    return log


def _identity(run: Run) -> RunIdentity:
    """What the checkpoints of a run say of it."""
    return RunIdentity(
        run.config,
        run.num_clients,
        run.gamma,
        [one.lora_rank for one in run.data.settings],
        run.sharing.clients_per_pass,
        run.data.digests,
        run.placement,
        run.course,
        None if run.origin is None else run.origin.as_record(),
    )


def _export(run: Run, folder: RunFolder, console: Console) -> float:
    """Write the adapters of a run whose rounds are all done; the seconds that it took."""
    started = time.monotonic()
    _write_adapters(run, folder.path, console)
    if run.world.is_main:
        folder.mark_finished()
    return time.monotonic() - started


def _write_adapters(run: Run, folder: Path, console: Console) -> None:
    """Write the adapters of a run whose rounds are all done."""
    run.world.watch.at("writing the adapters")
    with sync.raise_everywhere(run.world, "writing the adapters"):
        former = set_aside_former(run.data.adapter_folders, folder) if run.world.is_main else ""
        written = export_adapters(run, folder)
    if former:
        console.say(former)
    if written:
        console.say(written)


def _resume(run: Run, found: CheckpointRef, console: Console) -> State:
    """Take the state of a checkpoint: clients, and changes of the frozen weights. Collective."""
    resume.refuse_other_data(found, run.data.digests)
    state = checkpoint.load(found, run.world, run.clients)
    if run.changed is not None:
        with sync.raise_everywhere(run.world, "changing the frozen weights"):
            run.changed.restore(run.clients.server_state)
    within = " and a part of the next" if state.is_within else ""
    console.say(f"resuming after round {state.finished_rounds}{within} ({found.folder})")
    return state


def _close(run: Run, folder: Path, console: Console) -> None:
    """The closing table and where everything is."""
    if not run.world.is_main:
        return
    found = read_rounds(folder)
    events = found.events
    evaluated = [event for event in events if _has_losses(event)]
    if evaluated:
        before = evaluated[0] if evaluated[0]["round"] == 0 else None
        held = run.data.summary["clients"]
        labels = {part["client"]: list(part["labels"] or ()) for part in held}
        names = {client: some[0] for client, some in labels.items() if len(some) == 1}
        names |= {client: name for client, name in enumerate(run.data.names) if name}
        console.closing_table(before, evaluated[-1], names)
    console.say(f"adapters   {folder / 'adapters'}  (PeftModel.from_pretrained loads each folder)")
    console.say(f"metrics    {folder / METRICS_FILE}")
    if run.privacy is not None:
        told = privacy_of(open_run(folder).config, events[-1] if events else None)
        console.say(f"privacy    {told}")
    console.where_the_time_went([*events, *found.ends])
    console.where_processes_waited(events)


def _has_losses(event: Mapping[str, Any]) -> bool:
    """Whether an event is that of an evaluated round, with all that a table needs of it."""
    entries = event.get("clients")
    return (
        event["event"] == "round"
        and (was_evaluated(event) or isinstance(event.get(metrics.EVAL_LOSS), float))
        and isinstance(entries, list)
        and all(
            isinstance(entry, dict) and {"client", "examples"} <= entry.keys() for entry in entries
        )
    )
