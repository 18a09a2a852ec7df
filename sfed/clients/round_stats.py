"""What a round notes of each client: sums over its steps, one column each.

An interrupted round resumes from its sums.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
"""(N,): one sum of every client."""


class RoundStats:
    """The sums of a round for all N clients. A process fills in those of its own clients."""

    COLUMNS = (
        "steps",
        "loss_sum",
        "supervised",
        "norm_sum",
        "first_norm",
        "tokens",
        "slots",
        "is_bad",
    )

    def __init__(self, table: NDArray[np.float64]) -> None:
        """Take the sums of a checkpoint; they are not copied.

        Args:
            table: (N, len(COLUMNS)).
        """
        self.table = table
        self.shadow_seconds = 0.0
        """Seconds that this process spent on passes without clients, which others wait for."""
        self.was_stopped = False
        """Whether a request to stop has ended the local steps: here, and once the sums of all
        processes are gathered, on any of them."""
        (
            self.steps,
            self.loss_sum,
            self.supervised,
            self.norm_sum,
            self.first_norm,
            self.tokens,
            self.slots,
            self.is_bad,
        ) = table.T

    steps: Column
    """Optimizer steps made."""
    loss_sum: Column
    """Nats over the supervised tokens, or the loss over the examples."""
    supervised: Column
    """What the loss is summed over."""
    norm_sum: Column
    """Gradient norms over the steps."""
    first_norm: Column
    """Gradient norm of the round's first step."""
    tokens: Column
    """Tokens read, without padding."""
    slots: Column
    """Tokens computed, padding included."""
    is_bad: Column
    """1 where a loss, a gradient or an adapter was not finite."""

    @classmethod
    def empty(cls, num_clients: int) -> RoundStats:
        """The sums of a round that has not begun."""
        return cls(np.zeros((num_clients, len(cls.COLUMNS))))
