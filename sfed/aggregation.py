"""The federated mean: one flat buffer, one collective, nothing else leaves a client.

mean = sum_i p_i x_i,   sum_i p_i = 1 over the clients of the round          (FedAvg, 1602.05629)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfed.adapters import Layout
from sfed.clients import ClientRows
from sfed.distributed import World, all_reduce_sum


def normalised_weights(
    num_clients: int, participants: Sequence[int], example_counts: Sequence[int] | None
) -> list[float]:
    """Return each client's weight in the mean, 0 for who does not take part.

    Args:
        num_clients: N.
        participants: the clients of the mean.
        example_counts: (N,) training examples for weights in proportion to them; None = equal.
    """
    weights = [0.0] * num_clients
    for client in participants:
        weights[client] = 1.0 if example_counts is None else float(example_counts[client])
    total = sum(weights)
    return [weight / total for weight in weights]


def mean_over_clients(
    world: World, rows: torch.Tensor, own_weights: Sequence[float]
) -> torch.Tensor:
    """Return the weighted mean of the rows of all clients of all processes.

    Collective: one all_reduce of one flat fp32 buffer, whose size does not depend on the number of
    clients. The result is bitwise the same on every process.

    Args:
        world: the processes.
        rows: (C, M) fp32 rows of this process's clients.
        own_weights: (C,) their weights; those of all processes together sum to 1.

    Returns:
        (M,) fp32 on the processes' device.
    """
    weights = torch.tensor(list(own_weights), dtype=rows.dtype, device=rows.device)
    # A client of weight 0 may hold NaN, which 0 * NaN would spread.
    taking_part = weights > 0
    flat = weights[taking_part] @ rows[taking_part]
    return all_reduce_sum(flat.to(world.device))


def share(
    world: World, clients: ClientRows, factors: Sequence[str], weights: Sequence[float]
) -> int:
    """Replace the given factors of every client by their weighted mean. Collective.

    Who did not take part receives the mean too, and keeps its other factor.

    Args:
        world: the processes.
        clients: of this process.
        factors: what is averaged: ("A",), ("B",), both or nothing.
        weights: (N,) of all clients, summing to 1.

    Returns:
        Bytes of the message.
    """
    if not factors:
        return 0
    columns = shared_columns(clients.layout, factors)
    own_weights = [weights[client] for client in clients.own]
    mean = mean_over_clients(world, clients.values[:, columns], own_weights)
    clients.values[:, columns] = mean.to(clients.values.device)
    return mean.numel() * mean.element_size()


def shared_columns(layout: Layout, factors: Sequence[str]) -> slice:
    """The columns of a row that hold these factors: neighbours, so one slice."""
    slices = [layout.columns(factor) for factor in factors]
    return slice(min(s.start for s in slices), max(s.stop for s in slices))


def global_row(world: World, clients: ClientRows, weights: Sequence[float]) -> torch.Tensor:
    """Return the global adapter (A, mean B): (layout.size,). Collective.

    Exact once A is the same on all clients: mean_i(B_i A) = (mean_i B_i) A. Only evaluation and
    export ask for it; training never does. Only the B half is communicated.
    """
    b = clients.layout.columns("B")
    own_weights = [weights[client] for client in clients.own]
    mean_b = mean_over_clients(world, clients.values[:, b], own_weights)
    row = clients.row(clients.own.start).to(world.device, copy=True)
    row[b] = mean_b
    return row
