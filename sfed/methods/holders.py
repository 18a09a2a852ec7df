"""Means of factors of which not all clients hold all rows, since their LoRA ranks differ.

Client i holds rows l < r_i of A and columns l < r_i of B, and zeros beyond. With H_l the clients of
the mean that hold row l:

    over the holders    sum_i p_i x_i[l] / sum_{i in H_l} p_i
    zero-padded         sum_i p_i x_i[l]                       (HetLoRA, arXiv 2401.06432)

A row that no client of the mean holds keeps its value in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sfed.lora.layout import Layout


@dataclass(frozen=True)
class Holders:
    """Who holds the rows of a mean. Ranks and weights are known to all processes."""

    layout: Layout
    weights: Sequence[float]
    """(N,) of all clients, summing to 1; 0 for who is not in the mean."""
    zero_padded: bool = False
    """Whether rows that a client does not hold count as zeros of it."""

    def mean(self, factor: str, total: torch.Tensor, former: torch.Tensor) -> torch.Tensor:
        """The mean of a factor from its weighted sum; ``total`` itself, changed.

        Args:
            factor: A, B or head.
            total: (parameters of the factor,) sum_i p_i x_i, with zeros beyond the clients' ranks.
            former: same shape, on any device, the common value before the round.
        """
        if not self.layout.has_mixed_ranks:
            return total
        if not self.zero_padded:
            held_R = self._held(total)
            for view in self.layout.along_rank(factor, total[None]):
                view.div_(torch.where(held_R > 0, held_R, 1.0))
        return self.keep(factor, total, former)

    def keep(self, factor: str, values: torch.Tensor, former: torch.Tensor) -> torch.Tensor:
        """Let rows that no client of the mean holds be what they were; ``values`` itself, changed.

        Args:
            factor: A, B or head.
            values: (parameters of the factor,).
            former: same shape, on any device, before the round.
        """
        if not self.layout.has_mixed_ranks:
            return values
        held_R = self._held(values)
        views = self.layout.along_rank(factor, values[None])
        formers = self.layout.along_rank(factor, former[None].to(values.device))
        for view, before in zip(views, formers, strict=True):
            view.copy_(torch.where(held_R > 0, view, before))
        return values

    def _held(self, like: torch.Tensor) -> torch.Tensor:
        return sums_by_rank(self.layout, self.weights).to(like.device, like.dtype)


def sum_of_common_b(
    layout: Layout, common: torch.Tensor, client_weights: Sequence[float]
) -> torch.Tensor:
    """The weighted sum of what clients hold of a common B: (parameters of B,), a new tensor.

    Args:
        layout: of a client's row.
        common: (parameters of B,).
        client_weights: (N,) of any sum.
    """
    scales = layout.b_scales or [1.0] * len(client_weights)
    taken = [weight * scale for weight, scale in zip(client_weights, scales, strict=True)]
    total, factor_R = common.clone(), sums_by_rank(layout, taken).to(common.device, common.dtype)
    for view in layout.along_rank("B", total[None]):
        view.mul_(factor_R)
    return total


def sums_by_rank(layout: Layout, weights: Sequence[float]) -> torch.Tensor:
    """(R,) fp64: sums of weights (N,) over those clients that hold a row of A."""
    clients = range(len(weights))
    sums = [
        math.fsum(weights[client] for client in clients if layout.rank_of(client) > row)
        for row in range(layout.lora_rank)
    ]
    return torch.tensor(sums, dtype=torch.float64)
