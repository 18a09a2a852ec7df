"""One training session from a configuration to adapters on disk: start, build, train, export."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from sfed import (
    adapters,
    aggregation,
    backbone,
    checkpoint,
    clients,
    data,
    distributed,
    federation,
    guards,
    isolation,
    meetings,
    methods,
    metrics,
    partition,
    records,
    run,
    scaling,
    school,
    shape,
    sharing,
)
from sfed.checkpoint import Found, State
from sfed.cli import UserError, leave
from sfed.config import Config
from sfed.console import Console
from sfed.distributed import World
from sfed.ending import ending
from sfed.evaluate import score_names
from sfed.federation import TrainingFailedError
from sfed.guards import DivergedError
from sfed.joining import MissingProcessError
from sfed.masking import mask
from sfed.quiet import quieten
from sfed.rows import MOMENTS
from sfed.run import Run
from sfed.runfolder import RunFolder
from sfed.stopping import StoppedEarlyError, StopRequest
from sfed.tasks import task_of
from sfed.tokenizer import identity_of, load_tokenizer
from sfed.writer import RunIdentity, Writer


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
            start = guards.at_start(config)
            guards.require_same(world, "configuration and versions", start)
            found, num_clients = folder.look(world, console)
            parts = build(
                config, world, num_clients, console, checkpoint.clients_per_pass(found, world)
            )
            finished = _train_and_export(parts, found, folder, console, stop)
            if finished and not one_of_many:
                _close(parts, folder.path, console)
            meetings.part(world)
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


def build(
    config: Config, world: World, num_clients: int, console: Console, before: int | None
) -> Run:
    """Load the backbone and the data, attach the adapters. Collective.

    Args:
        config: the run.
        world: the processes.
        num_clients: N.
        console: speaks on process 0.
        before: how many clients shared a pass before a stop; None where the run begins.

    Raises:
        UserError: on every process, for mistakes that only show now.
    """
    if num_clients < (config.federated.clients_per_round or 1):
        raise UserError(
            f"federated.clients_per_round = {config.federated.clients_per_round} is more than the "
            f"{num_clients} clients"
        )
    placement = partition.place(num_clients, world.size)
    own = placement[world.rank]
    method = methods.resolve(config)
    if config.backbone.trust_remote_code:
        console.warn(
            "backbone.trust_remote_code = true: Python code that comes with "
            f"{config.model.name} runs here, with all your rights"
        )
    name = _model_folder(config, world, console)
    with meetings.together(world, "tokenizer"):
        tokenizer, end_mark_source = load_tokenizer(config, name)
    tokenizer_digest = guards.digest(identity_of(tokenizer))
    if not task_of(config).is_classification:
        _say_end_mark(tokenizer, end_mark_source, console)
    console.enter(metrics.READING_SECONDS, f"reading {config.data.task}")
    held = data.load(config, tokenizer, world, num_clients, own)
    for note in held.notes:
        console.warn(note)
    estimate = sharing.estimate(config, name, world, held, placement, before)
    loading = f"loading {config.model.name} ({shape.dtype_name(config, world)})"
    console.enter(metrics.LOADING_SECONDS, loading)
    with meetings.together(world, "loading the backbone"):
        frozen = backbone.load(config, name, world)
        run.check_rows_fit(config, held, frozen, own)
    frozen.weights_digest = guards.of_backbone(frozen.model, frozen.model.config.to_dict())
    everyone = tuple(range(num_clients))
    weights = run.client_weights(config, held, num_clients, everyone)
    gamma = scaling.lora_scaling(
        method.alpha, config.lora.rank, scaling.effective_clients(weights), method.exponents
    )
    with meetings.together(world, "attaching the adapters"):
        attached = adapters.attach(
            frozen.model,
            frozen.head,
            lora_rank=config.lora.rank,
            lora_scaling=gamma,
            dropout=config.lora.dropout,
            target_modules=config.lora.target_modules,
            base_name=mask(name),
        )
    shared = sharing.agree(config, world, estimate, before, attached.layout.size)
    if shared.is_doubtful:
        console.warn(f"memory may not suffice: {shared.reason}")
    rows = clients.ClientRows(
        own,
        attached.layout,
        world.device,
        clients_per_pass=shared.of(own),
        moments=MOMENTS if config.train.optimizer == "adamw" else (),
    )
    parts = Run(
        config,
        world,
        task_of(config),
        tokenizer,
        method,
        num_clients,
        gamma,
        frozen,
        attached,
        held,
        rows,
        shared,
    )
    loaded = guards.when_built(parts, tokenizer_digest)
    guards.require_same(world, "what was loaded", loaded)
    parts = isolation.ensure(parts, console.warn)
    for line in records.header(parts):
        console.say(line)
    return parts


def _model_folder(config: Config, world: World, console: Console) -> str:
    """Where the backbone is; the demo's is made by the first process of each node."""
    if config.model.name != "demo":
        return config.model.name
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sfed"
    with meetings.first_of_node_first(world, "making the demo's backbone"):
        return str(school.ensure_backbone(cache, say=console.say))


def _say_end_mark(tokenizer: PreTrainedTokenizerFast, source: str, console: Console) -> None:
    """Say where the end mark of a text task is from, where it is not the tokenizer's own."""
    if source:
        console.say(
            f"the tokenizer names no eos: rows end with {tokenizer.eos_token!r}, as {source} says"
        )
    elif tokenizer.eos_token_id is None:
        console.warn(
            "no end mark (eos): the tokenizer names none, nor do generation_config.json and "
            "config.json one that its vocabulary holds, so no row teaches the adapters to stop; "
            "set eos_token in tokenizer_config.json of the model"
        )


def _train_and_export(
    parts: Run, found: Found | None, folder: RunFolder, console: Console, stop: StopRequest
) -> bool:
    """Resume or begin, train, write the adapters; returns whether all rounds are done."""
    world, total = parts.world, parts.config.federated.num_rounds
    state: State | None = None
    if found is not None:
        state = checkpoint.load(found, world, parts.clients)
        within = " and a part of the next" if state.is_within else ""
        console.say(f"going on after round {state.finished_rounds}{within} ({found.folder})")
    with meetings.together(world, "making the run folder"):
        log = None
        if world.is_main:
            held = parts.data.summary["clients"]
            log = folder.make(records.describe_run(parts), held, found, state, console)
    if log is not None:
        log.add_to_next(console.end_of_start())
    stop.training_begins(in_step=parts.backbone.sharding.is_sharded)
    console.begin_rounds(0 if state is None else state.finished_rounds, total, score_names(parts))
    identity = RunIdentity(
        parts.config, parts.num_clients, parts.gamma, parts.sharing.clients_per_pass
    )
    with Writer(identity, world, parts.clients, folder.path, found) as writer:
        finished = federation.train(parts, state, writer, log, console, stop)
        writer.finish()
    console.end_rounds()
    if finished:
        world.watch.at("writing the adapters")
        with meetings.together(world, "writing the adapters"):
            _export(parts, folder.path)
    else:
        console.say(
            f"stopped as asked; the same command goes on from {folder.path / 'checkpoints'}"
        )
    if log is not None:
        log.close()
    return finished


def _export(parts: Run, folder: Path) -> None:
    """Write every client's adapter, and the global one where it was asked for. Collective."""
    row_of_all = None
    if "global" in parts.config.evaluation.adapters and parts.method.has_global_adapter:
        everyone = tuple(range(parts.num_clients))
        row_of_all = aggregation.global_row(parts.world, parts.clients, parts.weights(everyone))
    try:
        for client in parts.clients.own:
            path = folder / "adapters" / f"client-{client:04d}"
            parts.adapters.write_peft_folder(path, parts.clients.row(client))
        if row_of_all is not None and parts.world.is_main:
            parts.adapters.write_peft_folder(folder / "adapters" / "global", row_of_all)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output.dir: the adapters cannot be written below {folder} ({error}); make room, "
            "then start again: the run is whole in its last checkpoint"
        ) from None


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
