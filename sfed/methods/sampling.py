"""Which clients take part in a round, and which are evaluated.

Pure functions of their arguments: every process computes the same clients.
"""

from __future__ import annotations

from sfed.utils import rng
from sfed.utils.rng import Stream


def cohort(
    seed: int, round_index: int, num_clients: int, clients_per_round: int | None
) -> tuple[int, ...]:
    """Return the sorted clients of a 0-based round, a function of (seed, round) alone."""
    if clients_per_round is None or clients_per_round >= num_clients:
        return tuple(range(num_clients))
    generator = rng.generator(Stream.COHORT, seed, round_index)
    drawn = generator.choice(num_clients, size=clients_per_round, replace=False)
    return tuple(sorted(int(client) for client in drawn))


def evaluated(seed: int, num_clients: int, count: int | None) -> tuple[int, ...]:
    """Return the sorted clients that are evaluated: all, or so many drawn from the seed alone.

    The same in every round and at every resume, so that the rounds of a run can be compared.
    """
    if count is None or count >= num_clients:
        return tuple(range(num_clients))
    drawn = rng.generator(Stream.EVALUATED, seed).choice(num_clients, size=count, replace=False)
    return tuple(sorted(int(client) for client in drawn))
