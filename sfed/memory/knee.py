"""How many clients share a pass where more would fit: the fewest that are about as fast as any.

More clients in a pass save launches and readings of the weights, and cost memory and slots: all
have equally many rows of one width, so the longest examples of any client set what all compute.
Both are known before the first step, the slots exactly, from the lengths of what will be drawn, and
the rest from the size of the model (``pass_time``). Nothing is timed: two starts of one command
would choose differently on a busy machine, and their numbers would differ by round-off.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfed.clients.store import groups
from sfed.data.batches import Order, pass_size
from sfed.data.packing import UNBOUNDED, Packing
from sfed.data.tokenize import Examples
from sfed.distributed.sync import gather_json
from sfed.distributed.world import World
from sfed.memory.clients_per_pass import ClientsPerPass
from sfed.memory.pass_time import PassTime

GOOD_SHARE = 0.97
"""Of the best rate that is good enough to be content with fewer clients."""
# Steps are looked at until they hold so many draws of a client, but no more than so many steps.
_DRAWS, _MOST_STEPS = 128, 16

Lengths = Sequence[Sequence[int]]
"""Tokens of what each client reads in a step."""


@dataclass(frozen=True)
class Reading:
    """How the clients of a run read their examples."""

    seed: int
    batch_sizes: Sequence[int]
    """Examples of an optimizer step, by client."""
    micro_batch_size: int | None
    """Examples of a client and pass; None = all of a step."""
    packing: Packing | None
    """How examples share rows; None = each has a row of its own."""
    context: int = UNBOUNDED
    """Of the model, in tokens."""


@dataclass(frozen=True)
class Typical:
    """Steps of the clients of a process, and what their passes take."""

    reading: Reading
    pass_time: PassTime
    steps: Sequence[Lengths]

    @property
    def tokens(self) -> float:
        """That these clients read in a step; the mean."""
        return sum(sum(map(sum, clients)) for clients in self.steps) / len(self.steps)

    def seconds(self, size: int) -> float:
        """Seconds of an optimizer step, ``size`` clients in a pass; the mean."""
        total = 0.0
        for clients in self.steps:
            # Of very many clients, enough whole groups to tell.
            some = clients[: max(size, _DRAWS // size * size)]
            seconds = (
                self._seconds_of_group([clients[place] for place in group])
                for group in groups(range(len(some)), size)
            )
            total += sum(seconds) * len(clients) / max(1, len(some))
        return total / len(self.steps)

    def _seconds_of_group(self, clients: Lengths) -> float:
        """Seconds of the passes of clients that share them."""
        reading, most, seconds = self.reading, max(map(len, clients)), 0.0
        micro = reading.micro_batch_size or most
        for first in range(0, most, micro):
            some = [lengths[first : first + micro] for lengths in clients]
            size = pass_size(some, max(1, *map(len, some)), reading.packing, reading.context)
            seconds += self.pass_time.seconds(size)
        return seconds


def typical_steps(
    reading: Reading, train: Mapping[int, Examples], own: Sequence[int], present: int
) -> list[Lengths]:
    """What the clients of a process read in the first steps, if ``present`` of them take part.

    Args:
        reading: of the run.
        train: the examples of each client.
        own: the clients of this process.
        present: how many of them train in a round.
    """
    orders = {client: Order(reading.seed, client, len(train[client])) for client in own}
    lengths = {client: train[client].lengths for client in own}
    turns = itertools.cycle(own)

    def read(client: int, step: int) -> list[int]:
        count = reading.batch_sizes[client]
        places = range(step * count, (step + 1) * count)
        return [int(lengths[client][orders[client].at(place)]) for place in places]

    num_steps = max(1, min(_MOST_STEPS, _DRAWS // max(1, present)))
    return [
        [read(client, step) for client in itertools.islice(turns, present)]
        for step in range(num_steps)
    ]


def sizes_up_to(most: int, present: int) -> list[int]:
    """Numbers of clients per pass that are looked at: even shares of those who are there.

    Args:
        most: that fit into a pass.
        present: clients of a round on the process that has most of them.
    """
    num_groups, found = max(1, -(-present // most)), {1}
    while num_groups < present:
        found.add(-(-present // num_groups))
        num_groups *= 2
    return sorted(found)


def smallest_good(limit: ClientsPerPass, rates: Mapping[int, float]) -> ClientsPerPass:
    """Choose the smallest size whose rate is nearly the best.

    Args:
        limit: as many as fit.
        rates: tokens per second by clients per pass; the largest size stands for the limit.
    """
    fastest, largest = max(rates, key=lambda size: rates[size]), max(rates)
    best = rates[fastest]
    chosen = min(size for size, rate in rates.items() if rate >= GOOD_SHARE * best)
    told = (
        f"{rates[chosen]:,.0f} tokens/s are expected with {chosen} (a model, nothing is timed), "
        f"{100 * rates[chosen] / best:.0f} % of the best, {best:,.0f} with {fastest}"
    )
    if chosen == largest:
        return ClientsPerPass(limit.clients_per_pass, f"{told}; {limit.reason}")
    most = "" if fastest == largest else f", and {rates[largest]:,.0f} with {largest}"
    return ClientsPerPass(chosen, f"{told}{most}; {limit.reason}")


def choose(
    world: World, limit: ClientsPerPass, sizes: Sequence[int], own: Typical
) -> ClientsPerPass:
    """Choose how many clients share a pass, from those that fit. Collective.

    A round waits for its slowest process, so the rate is that of all tokens over its seconds.

    Args:
        world: the processes.
        limit: as many as fit.
        sizes: that are looked at; the largest stands for the limit.
        own: steps of the clients of this process.
    """
    mine = [own.tokens, [own.seconds(size) for size in sizes]]
    tokens, seconds = zip(*gather_json(world, "clients per pass", mine), strict=True)
    slowest = map(max, zip(*seconds, strict=True))
    rates = {size: sum(tokens) / one for size, one in zip(sizes, slowest, strict=True)}
    return smallest_good(limit, rates)
