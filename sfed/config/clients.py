"""What each client trains with, by the sections ``clients``, ``lora`` and ``train``. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfed.config.schema import Config
from sfed.config.sections.clients import ClientSection
from sfed.config.sections.train import DEFAULT_LOCAL_STEPS
from sfed.utils.errors import ConfigError
from sfed.utils.text import counted, printable

_MOST_NAMED = 16


@dataclass(frozen=True)
class ClientSettings:
    """What one client trains with."""

    lora_rank: int
    lr: float
    batch_size: int
    """Sequences per optimizer step."""
    local_steps: int | None
    """Optimizer steps per round; None where ``local_epochs`` says how many."""
    local_epochs: int | None

    def steps(self, num_examples: int) -> int:
        """Optimizer steps of a round over so many training examples."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return -(-num_examples * self.local_epochs // self.batch_size)


def settings_of(config: Config, names: Sequence[str]) -> tuple[ClientSettings, ...]:
    """Return what each of the N clients trains with.

    Args:
        config: of the run.
        names: (N,) of the clients; "" of those that have none.

    Raises:
        ConfigError: where ``clients`` has a name or number that no client has, or ``lora.rank``
            another number of ranks than there are clients.
    """
    ranks, train = config.lora.rank, config.train
    if isinstance(ranks, tuple) and len(ranks) != len(names):
        raise ConfigError(
            f"lora.rank has {counted(len(ranks), 'rank')} for {counted(len(names), 'client')}; "
            "give one rank for each client, or one number for all"
        )
    own = _by_number(config.clients, names)
    nothing, steps = ClientSection(), train.local_steps
    if steps is None and train.local_epochs is None:
        steps = DEFAULT_LOCAL_STEPS
    found = []
    for client in range(len(names)):
        one = own.get(client, nothing)
        found.append(
            ClientSettings(
                one.rank or (ranks[client] if isinstance(ranks, tuple) else ranks),
                one.lr or train.lr,
                one.batch_size or train.batch_size,
                one.local_steps or steps,
                train.local_epochs,
            )
        )
    return tuple(found)


def _by_number(
    sections: Mapping[str, ClientSection], names: Sequence[str]
) -> dict[int, ClientSection]:
    """The sections by the numbers of their clients; a name goes before a number."""
    numbers = {name: client for client, name in enumerate(names) if name}
    found: dict[int, ClientSection] = {}
    mistakes = []
    for key, section in sections.items():
        client = numbers.get(key)
        if client is None and key.isdecimal() and int(key) < len(names):
            client = int(key)
        if client is None:
            mistakes.append(
                f"clients.{printable(key)}: no client has this name; {_known(key, names)}"
            )
        elif client in found:
            mistakes.append(f"clients.{printable(key)}: client {client} is named twice")
        else:
            found[client] = section
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return found


def _known(key: str, names: Sequence[str]) -> str:
    """Which clients there are."""
    called, last = [name for name in names if name], len(names) - 1
    if not called:
        return f"the clients have no names: write their numbers, 0 to {last}"
    shown = ", ".join(map(printable, called[:_MOST_NAMED]))
    more = f" and {len(called) - _MOST_NAMED} more" if len(called) > _MOST_NAMED else ""
    near = difflib.get_close_matches(key, called, n=1)
    hint = f"; did you mean {printable(near[0])}?" if near else ""
    return f"the clients are {shown}{more}, or their numbers, 0 to {last}{hint}"


def largest_rank(config: Config) -> int:
    """The largest LoRA rank that a client may have, whatever the clients are called."""
    return max(_ranks(config))


def may_have_mixed_ranks(config: Config) -> bool:
    """Whether clients may have different LoRA ranks, whatever they are called."""
    return len(set(_ranks(config))) > 1


def _ranks(config: Config) -> Sequence[int]:
    """The LoRA ranks that there may be."""
    ranks = config.lora.rank
    if isinstance(ranks, tuple):
        return ranks
    return config.of_clients("rank", ranks)


def largest_batch(config: Config) -> int:
    """The most sequences per optimizer step that a client may have."""
    return max(config.of_clients("batch_size", config.train.batch_size))


def most_steps(config: Config) -> int | None:
    """The most optimizer steps of a client per round; None where its data decides."""
    train = config.train
    default = train.local_steps or (None if train.local_epochs else DEFAULT_LOCAL_STEPS)
    steps = config.of_clients("local_steps", default or 0)
    return None if 0 in steps else max(steps)
