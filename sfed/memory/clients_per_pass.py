"""How many clients of a process share a pass: as configured, or at most as many as fit.

Whether fewer are as fast is decided once the data and the model are there (``knee``). All processes
use one number, since how many passes each of them makes follows from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from sfed.clients.state import MOMENTS
from sfed.config.clients import largest_batch, largest_rank
from sfed.config.schema import Config
from sfed.data.splits import Data
from sfed.distributed.sync import gather_json, raise_everywhere
from sfed.distributed.world import World
from sfed.memory import counts, profile
from sfed.memory.costs import ClientState, Costs, Work
from sfed.memory.trial import Frozen
from sfed.models.hf_config import DTYPES, MetaModel, Sharding, dtype_name, free_bytes
from sfed.utils.errors import UserError
from sfed.utils.text import size_text

# More than any pass keeps: bytes per token, layer and unit of width, and per number of an adapter.
_GENEROUS_PER_UNIT, _GENEROUS_PER_NUMBER = 64, 32
_ALL = 2**31
# Where so much more than that is free, a pass need not be measured.
_CAREFREE_SHARE = 0.25


@dataclass(frozen=True)
class ClientsPerPass:
    """The agreement."""

    clients_per_pass: int
    reason: str
    is_doubtful: bool = False
    """Whether not even one client is sure to fit."""
    is_limit: bool = False
    """Whether the run is free to take fewer."""

    def of(self, own: Sequence[int]) -> int:
        """Most clients in one pass of a process that holds these."""
        return min(len(own), self.clients_per_pass)


@dataclass(frozen=True)
class Start:
    """A run that starts, as far as the limit depends on it."""

    config: Config
    world: World
    sharding: Sharding
    before: int | None
    """The limit of the run that is resumed; None where the run begins. With other groups of clients
    its numbers would differ by round-off from those of a run that was never stopped."""


@dataclass(frozen=True)
class Estimate:
    """What a process does, and what a pass costs."""

    work: Work
    costs: Costs

    def most(self, state: ClientState, free: int) -> ClientsPerPass:
        """As many clients as fit beside the backbone: the limit of ``auto``.

        Args:
            state: of a client.
            free: bytes beside the backbone.
        """
        work, costs = self.work, self.costs
        fitting = work.most_clients(costs, state, free)
        needed = size_text(work.needs(costs, state, max(1, fitting)).total)
        of_pass = f"{work.train_rows} rows of up to {work.tokens} tokens each"
        if fitting:
            reason = f"{of_pass} need about {needed} of the {size_text(free)} that are free"
            return ClientsPerPass(fitting, reason, is_limit=True)
        reason = f"even one, with {of_pass}, needs about {needed}, and {size_text(free)} are free"
        return ClientsPerPass(1, reason, is_doubtful=True)


def estimate(
    start: Start,
    meta: MetaModel,
    held: Data,
    placement: Sequence[Sequence[int]],
    say: Callable[[str], None],
) -> Estimate | None:
    """Measure what a pass costs, where that matters. Collective.

    Before the backbone is loaded: with DeepSpeed at work every model that is made gets sharded.

    Args:
        start: the run.
        meta: its model.
        held: the rows of this process's clients.
        placement: the clients of each process.
        say: told on process 0 where measuring takes long.

    Returns:
        None where the limit does not depend on it: all clients of a process fit without any doubt,
        or it is configured, or known from before.
    """
    config, world = start.config, start.world
    own_clients = max(map(len, placement))
    if own_clients == 1 or _settled(config, start.before):
        return None
    rows = (
        some[client] for some in (held.train, held.held_out) for client in placement[world.rank]
    )
    longest = max((int(max(examples.lengths, default=0)) for examples in rows), default=0)
    known = gather_json(world, "rows and memory", [longest, _free(world)])
    work = work_of(config, own_clients, max(tokens for tokens, _ in known))
    carefree = _CAREFREE_SHARE * min(free for _, free in known)
    if _generous_bytes(config, meta, work) <= carefree:
        return None
    dtype = DTYPES[dtype_name(config, world)]
    costs: Costs | None = None
    with raise_everywhere(world, "measuring a pass"):
        if world.is_main:
            targets = counts.counts_of(config, meta).targets
            frozen = Frozen(meta.config, dtype, targets, world.device.type)
            costs = profile.measure(config, frozen, say)
    told = gather_json(world, "costs of a pass", costs and dataclasses.asdict(costs))[0]
    return Estimate(work, Costs.of_json(told))


def agree(start: Start, found: Estimate | None, numbers: int) -> ClientsPerPass:
    """As configured, or as many as fit on the process with the least memory. Collective.

    Args:
        start: the run.
        found: what a pass costs; None where the limit does not depend on it.
        numbers: of a client's row.
    """
    if known := _settled(start.config, start.before):
        return known
    if found is None:
        return ClientsPerPass(_in_round(start.config), "all of a process fit", is_limit=True)
    world = start.world
    free = min(gather_json(world, "free memory beside the backbone", _free(world)))
    return found.most(state_of(start.config, numbers), free)


def planned(config: Config, found: Estimate, numbers: int, free: int) -> ClientsPerPass:
    """At most so many in a run that begins on processes with so much memory beside the backbone."""
    return _settled(config, None) or found.most(state_of(config, numbers), free)


def _settled(config: Config, before: int | None) -> ClientsPerPass | None:
    """The limit where it depends on no memory."""
    asked, in_round = config.federated.clients_per_pass, _in_round(config)
    if asked != "auto":
        return ClientsPerPass(min(asked or _ALL, in_round), "as configured")
    return None if before is None else ClientsPerPass(min(before, in_round), "as before the stop")


def _in_round(config: Config) -> int:
    return config.most_in_round or _ALL


def state_of(config: Config, numbers: int) -> ClientState:
    """What the trainer holds of a client whose row has so many numbers."""
    buffers = len(MOMENTS) if config.train.optimizer == "adamw" else 0
    # Control variate and mean gradient: as long as the row at most.
    return ClientState(numbers, buffers + 2 * config.federated.scaffold)


def work_of(config: Config, own_clients: int, tokens: int) -> Work:
    """What a process does that holds so many clients and reads rows of so many tokens."""
    return Work(
        own_clients=own_clients,
        round_clients=min(own_clients, config.most_in_round or own_clients),
        train_rows=config.train.micro_batch_size or largest_batch(config),
        eval_rows=config.evaluation.batch_size,
        tokens=tokens,
        new_tokens=config.evaluation.max_new_tokens if config.evaluation.generate else 0,
    )


def _free(world: World) -> int:
    return free_bytes(world.device) // world.processes_per_device


def _generous_bytes(config: Config, meta: MetaModel, work: Work) -> int:
    """More than all clients of a process need in one pass, whatever the architecture."""
    text = meta.config.get_text_config()
    hidden, layers = _told(text, "hidden_size"), _told(text, "num_hidden_layers")
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    width = hidden + (max(inner) if isinstance(inner, list | tuple) else int(inner))
    tokens = max(work.train_rows, work.eval_rows) * (work.tokens + work.new_tokens)
    # Attention without a fused kernel keeps a square of scores for each head, else a mask; and
    # all of a client may be packed into one row.
    heads = getattr(text, "num_attention_heads", 1)  # a model without attention has no scores
    scores = tokens * (heads if meta.may_be_eager else 1)
    per_token = layers * (_GENEROUS_PER_UNIT * width + 16 * scores)
    per_token += 16 * _told(text, "vocab_size")
    numbers = layers * 8 * width * largest_rank(config)
    dequantised = 0 if config.model.quantization == "none" else 4 * hidden * width
    of_clients = work.round_clients * (tokens * per_token + _GENEROUS_PER_NUMBER * numbers)
    return of_clients + dequantised


def _told(text: PreTrainedConfig, key: str) -> int:
    """A dimension as the model's configuration tells it."""
    value = getattr(text, key, None)
    if isinstance(value, int):
        return value
    raise UserError(
        f"federated.clients_per_pass = auto: the configuration of this model ({text.model_type}) "
        f"does not tell {key}, so what a pass needs is not known; set it to a number, or choose "
        "another model.name"
    )
