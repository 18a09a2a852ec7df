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
    world: World, blocks: Sequence[torch.Tensor], own_weights: Sequence[float]
) -> list[torch.Tensor]:
    """Return the weighted mean of the rows of all clients of all processes.

    Collective: one all_reduce of one flat fp32 buffer, whose size does not depend on the number of
    clients. The result is bitwise the same on every process.

    Args:
        world: the processes.
        blocks: (C, M) fp32 rows of this process's clients each, such as all A and all heads.
        own_weights: (C,) their weights; those of all processes together sum to 1.

    Returns:
        (M,) fp32 on the processes' device, one for each block.
    """
    device, dtype = blocks[0].device, blocks[0].dtype
    weights = torch.tensor(list(own_weights), dtype=dtype, device=device)
    # A client of weight 0 may hold NaN, which 0 * NaN would spread.
    taking_part = weights > 0
    means = [weights[taking_part] @ block[taking_part] for block in blocks]
    flat = all_reduce_sum(torch.cat(means).to(world.device))
    return list(torch.split(flat, [block.shape[1] for block in blocks]))


def share(
    world: World, clients: ClientRows, factors: Sequence[str], weights: Sequence[float]
) -> int:
    """Replace the given factors of every client by their weighted mean. Collective.

    Who did not take part receives the mean too, and keeps what is not averaged.

    Args:
        world: the processes.
        clients: of this process.
        factors: what is averaged: some of A, B and head, or nothing.
        weights: (N,) of all clients, summing to 1.

    Returns:
        Bytes of the message.
    """
    if not factors:
        return 0
    own_weights = [weights[client] for client in clients.own]
    blocks = [clients.values[:, clients.layout.columns(factor)] for factor in factors]
    means = mean_over_clients(world, blocks, own_weights)
    for block, mean in zip(blocks, means, strict=True):
        block.copy_(mean)
    return message_bytes(clients.layout, factors)


def message_bytes(layout: Layout, factors: Sequence[str]) -> int:
    """Bytes of the message that averages these factors, in fp32."""
    return sum(4 * (layout.columns(f).stop - layout.columns(f).start) for f in factors)


def global_row(world: World, clients: ClientRows, weights: Sequence[float]) -> torch.Tensor:
    """Return the global adapter (A, mean B, mean head): (layout.size,). Collective.

    Exact once A is the same on all clients: mean_i(B_i A) = (mean_i B_i) A. The mean of the heads
    is FedAvg's, which is not exact. Only evaluation and export ask for it; training never does. A
    is not communicated.
    """
    columns = [clients.layout.columns(factor) for factor in personal_factors(clients.layout)]
    own_weights = [weights[client] for client in clients.own]
    blocks = [clients.values[:, some] for some in columns]
    row = clients.row(clients.own.start).to(world.device, copy=True)
    for some, mean in zip(columns, mean_over_clients(world, blocks, own_weights), strict=True):
        row[some] = mean
    return row


def similarity(world: World, clients: ClientRows) -> dict[str, float | None]:
    """Return the mean cosine between two clients' A, and between their B. Collective.

    From the sum s of the n clients' unit vectors: (|s|^2 - n) / (n (n - 1)). Asked for between
    local training and the mean, which makes all A the same; for evaluation only. None where fewer
    than two clients hold anything but zeros.
    """
    blocks = [clients.values[:, clients.layout.columns(factor)] for factor in ("A", "B")]
    sums = []
    for block in blocks:
        norms = torch.linalg.vector_norm(block, dim=1, keepdim=True)
        usable = torch.isfinite(norms) & (norms > 0)
        units = torch.where(usable, block / norms, 0.0)
        sums += [units.sum(dim=0), usable.sum(dim=0).to(block.dtype)]
    flat = all_reduce_sum(torch.cat(sums).to(world.device))
    found: dict[str, float | None] = {}
    for name, part in zip("ab", torch.split(flat, [b.shape[1] + 1 for b in blocks]), strict=True):
        count = float(part[-1])
        square = float(part[:-1].double().square().sum())
        found[name] = (square - count) / (count * (count - 1)) if count > 1 else None
    return found


def personal_factors(layout: Layout) -> tuple[str, ...]:
    """The factors of which the global adapter holds a mean."""
    return tuple(factor for factor in layout.factors if factor != "A")
