"""Build the parts of a run: tokenizer, data, backbone, adapters and clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from sfed.config.schema import Config
from sfed.data import classification, splits
from sfed.data.splits import Data
from sfed.data.tasks import task_of
from sfed.data.tokenizer import identity_of
from sfed.distributed import consistency, sync
from sfed.distributed.world import World
from sfed.federated import context, fingerprints, passes
from sfed.federated.context import Run
from sfed.federated.log.header import header
from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.memory import clients_per_pass
from sfed.memory.clients_per_pass import ClientsPerPass, Start
from sfed.methods import by_layer, scaling
from sfed.methods import method as methods
from sfed.methods.method import Method
from sfed.models import backbone, hf_config
from sfed.models import demo as demo_model
from sfed.models.backbone import Backbone
from sfed.models.changed_weights import ChangedWeights
from sfed.models.hf_config import MetaModel, Sharding
from sfed.models.tokenizer import load_tokenizer
from sfed.observability import metrics
from sfed.observability.console import Console
from sfed.privacy import mean as private_mean
from sfed.storage import checkpoint, origin, origin_rows, resume
from sfed.storage.checkpoint_folder import CheckpointRef
from sfed.storage.origin import Origin, Source
from sfed.utils.errors import ConfigError, UserError
from sfed.utils.redaction import mask


def check_rows_fit(config: Config, held: Data, frozen: Backbone) -> None:
    """Refuse rows that are longer than the model's context or hold tokens it does not know.

    Raises:
        UserError: naming a client with such a row; ``data.eval_files`` where nobody trains.
    """
    context, vocabulary = frozen.context_tokens, frozen.vocabulary_size
    splits_of_clients = [*held.train.items(), *held.held_out.items()]
    for table in {id(examples.table): examples.table for _, examples in splits_of_clients}.values():
        largest = int(table.flat.max(initial=0))
        if largest >= vocabulary:
            raise UserError(
                f"model.name = {config.model.name!r}: its tokenizer gives token {largest} and "
                f"the model knows {vocabulary}; the tokenizer belongs to another model"
            )
    for client, examples in splits_of_clients:
        longest = max(examples.lengths, default=0)
        if longest > context:
            owner = f"client {client}" if held.train else "data.eval_files"
            raise UserError(
                f"data.max_tokens = {config.data.max_tokens}: a row of {owner} has {longest} "
                f"tokens and the model's context is {context}; set it to at most {context}"
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
    check_cohort(config, num_clients)
    source = _source(config, world, found)
    labelled = splits.with_labels(config, world, num_clients)
    asked = _Asked(config, labelled, world, num_clients, console, found, source)
    read = _read(asked)
    loaded = _load(asked, read)
    run = _assembled(asked, read, loaded)
    fingerprint = fingerprints.when_built(run, read.tokenizer_digest)
    consistency.require_same(world, "what was loaded", fingerprint)
    run = passes.at_the_knee(passes.as_far_as_right(run, console.warn))
    if config.federated.scaffold:
        run.clients.keep_controls(run.received)
    for line in header(run):
        console.say(line)
    return run


@dataclass(frozen=True)
class _Asked:
    """What the parts of a run are built from."""

    as_written: Config
    """The configuration that the run keeps."""
    config: Config
    """The same with the labels of the data."""
    world: World
    num_clients: int
    console: Console
    found: CheckpointRef | None
    """The checkpoint that is resumed; None where the run begins."""
    source: Source | None
    """The adapters that the run starts from; None where it resumes or starts afresh."""


@dataclass(frozen=True)
class _Read:
    """What is read before the backbone is loaded."""

    tokenizer: PreTrainedTokenizerFast
    tokenizer_digest: str
    meta: MetaModel
    sharding: Sharding
    data: Data


@dataclass(frozen=True)
class _Loaded:
    """The backbone with the adapters on it, and how clients share its passes."""

    backbone: Backbone
    method: Method
    gammas: tuple[float, ...]
    adapters: Adapters
    sharing: ClientsPerPass


def _read(asked: _Asked) -> _Read:
    """Choose the kernels, read the tokenizer, the model's shape and the data. Collective."""
    config, world, console = asked.config, asked.world, asked.console
    name = model_folder(config)
    _choose_kernels(config, world, console)
    tokenizer, tokenizer_digest = _tokenizer(config, name, world, console)
    meta = MetaModel.read(config, name)
    # Once: the memory that is free, and with it the answer, changes while things are loaded.
    sharding = hf_config.choose_sharding(config, meta, world)
    console.enter(metrics.READING_SECONDS, f"reading {config.data.task}")
    held = splits.load(config, tokenizer, world, asked.num_clients, sharding.is_sharded)
    _check_data(held, asked.source, world, console)
    return _Read(tokenizer, tokenizer_digest, meta, sharding, held)


def _load(asked: _Asked, read: _Read) -> _Loaded:
    """Load the backbone, attach the adapters, agree on the clients of a pass. Collective."""
    config, world, console, held = asked.config, asked.world, asked.console, read.data
    placed = held.placement.clients
    start = Start(config, world, read.sharding, checkpoint.clients_per_pass(asked.found, placed))
    # First: with DeepSpeed at work every model that is made gets sharded.
    estimate = clients_per_pass.estimate(start, read.meta, held, placed, console.say)
    loading = f"loading {config.model.name} ({hf_config.precision(config, world)})"
    console.enter(metrics.LOADING_SECONDS, loading)
    name = model_folder(config)
    frozen = _backbone(start, name, read.meta, held)
    loaded_gamma = _gamma_of(asked.source, asked.found)
    method, gammas = method_and_gammas(config, held, asked.num_clients, loaded_gamma)
    _warn_of_alpha(config, held, gammas, console)
    attached = _attached(world, frozen, _spec(config, held, method, gammas, mask(name)))
    sharing = clients_per_pass.agree(start, estimate, attached.layout.size)
    if sharing.is_doubtful:
        console.warn(f"memory may not suffice: {sharing.reason}")
    return _Loaded(frozen, method, gammas, attached, sharing)


def _assembled(asked: _Asked, read: _Read, loaded: _Loaded) -> Run:
    """Make the clients of this process and put the run together. Collective."""
    config, world, data = asked.config, asked.world, read.data
    own_clients = data.placement.clients[world.rank]
    run = Run(
        config=asked.as_written,
        world=world,
        task=task_of(config),
        tokenizer=read.tokenizer,
        method=loaded.method,
        num_clients=asked.num_clients,
        gammas=loaded.gammas,
        backbone=loaded.backbone,
        adapters=loaded.adapters,
        data=data,
        clients=passes.new_clients(config, world, loaded.adapters, own_clients, loaded.sharing),
        sharing=loaded.sharing,
        course=resume.course_from(asked.found, config),
        origin=None,
        class_weights=_class_weights(config, world, data),
    )
    return _with_options(run, asked.source, asked.found)


def _with_options(run: Run, source: Source | None, found: CheckpointRef | None) -> Run:
    """Add what few runs have: privacy, weights that change, adapters to start from. Collective."""
    finished = 0 if found is None else found.metadata["finished_rounds"]
    of_run = (run.config, run.world, run.method, run.num_clients)
    return dataclasses.replace(
        run,
        privacy=private_mean.open_mean(*of_run, finished),
        changed=_changed_weights(run.method, run.world, run.backbone, run.adapters),
        origin=_origin(run, source, found),
    )


def _choose_kernels(config: Config, world: World, console: Console) -> None:
    """Try the kernels before anything is loaded, and say which cannot be used. Collective."""
    with sync.raise_everywhere(world, "kernels"):
        faults = backbone.kernels_of(config, world).faults
    for fault in faults:
        console.warn(f"train.kernels=auto takes torch's operations for {fault}")


def _source(config: Config, world: World, found: CheckpointRef | None) -> Source | None:
    """The folder that a run starts from; None where it resumes or starts afresh. Collective."""
    if found is not None or origin.place_of(config) is None:
        return None
    with sync.raise_everywhere(world, "reading the adapters to start from"):
        return origin.source(config)


def _check_data(held: Data, source: Source | None, world: World, console: Console) -> None:
    """Say what is to be known of the data; refuse clients without an adapter to start from."""
    for note in held.notes:
        console.warn(note)
    if source is not None:
        with sync.raise_everywhere(world, "adapters of the clients"):
            source.of_clients(held.names, held.adapter_folders)


def _gamma_of(source: Source | None, found: CheckpointRef | None) -> float | None:
    """Gamma of adapters on disk that a run starts from, or has started from; None without them."""
    if source is not None:
        return source.gamma
    is_loaded = found is not None and found.metadata.get("origin") is not None
    return float(found.metadata["gamma"]) if found is not None and is_loaded else None


def _origin(run: Run, source: Source | None, found: CheckpointRef | None) -> Origin | None:
    """What the run starts from, or started from; None where it starts afresh. Collective.

    Raises:
        ConfigError: on every process, where the adapters do not fit the model or the method.
    """
    if source is None:
        return None if found is None else origin.of_record(found)
    with sync.raise_everywhere(run.world, "comparing with what the run starts from"):
        factors = _loaded_factors(run, source)
        if "head" in factors:
            source.check_labels(run.task.labels or run.task.classes or ())
        origin_rows.check_backbone(source, run.backbone.weights_digest)
    looked = origin_rows.look(source, factors, run.adapters, run.data, run.world)
    if run.method.needs_common_a and not looked.has_common_a:
        raise ConfigError(
            f"{source.said}: the clients' A differ, and federated.method={run.method.name} never "
            "averages A before it takes it to be the same on all; start from one adapter for all, "
            "or choose a method that averages A"
        )
    apart = set(looked.own_factors) & set(run.received)
    if apart and (keys := methods.keys_of_received(run.config)):
        raise ConfigError(
            f"{source.said}: clients start with {' and '.join(sorted(apart))} of their own, so "
            f"there is no common value in the first round, and {keys[0]} is about one; start from "
            "one adapter for all, or remove the key"
        )
    return looked


def _loaded_factors(run: Run, source: Source) -> tuple[str, ...]:
    """What is loaded: everything, or of a run that is joined what its clients have in common."""
    if source.run_config is None:
        return run.adapters.layout.factors
    head = ("head",) if source.run_config.federated.share_head else ()
    return methods.check_joinable(source.run_config, source.path) + head


def check_cohort(config: Config, num_clients: int) -> None:
    """Refuse a cohort or sample of more clients than there are: N may follow from files."""
    asked = {
        "federated.clients_per_round": config.federated.clients_per_round,
        "evaluation.clients": config.evaluation.clients,
    }
    for key, count in asked.items():
        if num_clients < (count or 1):
            raise UserError(
                f"{key} = {count} is more than the {num_clients} clients; set it to at most "
                f"{num_clients}"
            )


def _backbone(start: Start, name: str, meta: MetaModel, held: Data) -> Backbone:
    """The frozen backbone, for which the rows of this process are fit. Collective."""
    with sync.raise_everywhere(start.world, "loading the backbone"):
        frozen = backbone.load(start.config, name, start.world, meta, start.sharding)
        check_rows_fit(start.config, held, frozen)
    settings = frozen.model.config.to_dict()
    frozen.weights_digest = fingerprints.of_backbone(start.world, frozen.model, settings)
    return frozen


def _class_weights(config: Config, world: World, held: Data) -> torch.Tensor | None:
    """(classes,) fp32 weights of the training loss; None where all classes count the same."""
    names = task_of(config).classes or ()
    weights = classification.class_weights(config.train, names, held.class_counts)
    return None if weights is None else torch.tensor(weights, device=world.device)


def method_and_gammas(
    config: Config, held: Data, num_clients: int, loaded_gamma: float | None = None
) -> tuple[Method, tuple[float, ...]]:
    """The method and each client's gamma, which may depend on the weights of the clients.

    Args:
        config: of the run.
        held: its data.
        num_clients: N.
        loaded_gamma: of adapters on disk that the run starts from.

    Raises:
        ConfigError: where the clients have different LoRA ranks and the method takes one only.
    """
    method = methods.resolve(config)
    if loaded_gamma is not None:
        return method, (loaded_gamma,) * num_clients
    weights = context.client_weights(config, held, num_clients, tuple(range(num_clients)))
    ranks = [one.lora_rank for one in held.settings]
    methods.refuse_mixed_ranks(config, ranks)
    return method, method.gammas(ranks, weights)


def _warn_of_alpha(config: Config, held: Data, gammas: Sequence[float], console: Console) -> None:
    """Warn of an alpha that seems to be made for another formula, by the smallest rank."""
    lora_rank, gamma = min(zip((one.lora_rank for one in held.settings), gammas, strict=True))
    given = config.lora.alpha
    if given and (doubt := scaling.alpha_of_another_formula(given, lora_rank, gamma)):
        console.warn(doubt)


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


def _attached(world: World, frozen: Backbone, spec: LoraSpec) -> Adapters:
    """The adapters on the frozen backbone. Collective."""
    with sync.raise_everywhere(world, "attaching the adapters"):
        attached = adapters.attach(frozen.model, spec, frozen.head)
    attached.context.dropout = frozen.kernels.dropout
    return attached


def _spec(
    config: Config, held: Data, method: Method, gammas: Sequence[float], name: str
) -> LoraSpec:
    """Which layers are adapted, and how; with room for the largest rank."""
    ranks = tuple(one.lora_rank for one in held.settings)
    return spec_of(config, method, ranks, gammas, name)


def spec_of(
    config: Config, method: Method, ranks: Sequence[int], gammas: Sequence[float], name: str
) -> LoraSpec:
    """How adapters of clients are attached, with room for the largest rank.

    Args:
        config: of the run.
        method: of the run.
        ranks: (N,) LoRA rank of each client.
        gammas: (N,) of each client.
        name: of the base model.
    """
    common = (config.lora.dropout, config.lora.target_modules, name)
    if len(set(ranks)) == 1:
        return LoraSpec(ranks[0], gammas[0], *common)
    largest = by_layer.common_gamma(gammas, ranks)
    scales = tuple(largest / gamma for gamma in gammas) if method.keeps_product else ()
    return LoraSpec(max(ranks), 1.0, *common, tuple(ranks), tuple(gammas), scales)


def _changed_weights(
    method: Method, world: World, frozen: Backbone, attached: Adapters
) -> ChangedWeights | None:
    """The frozen weights that the method changes. Collective where there are any."""
    if not method.changes_base:
        return None
    with sync.raise_everywhere(world, "the weights that the method changes"):
        return ChangedWeights(frozen, attached.layers, world)


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
