"""Which clients of a process share passes: as many as is right, and no more than is fast."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from sfed.clients.state import MOMENTS
from sfed.clients.store import ClientStore
from sfed.config.schema import Config
from sfed.distributed import sync
from sfed.distributed.world import World
from sfed.federated.context import Run
from sfed.lora.adapters import Adapters
from sfed.memory import knee
from sfed.memory.clients_per_pass import ClientsPerPass
from sfed.memory.knee import Reading, Typical
from sfed.memory.pass_time import PassTime, Trained, speed_of
from sfed.models.hf_config import DTYPES, dtype_name
from sfed.models.isolation import check
from sfed.models.synthetic import matmul_weights
from sfed.models.trial_passes import Subject, ordinary_tokens


def new_clients(
    config: Config,
    world: World,
    attached: Adapters,
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


def as_far_as_right(run: Run, warn: Callable[[str], None]) -> Run:
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
    return _shared_by(run, ClientsPerPass(1, found.reason))


def _shared_by(run: Run, sharing: ClientsPerPass) -> Run:
    """The run with other groups of clients, which are all zero."""
    clients = new_clients(run.config, run.world, run.adapters, run.clients.own, sharing)
    return dataclasses.replace(run, sharing=sharing, clients=clients)


def at_the_knee(run: Run) -> Run:
    """Let fewer clients share a pass than fit, where that is as fast. Collective.

    Args:
        run: of which nothing has trained.
    """
    config, most_own = run.config, max(map(len, run.placement))
    # Under ZeRO-3 a pass gathers all weights, over links of which nothing is known here.
    if not run.sharing.is_limit or run.backbone.sharding.is_sharded:
        return run
    share = (config.federated.clients_per_round or run.num_clients) / run.num_clients
    sizes = knee.sizes_up_to(run.sharing.clients_per_pass, math.ceil(share * most_own))
    if len(sizes) == 1:
        return run
    batch_sizes = [settings.batch_size for settings in run.data.settings]
    of_model = (run.packing, run.backbone.context_tokens)
    reading = Reading(config.seed, batch_sizes, config.train.micro_batch_size, *of_model)
    own = run.clients.own
    steps = knee.typical_steps(reading, run.data.train, own, math.ceil(share * len(own)))
    sharing = knee.choose(run.world, run.sharing, sizes, Typical(reading, _pass_time(run), steps))
    if sharing.clients_per_pass == run.sharing.clients_per_pass:
        return dataclasses.replace(run, sharing=sharing)
    return _shared_by(run, sharing)


def _pass_time(run: Run) -> PassTime:
    """What passes of the run take on a machine like this one."""
    model, text = run.backbone.model, run.backbone.model.config.get_text_config()
    trained = Trained(
        num_layers=getattr(text, "num_hidden_layers", 1),
        hidden_size=getattr(text, "hidden_size", 0),
        matmul_weights=matmul_weights(model),
        weight_bytes=DTYPES[dtype_name(run.config, run.world)].itemsize,
        adapter_numbers=run.clients.layout.size,
        recomputes=run.config.backbone.gradient_checkpointing,
    )
    return PassTime.of(trained, speed_of(run.world.device.type, torch.get_num_threads()))


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
