"""Held-out loss, of each client's own adapter on its own data and of the global adapter on all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sfed import aggregation, batches
from sfed.clients import groups
from sfed.distributed import all_gather_rows
from sfed.run import Run

_LOSS_SUM, _SUPERVISED = 0, 1
Sums = NDArray[np.float64]
"""(N, 2): each client's summed held-out loss in nats and its supervised tokens."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses by kind of adapter, ``personal`` and ``global``."""

    sums: dict[str, Sums]
    communicated_bytes: int
    """Bytes that the global adapter took to put together; training never sends them."""

    def client_loss(self, kind: str, client: int) -> float | None:
        """Mean nats per token on one client's held-out data; None where it has none."""
        loss, tokens = self.sums[kind][client]
        return float(loss / tokens) if tokens else None

    def loss(self, kind: str) -> float | None:
        """Mean nats per token over all held-out tokens of all clients."""
        loss, tokens = self.sums[kind].sum(axis=0)
        return float(loss / tokens) if tokens else None


def evaluate(run: Run, *, untrained: bool = False) -> Evaluation:
    """Evaluate all clients, whoever trained last. Collective.

    Under a sharded backbone all processes make equally many passes.

    Args:
        run: the run.
        untrained: B = 0 on all clients, so that every adapter is the backbone itself and one
            measurement serves all of them.
    """
    run.backbone.evaluating()
    run.adapters.context.dropout_seeds = None
    sums: dict[str, Sums] = {}
    communicated = 0
    with torch.no_grad():
        if "personal" in run.config.evaluation.adapters:
            sums["personal"] = _over_clients(run, None)
        wants_global = "global" in run.config.evaluation.adapters and run.method.has_global_adapter
        if wants_global and untrained and sums:
            sums["global"] = sums["personal"]
        elif wants_global:
            everyone = tuple(range(run.num_clients))
            row = aggregation.global_row(run.world, run.clients, run.weights(everyone))
            columns = run.clients.layout.columns("B")
            communicated = 4 * (columns.stop - columns.start)
            sums["global"] = _over_clients(run, row[None])
    run.backbone.release()
    return Evaluation(sums, communicated)


def _over_clients(run: Run, shared_row: torch.Tensor | None) -> Sums:
    """Sum the held-out losses of all clients, each with its own adapter or all with one."""
    own = run.clients.own
    mine = torch.zeros(max(map(len, run.placement())), 2, dtype=torch.float64)
    done = 0
    for group in groups(own, run.clients_per_pass(own)):
        row = run.clients.load_values(group) if shared_row is None else shared_row
        run.adapters.bind(row)
        for number in range(_passes(run, group)):
            index = [client - own.start for client in group]
            mine[index] += _one_pass(run, group, number)
            done += 1
    for _ in range(done, _planned_passes(run) if run.backbone.sharding.is_sharded else done):
        run.adapters.bind(run.clients.values[:1].to(run.world.device))
        batch = batches.empty(1).to(run.world.device)
        run.backbone.token_losses(batch.input_ids, batch.labels)
    sums = np.zeros((run.num_clients, 2))
    for clients, rows in zip(run.placement(), all_gather_rows(run.world, mine), strict=True):
        sums[clients.start : clients.stop] = rows[: len(clients)].numpy()
    return sums


def _one_pass(run: Run, group: tuple[int, ...], number: int) -> torch.Tensor:
    """Return (C, 2) sums of the group's batch of this number."""
    size = run.config.evaluation.batch_size
    rows_by_client = []
    for client in group:
        examples = run.data.held_out[client]
        # In the order of lengths, so that a batch holds little padding.
        order = np.argsort(examples.lengths[: _count(run, client)], kind="stable")
        positions = order[number * size : (number + 1) * size]
        rows_by_client.append([examples.row(int(position)) for position in positions])
    batch = batches.collate(rows_by_client, max(1, *map(len, rows_by_client))).to(run.world.device)
    losses = run.backbone.token_losses(batch.input_ids, batch.labels)
    sums = torch.zeros(len(group), 2, dtype=torch.float64)
    sums[:, _LOSS_SUM] = losses.double().view(len(group), -1).sum(dim=1).cpu()
    supervised = [batches.supervised_tokens(rows) for rows in rows_by_client]
    sums[:, _SUPERVISED] = torch.tensor(supervised)
    return sums


def _count(run: Run, client: int) -> int:
    """Held-out examples that are used of a client; known to every process for all clients."""
    limit = run.config.evaluation.max_examples
    count = run.data.eval_counts[client]
    return count if limit is None else min(count, limit)


def _passes(run: Run, group: tuple[int, ...]) -> int:
    size = run.config.evaluation.batch_size
    return max(-(-_count(run, client) // size) for client in group)


def _planned_passes(run: Run) -> int:
    """The most passes that any process makes."""
    return max(
        sum(_passes(run, group) for group in groups(own, run.clients_per_pass(own)))
        for own in run.placement()
    )
