"""Build the parts of a run: tokenizer, data, backbone, adapters and clients."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sfed.clients import store as client_store
from sfed.clients.state import MOMENTS
from sfed.config.schema import Config
from sfed.data import partition, splits
from sfed.data.splits import Data
from sfed.data.tasks import task_of
from sfed.data.tokenizer import identity_of
from sfed.distributed import consistency, sync
from sfed.distributed.world import World
from sfed.federated import context, fingerprints, round_metrics, shared_passes
from sfed.federated.context import Run
from sfed.lora import adapters
from sfed.lora.adapters import LoraSpec
from sfed.memory import clients_per_pass
from sfed.methods import method as methods
from sfed.methods import scaling
from sfed.models import backbone, hf_config
from sfed.models import demo as demo_model
from sfed.models.backbone import Backbone
from sfed.models.hf_config import MetaModel
from sfed.models.tokenizer import load_tokenizer
from sfed.observability import metrics
from sfed.observability.console import Console
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask


def check_rows_fit(config: Config, held: Data, frozen: Backbone, own: range) -> None:
    """Refuse rows that are longer than the model's context or hold tokens it does not know."""
    context, vocabulary = frozen.context_tokens, frozen.vocabulary_size
    tables = {id(e.table): e.table for c in own for e in (held.train[c], held.held_out[c])}
    for table in tables.values():
        largest = int(table.flat.max(initial=0))
        if largest >= vocabulary:
            raise UserError(
                f"model.name = {config.model.name!r}: its tokenizer gives token {largest} and "
                f"the model knows {vocabulary}; the tokenizer belongs to another model"
            )
    for client in own:
        for examples in (held.train[client], held.held_out[client]):
            longest = max(examples.lengths, default=0)
            if longest > context:
                raise UserError(
                    f"data.max_tokens = {config.data.max_tokens}: a row of client {client} has "
                    f"{longest} tokens and the model's context is {context}; set it to at most "
                    f"{context}"
                )


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
    own, method = placement[world.rank], methods.resolve(config)
    name = _model_folder(config, world, console)
    tokenizer, tokenizer_digest = _tokenizer(config, name, world, console)
    console.enter(metrics.READING_SECONDS, f"reading {config.data.task}")
    held = splits.load(config, tokenizer, world, num_clients, own)
    for note in held.notes:
        console.warn(note)
    start = clients_per_pass.Start(config, world, before)
    meta = MetaModel.read(config, name)
    estimate = clients_per_pass.estimate(start, meta, held, placement, console.say)
    loading = f"loading {config.model.name} ({hf_config.dtype_name(config, world)})"
    console.enter(metrics.LOADING_SECONDS, loading)
    with sync.together(world, "loading the backbone"):
        frozen = backbone.load(config, name, world, meta)
        check_rows_fit(config, held, frozen, own)
    frozen.weights_digest = fingerprints.of_backbone(frozen.model, frozen.model.config.to_dict())
    weights = context.client_weights(config, held, num_clients, tuple(range(num_clients)))
    gamma = scaling.lora_scaling(
        method.alpha, config.lora.rank, scaling.effective_clients(weights), method.exponents
    )
    attached = _attached(config, world, frozen, gamma, name)
    shared = clients_per_pass.agree(start, estimate, attached.layout.size)
    if shared.is_doubtful:
        console.warn(f"memory may not suffice: {shared.reason}")
    rows = client_store.ClientRows(
        own,
        attached.layout,
        world.device,
        clients_per_pass=shared.of(own),
        moments=MOMENTS if config.train.optimizer == "adamw" else (),
    )
    of_config = (config, world, task_of(config), tokenizer, method, num_clients, gamma)
    parts = Run(*of_config, frozen, attached, held, rows, shared)
    loaded = fingerprints.when_built(parts, tokenizer_digest)
    consistency.require_same(world, "what was loaded", loaded)
    parts = shared_passes.ensure(parts, console.warn)
    for line in round_metrics.header(parts):
        console.say(line)
    return parts


def _tokenizer(
    config: Config, name: str, world: World, console: Console
) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer and its digest, taken before anything is done with it. Collective."""
    if config.backbone.trust_remote_code:
        console.warn(
            "backbone.trust_remote_code = true: Python code that comes with "
            f"{config.model.name} runs here, with all your rights"
        )
    with sync.together(world, "tokenizer"):
        tokenizer, end_mark_source = load_tokenizer(config, name)
    if not task_of(config).is_classification:
        _say_end_mark(tokenizer, end_mark_source, console)
    return tokenizer, consistency.digest(identity_of(tokenizer))


def _attached(
    config: Config, world: World, frozen: Backbone, gamma: float, name: str
) -> adapters.Adapters:
    """The adapters on the frozen backbone. Collective."""
    with sync.together(world, "attaching the adapters"):
        return adapters.attach(
            frozen.model,
            LoraSpec(
                config.lora.rank, gamma, config.lora.dropout, config.lora.target_modules, mask(name)
            ),
            frozen.head,
        )


def _model_folder(config: Config, world: World, console: Console) -> str:
    """Where the backbone is; the demo's is made by the first process of each node."""
    if config.model.name != "demo":
        return config.model.name
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sfed"
    with sync.first_of_node_first(world, "making the demo's backbone"):
        return str(demo_model.ensure_backbone(cache, say=console.say))


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
