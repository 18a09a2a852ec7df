"""Which clients take part in a round.

A pure function of its arguments: every process computes the same cohort.
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
