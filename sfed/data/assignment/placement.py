"""Which process holds which client: dealt by work, or by number where that is about as good.

Everything here is a pure function of its arguments: every process computes the same placement, and
nothing has to be communicated. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfed.config.clients import ClientSettings
from sfed.data import partition

# By number, unless the process with the most work then has more than it would have by work by at
# least this share: clients that are nearly equal keep their order.
_LEAST_GAIN = 0.05


@dataclass(frozen=True)
class Placement:
    """The clients of each process."""

    clients: tuple[tuple[int, ...], ...]
    """By process, each in ascending order, at least one each where there are enough."""
    reason: str
    """How they were dealt, in plain words."""


def tokens_of_round(settings: ClientSettings, num_examples: int, num_tokens: int) -> float:
    """Tokens that a client reads in a round: exact for epochs, the mean over rounds for steps.

    Args:
        settings: of the client.
        num_examples: of its training set.
        num_tokens: of all of them together.
    """
    if settings.local_steps is None and settings.local_epochs is not None:
        return float(num_tokens * settings.local_epochs)
    return settings.steps(num_examples) * settings.batch_size * num_tokens / num_examples


def by_number(num_clients: int, num_processes: int) -> Placement:
    """Deal contiguous ranges, as even as it goes."""
    placed = partition.place(num_clients, num_processes)
    return Placement(tuple(map(tuple, placed)), "by number")


def by_work(work: Sequence[float], num_processes: int, unit: str) -> Placement:
    """Deal by work: the client with the most first, each to the process with the least so far.

    The busiest process then has at most 4/3 of the least possible (Graham 1969), and by number only
    where that is hardly more. So clients of nearly equal work lie in ranges, and as many on each
    process.

    Args:
        work: (N,) of each client in a round.
        num_processes: W.
        unit: what the work is counted in, such as tokens.
    """
    numbered = by_number(len(work), num_processes)
    dealt: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0.0] * num_processes
    for client in sorted(range(len(work)), key=lambda client: (-work[client], client)):
        least = min(range(num_processes), key=lambda p: (loads[p], len(dealt[p]), p))
        dealt[least].append(client)
        loads[least] += work[client]
    before, after = max(loads_of(numbered, work)), max(loads)
    if after >= (1 - _LEAST_GAIN) * before:
        return numbered
    total = sum(work)
    reason = (
        f"by the {unit} of a round: the busiest process has {100 * after / total:.0f} % of all, "
        f"by number it would have {100 * before / total:.0f} %"
    )
    return Placement(tuple(tuple(sorted(own)) for own in dealt), reason)


def loads_of(placement: Placement, work: Sequence[float]) -> list[float]:
    """The work of each process."""
    return [float(sum(work[client] for client in own)) for own in placement.clients]


def of_pool(
    settings: Sequence[ClientSettings],
    sizes: Sequence[tuple[int, int]],
    num_processes: int,
    in_lockstep: bool,
) -> Placement:
    """Deal the clients of a common pool by what they do in a round.

    Args:
        settings: (N,) of each client.
        sizes: (N,) examples, and tokens of all of them together, of each client's training set.
        num_processes: W.
        in_lockstep: whether all processes make their steps together, so that steps are the work.
    """
    pairs = list(zip(settings, sizes, strict=True))
    if in_lockstep:
        steps = [float(one.steps(examples)) for one, (examples, _) in pairs]
        return by_work(steps, num_processes, "steps")
    work = [tokens_of_round(one, examples, tokens) for one, (examples, tokens) in pairs]
    return by_work(work, num_processes, "tokens")
