"""The federated mean: one flat buffer, one collective, nothing else leaves a client.

mean = sum_i p_i x_i,   sum_i p_i = 1 over the clients of the round          (FedAvg, 1602.05629)

Of clients with different LoRA ranks, a row of A and a column of B is the mean over those that hold
it. A mean with zeros for the others would shrink it in every round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from sfed.clients.state import CONTROL, SERVER
from sfed.clients.store import ClientStore
from sfed.distributed.sync import gather_json, raise_everywhere
from sfed.distributed.world import World, all_reduce_sum
from sfed.lora.layout import Layout
from sfed.methods.holders import Holders, sum_of_common_b
from sfed.methods.server import ClientMeasure
from sfed.methods.server_optimizer import ServerOptimizer
from sfed.utils.errors import UserError


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


def measured_weights(
    world: World,
    clients: ClientStore,
    num_clients: int,
    participants: Sequence[int],
    measure: ClientMeasure,
) -> list[float]:
    """Return each client's weight in proportion to a measure of it: (N,), sum 1. Collective.

    Equal weights where the measure of every participant is 0.

    Args:
        world: the processes.
        clients: of this process.
        num_clients: N.
        participants: the clients of the mean.
        measure: of a client's factors.

    Raises:
        UserError: on every process, where a measure is no number >= 0.
    """
    own = [client for client in participants if client in clients.lines]
    with raise_everywhere(world, "the weights of the clients"):
        pairs = [(client, _measured(measure, clients, client)) for client in own]
    weights = [0.0] * num_clients
    for some in gather_json(world, "weights of the clients", pairs):
        for client, value in some:
            weights[client] = value
    total = math.fsum(weights)
    if total == 0:
        return normalised_weights(num_clients, participants, None)
    return [weight / total for weight in weights]


def _measured(measure: ClientMeasure, clients: ClientStore, client: int) -> float:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for piece in clients.layout.pieces:
        if piece.factor in ("A", "B"):
            values = piece.within(clients.layout, clients.factor(client, piece.factor))
            layers.setdefault(piece.layer, {})[piece.factor] = values
    value = float(measure(layers))
    if not 0 <= value < math.inf:
        raise UserError(f"the weight of client {client} by federated.method is {value}")
    return value


def weighted_sum(rows: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return sum_i w_i x_i, added up in order, one row at a time: (M,) in the rows' dtype.

    In fp64, so that it matters little which clients are on one process.

    Args:
        rows: at least one, (M,) fp32 each, made or read as they are needed. A row of weight 0 may
            hold NaN, which 0 * NaN would spread.
        weights: one for each row.
    """
    total: torch.Tensor | None = None
    for row, weight in zip(rows, weights, strict=True):
        total = torch.zeros_like(row, dtype=torch.float64) if total is None else total
        if weight > 0:
            total.add_(row, alpha=weight)
    assert total is not None
    return total.to(row.dtype)


def mean_over_clients(world: World, sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Add up the weighted sums of all processes, whose weights sum to 1 together.

    Collective: one all_reduce of one flat fp32 buffer, whose size does not depend on the number of
    clients. The result is bitwise the same on every process.

    Args:
        world: the processes.
        sums: this process's ``weighted_sum`` of each factor, (M,) fp32.

    Returns:
        (M,) fp32 on the processes' device, one for each sum.
    """
    flat = all_reduce_sum(torch.cat([one.to(world.device) for one in sums]))
    return list(torch.split(flat, [len(one) for one in sums]))


@dataclass(frozen=True)
class ServerSide:
    """What the server does beside the mean."""

    optimizer: ServerOptimizer | None = None
    """None = the mean itself is what all clients get."""
    controlled: Sequence[str] = ()
    """Factors whose control variates move in this round (SCAFFOLD)."""
    control_weights: Sequence[float] = ()
    """(N,) p_i, which sum to 1 over all N clients; 0 for who sends nothing in this round."""
    zero_padded: bool = False
    """As of ``Holders``."""


def share(
    world: World,
    clients: ClientStore,
    factors: Sequence[str],
    weights: Sequence[float],
    server: ServerSide = ServerSide(),
) -> int:
    """Replace the given factors of every client by their weighted mean. Collective.

    Or by what a server optimizer makes of it. The changes of control variates travel in the same
    message. What the server keeps is in ``clients.common_state``.

    Who did not take part receives the mean too, and keeps what is not averaged.

    Args:
        world: the processes.
        clients: of this process.
        factors: what is averaged: some of A, B and head, or nothing.
        weights: (N,) of all clients, summing to 1.
        server: what the server does beside the mean.

    Returns:
        Bytes of the message.
    """
    if not factors:
        return 0
    sums = [_own_sum(clients, factor, weights) for factor in factors]
    sums += [_control_sum(clients, f, server.control_weights) for f in server.controlled]
    found = mean_over_clients(world, sums)
    holders = Holders(clients.layout, weights, server.zero_padded)
    for factor, total in zip(factors, found, strict=False):
        mean = holders.mean(factor, total, clients.shared(factor))
        if server.optimizer is not None:
            mean = _stepped(clients, factor, mean, server.optimizer, holders)
        clients.set_shared(factor, mean)
    if server.controlled:
        _take_controls(clients, server, found[len(factors) :])
    return message_bytes(clients.layout, (*factors, *server.controlled))


def _stepped(
    clients: ClientStore,
    factor: str,
    mean: torch.Tensor,
    optimizer: ServerOptimizer,
    holders: Holders,
) -> torch.Tensor:
    """What a server optimizer makes of a factor's mean; its state moves on.

    Of rows that no client of the mean holds, neither value nor state moves.
    """
    before, prefix = clients.shared(factor).to(mean.device), f"{factor.lower()}_"
    kept = {name: clients.common_state.get(prefix + name) for name in SERVER}
    state = {name: tensor for name, tensor in kept.items() if tensor is not None}
    values, become = optimizer.step(before, mean, state)
    for name, tensor in become.items():
        former = state.get(name, optimizer.initial(name, tensor))
        clients.common_state[prefix + name] = holders.keep(factor, tensor, former)
    return holders.keep(factor, values, before)


def _control_sum(
    clients: ClientStore, factor: str, control_weights: Sequence[float]
) -> torch.Tensor:
    """The weighted sum of the changes of this process's control variates."""
    senders = [client for client in clients.own if control_weights[client] > 0]
    changes = (clients.control_change(client, factor) for client in senders)
    nothing = torch.zeros_like(clients.shared(factor), device=clients.device)
    return weighted_sum(chain([nothing], changes), [0.0, *(control_weights[c] for c in senders)])


def _take_controls(
    clients: ClientStore, server: ServerSide, changes: Sequence[torch.Tensor]
) -> None:
    """Move the control variates of the server and of the clients that sent."""
    for factor, change in zip(server.controlled, changes, strict=True):
        name = f"{factor.lower()}_{CONTROL}"
        before = clients.common_state.get(name, torch.zeros_like(change))
        clients.common_state[name] = before + change
    clients.take_controls({client for client in clients.own if server.control_weights[client] > 0})


def share_draws(
    world: World, clients: ClientStore, draws: Iterable[torch.Tensor], weights: Sequence[float]
) -> int:
    """Give every client the weighted mean of A's that are drawn one at a time. Collective.

    Args:
        world: the processes.
        clients: of this process.
        draws: an A for each of them, (parameters of A,) fp32; none is kept.
        weights: (N,) of all clients, summing to 1.

    Returns:
        Bytes of the message.
    """
    own_weights = [weights[client] for client in clients.own]
    [mean] = mean_over_clients(world, [weighted_sum(draws, own_weights)])
    holders = Holders(clients.layout, weights)
    clients.set_shared("A", holders.mean("A", mean, torch.zeros_like(mean)))
    return message_bytes(clients.layout, ("A",))


def _held(clients: ClientStore, factor: str) -> list[list[int]]:
    """This process's clients, with those together that hold the same values of a factor."""
    holders = clients.owners(factor)
    sharers: dict[int, list[int]] = {}
    for client in sorted(set(clients.own) - set(holders)):
        sharers.setdefault(clients.layout.rank_of(client), []).append(client)
    return [*sharers.values(), *([client] for client in holders)]


def _own_sum(clients: ClientStore, factor: str, weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum over this process's clients; those that hold nothing cost nothing."""
    held = _held(clients, factor)
    rows = (clients.on_device(some[0], factor) for some in held)
    return weighted_sum(rows, [math.fsum(weights[client] for client in some) for some in held])


def message_bytes(layout: Layout, factors: Sequence[str]) -> int:
    """Bytes of the message that averages these factors, in fp32."""
    return sum(4 * (layout.columns(f).stop - layout.columns(f).start) for f in factors)


def global_row(
    world: World,
    clients: ClientStore,
    weights: Sequence[float],
    own_factors: Sequence[str],
    gammas: Sequence[float] = (),
) -> torch.Tensor:
    """Return the global adapter (A, mean B, mean head): (layout.size,). Collective.

    Exact once A is the same on all clients: mean_i(B_i A) = (mean_i B_i) A. Where LoRA ranks
    differ, B is sum_i p_i gamma_i B_i, with zeros beyond each client's rank, and gamma is 1: the
    mean of gamma_i B_i A_i over clients whose A_i are the first rows of one A. The mean of the
    heads is FedAvg's, which is not exact. Only evaluation and export ask for it; training never
    does.

    Args:
        world: the processes.
        clients: of this process.
        weights: (N,) of all clients, summing to 1.
        own_factors: what clients hold their own of. The rest is on every process already, so
            nothing of it is communicated.
        gammas: (N,) of all clients; read where their ranks differ.
    """
    layout, holders = clients.layout, Holders(clients.layout, weights)
    row = torch.cat([clients.shared(factor).to(world.device) for factor in layout.factors])
    is_mixed = layout.has_mixed_ranks
    of_b = [w * g for w, g in zip(weights, gammas, strict=True)] if is_mixed else weights
    if own_factors:
        sums = [_own_sum(clients, f, of_b if f == "B" else weights) for f in own_factors]
        for factor, total in zip(own_factors, mean_over_clients(world, sums), strict=True):
            columns = layout.columns(factor)
            row[columns] = total if factor == "B" else holders.mean(factor, total, row[columns])
    if is_mixed and "B" not in own_factors:
        columns = layout.columns("B")
        row[columns] = sum_of_common_b(layout, row[columns], of_b)
    return row


def similarity(world: World, clients: ClientStore) -> dict[str, float | None]:
    """Return the mean cosine between two clients' A, and between their B. Collective.

    From the sum s of the n clients' unit vectors: (|s|^2 - n) / (n (n - 1)). Asked for between
    local training and the mean, which makes all A the same; for evaluation only. None where fewer
    than two clients hold anything but zeros.
    """
    sums: list[torch.Tensor] = []
    for factor in ("A", "B"):
        units = torch.zeros_like(clients.shared(factor), device=world.device)
        num = torch.zeros_like(units[:1])
        for some in _held(clients, factor):
            row = clients.on_device(some[0], factor)
            norm = torch.linalg.vector_norm(row)
            counts = (norm > 0) & (norm < math.inf)
            units.add_(torch.where(counts, row / norm, 0.0), alpha=len(some))
            num.add_(counts, alpha=len(some))
        sums += [units, num]
    flat = all_reduce_sum(torch.cat(sums))
    found: dict[str, float | None] = {}
    widths = [len(units) + 1 for units in sums[::2]]
    for name, part in zip("ab", torch.split(flat, widths), strict=True):
        count = float(part[-1])
        square = float(part[:-1].double().square().sum())
        found[name] = (square - count) / (count * (count - 1)) if count > 1 else None
    return found
