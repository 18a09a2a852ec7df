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
    received = [clients.shared(f).to(clients.device) for f in factors]
    totals = [torch.zeros_like(one, dtype=torch.int64) for one in received]
    for client in participants:
        changes = [
            clients.on_device(client, factor).double() - one.double()
            for factor, one in zip(factors, received, strict=True)
        ]
        norm = math.hypot(*map(_norm, changes))
        if not math.isfinite(norm):
            continue
        balance += 1 if norm <= clip else -1
        scale = UNITS * _SLACK * (1 / clip if norm <= clip else 1 / norm)
        for change, total in zip(changes, totals, strict=True):
            total += (change * scale).trunc().to(torch.int64)
    return torch.cat(totals), balance


def _norm(change: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(change))
