"""The sum of the clients' clipped changes, in whole numbers.

    d_i = w_i - w   over all shared factors as one vector,   sum_i d_i min(1, C / |d_i|)

in units of C / 2^40, cut towards 0: so a client's part is never longer than C, in exact arithmetic;
and a sum of whole numbers has the same bits on any number of processes. The balance counts a change
within the clip as +1 and a longer one as -1: an adaptive clip follows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sfed.clients.store import ClientStore

UNITS = 2**40
"""Of the clip."""
_SLACK = 1 - 2.0**-30
"""For the round-off of a norm in fp64, of a billion numbers."""


def clipped_sum(
    clients: ClientStore, factors: Sequence[str], participants: Sequence[int], clip: float
) -> tuple[torch.Tensor, int]:
    """Return the sum of the clipped changes of clients of this process, and the balance.

    Args:
        clients: of this process; what they share is what they received.
        factors: that are shared, of M parameters together.
        participants: whose changes count; a change that is not finite counts nothing.
        clip: C.

    Returns:
        (M,) int64: the sum in units; how many more changes are within the clip than beyond it.
    """
    balance = 0
    totals = [torch.zeros_like(clients.shared(f), dtype=torch.int64) for f in factors]
    for client in participants:
        norm = math.hypot(*(_norm(_change(clients, client, f)) for f in factors))
        if not math.isfinite(norm):
            continue
        balance += 1 if norm <= clip else -1
        scale = UNITS * _SLACK * (1 / clip if norm <= clip else 1 / norm)
        for factor, total in zip(factors, totals, strict=True):
            total += (_change(clients, client, factor) * scale).trunc().to(torch.int64)
    return torch.cat(totals), balance


def _change(clients: ClientStore, client: int, factor: str) -> torch.Tensor:
    """A client's change of a factor since it received it: fp64."""
    return clients.factor(client, factor).double() - clients.shared(factor).double()


def _norm(change: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(change))
