"""The sums of a round for each client, by column.

They add up over steps, so that an interrupted round goes on from its sums.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# What a round notes of each client, one column each. They add up over steps, so that a round which
# was interrupted goes on from its sums.
FIELDS = ("steps", "loss_sum", "supervised", "norm_sum", "first_norm", "tokens", "slots", "is_bad")
STEPS, LOSS_SUM, SUPERVISED, NORM_SUM, FIRST_NORM, TOKENS, SLOTS, IS_BAD = range(len(FIELDS))

Ledger = NDArray[np.float64]
"""(N, len(FIELDS)): the sums of a round for all clients. A process fills the rows of its own."""


def new_ledger(num_clients: int) -> Ledger:
    """A ledger of a round that has not begun."""
    return np.zeros((num_clients, len(FIELDS)))
