"""Build the parts of a run: tokenizer, data, backbone, adapters and clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedTokenizerFast

from sfed.clients.state import MOMENTS
from sfed.clients.store import ClientStore
from sfed.config.schema import Config
from sfed.data import classification, splits
from sfed.data.splits import Data
from sfed.data.tasks import task_of
from sfed.data.tokenizer import identity_of
from sfed.distributed import consistency, sync
from sfed.distributed.world import World
from sfed.federated import context, fingerprints, round_metrics
from sfed.federated.context import Run
from sfed.lora import adapters
from sfed.lora.adapters import LoraSpec
from sfed.memory import clients_per_pass
from sfed.memory.clients_per_pass import ClientsPerPass, Start
from sfed.methods import method as methods
from sfed.methods import scaling
from sfed.methods.method import Method
from sfed.models import backbone, hf_config
from sfed.models import demo as demo_model
from sfed.models.backbone import Backbone
from sfed.models.hf_config import MetaModel
from sfed.models.isolation import check
from sfed.models.tokenizer import load_tokenizer
from sfed.models.trial_passes import Subject, ordinary_tokens
from sfed.observability import metrics
from sfed.observability.console import Console
from sfed.storage import checkpoint
from sfed.storage.checkpoint_folder import CheckpointRef
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask


def check_rows_fit(config: Config, held: Data, frozen: Backbone) -> None:
    """Refuse rows that are longer than the model's context or hold tokens it does not know."""
    context, vocabulary = frozen.context_tokens, frozen.vocabulary_size
    tables = {id(e.table): e.table for c in held.train for e in (held.train[c], held.held_out[c])}
    for table in tables.values():
        largest = int(table.flat.max(initial=0))
        if largest >= vocabulary:
            raise UserError(
                f"model.name = {config.model.name!r}: its tokenizer gives token {largest} and "
                f"the model knows {vocabulary}; the tokenizer belongs to another model"
            )
    for client in held.train:
        for examples in (held.train[client], held.held_out[client]):
            longest = max(examples.lengths, default=0)
            if longest > context:
                raise UserError(
                    f"data.max_tokens = {config.data.max_tokens}: a row of client {client} has "
                    f"{longest} tokens and the model's context is {context}; set it to at most "
                    f"{context}"
                )


def build(
    config: Config, world: World, num_clients: int, console: Console, found: CheckpointRef | None
) -> Run:
    """Load the backbone and the data, attach the adapters. Collective.

    Args:
        config: the run.
        world: the processes.
        num_clients: N.
        console: speaks on process 0.
        found: the checkpoint that is resumed; None where the run begins.

    Raises:
        UserError: on every process, for mistakes that only show now.
    """
    _check_cohort(config, num_clients)
    asked, config = config, splits.with_labels(config, world, num_clients)
    name = model_folder(config)
    tokenizer, tokenizer_digest = _tokenizer(config, name, world, console)
    meta = MetaModel.read(config, name)
    # Once: the memory that is free, and with it the answer, changes while things are loaded.
    sharding = hf_config.choose_sharding(config, meta, world)
    console.enter(metrics.READING_SECONDS, f"reading {config.data.task}")
    held = splits.load(config, tokenizer, world, num_clients, sharding.is_sharded)
    for note in held.notes:
        console.warn(note)
    placed = held.placement.clients
    start = Start(config, world, sharding, checkpoint.clients_per_pass(found, placed))
    estimate = clients_per_pass.estimate(start, meta, held, placed, console.say)
    loading = f"loading {config.model.name} ({hf_config.dtype_name(config, world)})"
    console.enter(metrics.LOADING_SECONDS, loading)
    frozen = _backbone(start, name, meta, held)
    method, gammas = method_and_gammas(config, held, num_clients)
    _warn_of_alpha(config, held, gammas, console)
    attached = _attached(world, frozen, _spec(config, held, gammas, name))
    sharing = clients_per_pass.agree(start, estimate, attached.layout.size)
    if sharing.is_doubtful:
        console.warn(f"memory may not suffice: {sharing.reason}")
    of_config = (asked, world, task_of(config), tokenizer, method, num_clients, gammas)
    clients = _clients(config, world, attached, placed[world.rank], sharing)
    weights = _class_weights(config, world, held)
    run = Run(*of_config, frozen, attached, held, clients, sharing, weights)
    loaded = fingerprints.when_built(run, tokenizer_digest)
    consistency.require_same(world, "what was loaded", loaded)
    run = _as_far_as_right(run, console.warn)
    for line in round_metrics.header(run):
        console.say(line)
    return run


def _check_cohort(config: Config, num_clients: int) -> None:
    """Refuse a cohort of more clients than there are: N may follow from processes or files."""
    if num_clients < (config.federated.clients_per_round or 1):
        raise UserError(
            f"federated.clients_per_round = {config.federated.clients_per_round} is more than the "
            f"{num_clients} clients; set it to at most {num_clients}"
        )


def _backbone(start: Start, name: str, meta: MetaModel, held: Data) -> Backbone:
    """The frozen backbone, for which the rows of this process are fit. Collective."""
    with sync.raise_everywhere(start.world, "loading the backbone"):
        frozen = backbone.load(start.config, name, start.world, meta, start.sharding)
        check_rows_fit(start.config, held, frozen)
    frozen.weights_digest = fingerprints.of_backbone(frozen.model, frozen.model.config.to_dict())
    return frozen


def _class_weights(config: Config, world: World, held: Data) -> torch.Tensor | None:
    """(classes,) fp32 weights of the training loss; None where all classes count the same."""
    names = task_of(config).classes or ()
    weights = classification.class_weights(config.train, names, held.class_counts)
    return None if weights is None else torch.tensor(weights, device=world.device)


def method_and_gammas(
    config: Config, held: Data, num_clients: int
) -> tuple[Method, tuple[float, ...]]:
    """The method and each client's gamma, which may depend on the weights of the clients.

    Raises:
        ConfigError: where the clients have different LoRA ranks and the method takes one only.
    """
    method = methods.resolve(config)
    weights = context.client_weights(config, held, num_clients, tuple(range(num_clients)))
    return method, method.gammas([one.lora_rank for one in held.settings], weights)


def _warn_of_alpha(config: Config, held: Data, gammas: Sequence[float], console: Console) -> None:
    """Warn of an alpha that seems to be made for another formula, by the smallest rank."""
    lora_rank, gamma = min(zip((one.lora_rank for one in held.settings), gammas, strict=True))
    given = config.lora.alpha
    if given and (doubt := scaling.alpha_of_another_formula(given, lora_rank, gamma)):
        console.warn(doubt)


def _clients(
    config: Config,
    world: World,
    attached: adapters.Adapters,
    own: Sequence[int],
    sharing: ClientsPerPass,
) -> ClientStore:
    """The clients of this process, all zero."""
    return ClientStore(
        own,
        attached.layout,
        world.device,
        clients_per_pass=sharing.of(own),
        moments=MOMENTS if config.train.optimizer == "adamw" else (),
    )


def _tokenizer(
    config: Config, name: str, world: World, console: Console
) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer and its digest, taken before anything is done with it. Collective."""
    if config.backbone.trust_remote_code:
        console.warn(
            "backbone.trust_remote_code = true: Python code that comes with "
            f"{config.model.name} runs here, with all your rights"
        )
    with sync.raise_everywhere(world, "tokenizer"):
        tokenizer, end_mark_source = load_tokenizer(config, name)
    if not task_of(config).is_classification:
        _say_end_mark(tokenizer, end_mark_source, console)
    return tokenizer, consistency.digest(identity_of(tokenizer))


def _attached(world: World, frozen: Backbone, spec: LoraSpec) -> adapters.Adapters:
    """The adapters on the frozen backbone. Collective."""
    with sync.raise_everywhere(world, "attaching the adapters"):
        return adapters.attach(frozen.model, spec, frozen.head)


def _spec(config: Config, held: Data, gammas: Sequence[float], name: str) -> LoraSpec:
    """Which layers are adapted, and how; with room for the largest rank."""
    ranks = tuple(one.lora_rank for one in held.settings)
    is_mixed = len(set(ranks)) > 1
    return LoraSpec(
        max(ranks),
        1.0 if is_mixed else gammas[0],
        config.lora.dropout,
        config.lora.target_modules,
        mask(name),
        ranks if is_mixed else (),
    )


def model_folder(config: Config) -> str:
    """Hub id or folder of the backbone."""
    return str(demo_model.FOLDER) if config.model.name == "demo" else config.model.name


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


def _as_far_as_right(run: Run, warn: Callable[[str], None]) -> Run:
    """Share passes and rows only where the start check found that to be right. Collective.

    Args:
        run: of which nothing has trained.
        warn: takes a line.

    Raises:
        UserError: on every process, where the backbone cannot be trained with right numbers.
    """
    widest = max(run.sharing.of(own) for own in run.placement)
    found = check(_subject_of(run), partial(_first, run.world), shares_passes=widest > 1)
    if run.packing is not None and not found.documents_share_rows:
        warn(f"each sequence gets a row of its own: {found.packing_reason}")
        run.backbone.keep_documents_in_rows_of_their_own()
    if widest == 1 or found.clients_share_passes:
        return run
    warn(f"each client gets passes of its own: {found.reason}")
    sharing = ClientsPerPass(1, found.reason)
    clients = _clients(run.config, run.world, run.adapters, run.clients.own, sharing)
    return dataclasses.replace(run, sharing=sharing, clients=clients)


def _subject_of(run: Run) -> Subject:
    """The parts of a run that are tried."""
    rows = (some[client] for some in (run.data.train, run.data.held_out) for client in some)
    longest = max(int(max(examples.lengths, default=0)) for examples in rows)
    if run.config.evaluation.generate:
        longest = min(longest + run.config.evaluation.max_new_tokens, run.backbone.context_tokens)
    return Subject(
        run.backbone,
        run.adapters,
        run.world.device,
        ordinary_tokens(run.tokenizer, run.backbone.vocabulary_size),
        max(sync.gather_json(run.world, "longest row", longest)),
        run.packing,
    )


def _first(world: World, reason: str | None) -> str | None:
    """The reason of the first process that has one. Collective."""
    found = sync.gather_json(world, "checking the backbone", reason)
    return next((one for one in found if one), None)
