"""One training session from a configuration to adapters on disk: start, build, train, export."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfed.config.schema import Config
from sfed.distributed import consistency, sync
from sfed.distributed import world as distributed
from sfed.distributed.shutdown import StoppedEarlyError, StopRequest, ending
from sfed.distributed.world import World
from sfed.federated import fingerprints, round_metrics, rounds
from sfed.federated.build import build
from sfed.federated.context import Run
from sfed.federated.evaluate import score_names
from sfed.federated.export import export_adapters
from sfed.federated.round_metrics import RoundLog
from sfed.federated.rounds import TrainingFailedError
from sfed.observability import metrics
from sfed.observability.console import Console
from sfed.observability.third_party import quieten
from sfed.storage import checkpoint, resume
from sfed.storage.checkpoint import Found, State
from sfed.storage.checkpoint_writer import RunIdentity, Writer
from sfed.storage.run_folder import RunFolder
from sfed.utils.command import leave
from sfed.utils.errors import DivergedError, MissingProcessError


def run_session(config: Config, *, one_of_many: bool = False, import_seconds: float = 0.0) -> None:
    """Run a configuration to its end. Collective: every process of the launcher calls it.

    Args:
        config: the run.
        one_of_many: leave out the closing table, because another one holds all runs.
        import_seconds: what the imports of this process took, for the record.
    """
    world = _join(config)
    quieten(world.rank, world.device.type)
    console = Console(speaks=world.is_main, import_seconds=import_seconds)
    folder = RunFolder(config, one_of_many=one_of_many)
    world.watch.debug_folder = folder.path / "debug"
    try:
        with ending(world):
            stop = StopRequest(world)
            start = fingerprints.at_start(config)
            consistency.require_same(world, "configuration and versions", start)
            found, num_clients = folder.look(world, console)
            parts = build(
                config, world, num_clients, console, checkpoint.clients_per_pass(found, world)
            )
            finished = _train_and_export(parts, found, folder, console, stop)
            if finished and not one_of_many:
                _close(parts, folder.path, console)
            sync.part(world)
        if not (finished or stop.came_here or one_of_many):
            # Whoever started this process did not ask it to stop: for them the run is not done.
            sys.exit(1)
    except (TrainingFailedError, DivergedError) as failure:
        leave(str(failure), 1)
    except StoppedEarlyError:
        console.say("stopped as asked, before training began")
    finally:
        console.end_rounds()
        folder.close()
        distributed.stop(world)


def _join(config: Config) -> World:
    try:
        return distributed.start(config.federated.deadline_seconds)
    except MissingProcessError as failure:
        sys.exit(f"sfed: {failure}")


def _train_and_export(
    parts: Run, found: Found | None, folder: RunFolder, console: Console, stop: StopRequest
) -> bool:
    """Resume or begin, train, write the adapters; returns whether all rounds are done."""
    world, total = parts.world, parts.config.federated.num_rounds
    state: State | None = None
    if found is not None:
        resume.refuse_other_data(found, parts.data.digests)
        state = checkpoint.load(found, world, parts.clients)
        within = " and a part of the next" if state.is_within else ""
        console.say(f"going on after round {state.finished_rounds}{within} ({found.folder})")
    with sync.together(world, "making the run folder"):
        log = None
        if world.is_main:
            held = parts.data.summary["clients"]
            log = folder.make(round_metrics.describe_run(parts), held, found, state, console)
    if log is not None:
        log.add_to_next(console.end_of_start())
    stop.training_begins(in_step=parts.backbone.sharding.is_sharded)
    console.begin_rounds(0 if state is None else state.finished_rounds, total, score_names(parts))
    identity = RunIdentity(
        parts.config,
        parts.num_clients,
        parts.gamma,
        parts.sharing.clients_per_pass,
        parts.data.digests,
    )
    with Writer(identity, world, parts.clients, folder.path, found) as writer:
        finished = rounds.train(parts, state, writer, RoundLog(parts, console, log), stop)
        writer.finish()
    console.end_rounds()
    if finished:
        world.watch.at("writing the adapters")
        with sync.together(world, "writing the adapters"):
            export_adapters(parts, folder.path)
    else:
        console.say(
            f"stopped as asked; the same command goes on from {folder.path / 'checkpoints'}"
        )
    if log is not None:
        log.close()
    return finished


def _close(parts: Run, folder: Path, console: Console) -> None:
    """The closing table and where everything is."""
    if not parts.world.is_main:
        return
    events = metrics.read_metrics(folder / "metrics.jsonl").events
    evaluated = [event for event in events if _has_losses(event)]
    if evaluated:
        before = evaluated[0] if evaluated[0]["round"] == 0 else None
        held = parts.data.summary["clients"]
        labels = {part["client"]: list(part["labels"] or ()) for part in held}
        names = {client: some[0] for client, some in labels.items() if len(some) == 1}
        console.closing_table(before, evaluated[-1], names)
    console.say(f"adapters   {folder / 'adapters'}  (PeftModel.from_pretrained loads each folder)")
    console.say(f"metrics    {folder / 'metrics.jsonl'}")
    console.where_the_time_went(events)


def _has_losses(event: Mapping[str, Any]) -> bool:
    """Whether an event is that of an evaluated round, with all that a table needs of it."""
    entries = event.get("clients")
    return (
        event["event"] == "round"
        and isinstance(event.get(metrics.EVAL_LOSS), float)
        and isinstance(entries, list)
        and all(
            isinstance(entry, dict) and {"client", "examples"} <= entry.keys() for entry in entries
        )
    )
