"""One round of a process's clients: optimizer steps on their own data, nothing communicated.

Clients share passes through the backbone: a pass holds the rows of C clients, and the loss is the
sum over clients of each client's mean over its own supervised tokens. The backbone is frozen and
treats rows separately, so no gradient crosses from one client to another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch

from sfed.clients import optimizer
from sfed.clients.state import Rows
from sfed.clients.store import groups
from sfed.data import batches
from sfed.data.batches import Order
from sfed.data.tokenize import Row
from sfed.distributed.shutdown import StopRequest
from sfed.distributed.world import all_gather_rows
from sfed.federated.context import Run
from sfed.federated.round_stats import (
    FIELDS,
    FIRST_NORM,
    IS_BAD,
    LOSS_SUM,
    NORM_SUM,
    SLOTS,
    STEPS,
    SUPERVISED,
    TOKENS,
    Ledger,
)
from sfed.models import objective
from sfed.utils.rng import Stream, derive

OnStep = Callable[[int, int, Callable[[], float], int], None]
"""Called after a step with (steps done, steps of the round, how to read its mean loss, tokens)."""


def train_round(
    run: Run, round_index: int, ledger: Ledger, stop: StopRequest, on_step: OnStep
) -> bool:
    """Train this process's clients of the round, from wherever the ledger says they are.

    Under a sharded backbone all processes call it, and make equally many passes.

    Args:
        run: the run.
        round_index: 0-based.
        ledger: filled in place for this process's clients.
        stop: asks before each step whether to stop here.
        on_step: told about each step.

    Returns:
        Whether the round is complete for this process's clients, that is, nobody asked to stop.
    """
    trained, cohort = run.trained_in(round_index), run.cohort(round_index)
    planned = _planned_steps(run, cohort, ledger)
    run.backbone.training()
    done, mine = 0, _groups_of(run, run.clients.own, cohort)
    with closing(run.clients.passes(mine, trained)) as passes:
        for rows in passes:
            run.adapters.bind(rows.values, rows.grads, trained)
            work = _GroupWork(run, round_index, rows, trained, ledger)
            stopped = False
            for step in work.steps_left():
                place = f"round {round_index + 1}, step {step + 1} of {work.last_step}"
                if stopped := stop.due(place):
                    break
                work.step(step)
                on_step(step + 1, work.last_step, work.latest_loss, work.latest_tokens)
                done += 1
            work.close()
            if stopped:
                return False
    for company in range(done, planned if run.backbone.sharding.is_sharded else done):
        if stop.due(f"round {round_index + 1}, keeping company in pass {company + 1}"):
            return False
        for _ in range(run.passes_per_step):
            _keep_company(run, trained)
    return True


def exchange(run: Run, ledger: Ledger) -> Ledger:
    """Fill in the rows of other processes' clients. Collective; sums of losses, no factor."""
    widest = max(len(own) for own in run.placement())
    mine = torch.zeros(widest, len(FIELDS), dtype=torch.float64)
    own = run.clients.own
    mine[: len(own)] = torch.from_numpy(ledger[own.start : own.stop])
    for clients, rows in zip(run.placement(), all_gather_rows(run.world, mine), strict=True):
        ledger[clients.start : clients.stop] = rows[: len(clients)].numpy()
    return ledger


def is_complete(run: Run, round_index: int, ledger: Ledger) -> bool:
    """Whether every client of the round has made all of its steps."""
    return all(
        ledger[client, STEPS] >= run.local_steps(client) for client in run.cohort(round_index)
    )


def _groups_of(run: Run, own: range, cohort: tuple[int, ...]) -> list[tuple[int, ...]]:
    mine = [client for client in cohort if client in own]
    return list(groups(mine, run.clients_per_pass(own)))


def _planned_steps(run: Run, cohort: tuple[int, ...], ledger: Ledger) -> int:
    """The most steps that any process makes: known to all without a word.

    It follows from the sizes of the clients' data, which everybody knows.
    """
    most = 0
    for own in run.placement():
        steps = 0
        for group in _groups_of(run, own, cohort):
            last = max(run.local_steps(client) for client in group)
            first = min(int(ledger[client, STEPS]) for client in group)
            steps += last - first
        most = max(most, steps)
    return most


def _keep_company(run: Run, trained: tuple[str, ...]) -> None:
    """A pass for the sake of other processes, which gather weights with this one.

    It touches no client: its gradients go to a spare row.
    """
    device = run.world.device
    values, grads = (torch.zeros(1, run.clients.layout.size, device=device) for _ in range(2))
    run.adapters.bind(values, grads, trained)
    batch = batches.empty(1, with_targets=run.task.is_classification).to(device)
    run.adapters.context.dropout_seeds = None
    torch.autograd.backward(objective.row_losses(run.backbone, batch).sum())


@dataclass
class _Sums:
    """A group's sums of the round so far, on the device: reading them would wait for it."""

    loss: torch.Tensor
    supervised: torch.Tensor
    norm: torch.Tensor
    first_norm: torch.Tensor
    is_bad: torch.Tensor


class _GroupWork:
    """The steps of the clients that share passes."""

    def __init__(
        self,
        run: Run,
        round_index: int,
        rows: Rows,
        trained: tuple[str, ...],
        ledger: Ledger,
    ) -> None:
        self._run, self._round_index, self._rows = run, round_index, rows
        self._trained, self._ledger = trained, ledger
        seed = run.config.seed
        self._orders = {c: Order(seed, c, len(run.data.train[c])) for c in rows.clients}
        self._first = {c: int(ledger[c, STEPS]) for c in rows.clients}
        self._last = {c: run.local_steps(c) for c in rows.clients}
        self.last_step = max(self._last.values())
        device = run.world.device
        kept = torch.from_numpy(ledger[list(rows.clients)]).to(device)
        self._sums = _Sums(
            kept[:, LOSS_SUM],
            kept[:, SUPERVISED],
            kept[:, NORM_SUM],
            kept[:, FIRST_NORM],
            kept[:, IS_BAD].bool(),
        )
        self._latest_losses = torch.zeros(len(rows.clients), device=device)
        self._start = rows.values.clone()
        self.latest_tokens = 0

    def steps_left(self) -> range:
        """The steps from the first that some client has still to make."""
        return range(min(self._first.values()), self.last_step)

    def latest_loss(self) -> float:
        """Mean loss of the latest step over the group. Waits for the device."""
        return float(self._latest_losses.mean())

    def step(self, step: int) -> None:
        """One optimizer step of every client that has this step to make."""
        run, clients = self._run, self._rows.clients
        active = [self._first[c] <= step < self._last[c] for c in clients]
        drawn = [self._draw(c, step) if on else [] for c, on in zip(clients, active, strict=True)]
        supervised_C = torch.tensor(
            [batches.supervised_count(rows) for rows in drawn], device=run.world.device
        )
        losses_C = self._backward(drawn, supervised_C, step)
        norms_C = optimizer.gradient_norms(self._rows, run.clients.layout, self._trained)
        active_C = torch.tensor(active, device=run.world.device)
        finite_C = torch.isfinite(losses_C) & torch.isfinite(norms_C)
        # A client that turned non-finite rests until the round ends.
        self._sums.is_bad |= active_C & ~finite_C
        taken_C = active_C & ~self._sums.is_bad
        optimizer.step(
            self._rows,
            run.clients.layout,
            self._trained,
            run.config.train,
            self._learning_rates(step),
            norms_C,
            taken_C,
        )
        self._latest_losses = losses_C
        self._sums.loss += (losses_C * supervised_C).where(taken_C, 0.0)
        self._sums.norm += norms_C.where(taken_C, 0.0)
        if step == 0:
            self._sums.first_norm += norms_C.where(taken_C, 0.0)
        self._sums.supervised += supervised_C.where(taken_C, 0.0)
        self._count(drawn, active)

    def _count(self, drawn: list[list[Row]], active: list[bool]) -> None:
        """Note what every client has read; on the host, without waiting for the device."""
        self.latest_tokens = 0
        for client, rows, on in zip(self._rows.clients, drawn, active, strict=True):
            tokens = sum(len(row.ids) for row in rows)
            self._run.clients.examples_drawn[client] += len(rows)
            self._ledger[client, STEPS] += on
            self._ledger[client, TOKENS] += tokens
            self.latest_tokens += tokens

    def _draw(self, client: int, step: int) -> list[Row]:
        """A client's rows of a step; the last step of an epoch may have fewer."""
        run = self._run
        size, examples = run.config.train.batch_size, run.data.train[client]
        epochs = run.config.train.local_epochs
        if epochs is not None:
            size = min(size, len(examples) * epochs - step * size)
        return batches.draw(
            examples, self._orders[client], run.clients.examples_drawn[client], size
        )

    def _backward(
        self, drawn: list[list[Row]], supervised_C: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Add each client's gradient of its mean loss to its row; returns the (C,) mean losses.

        The mean is over the supervised tokens of the whole step, so splitting a step into micro
        passes does not change it.
        """
        run = self._run
        micro = run.config.train.micro_batch_size or run.config.train.batch_size
        total_C = supervised_C.clamp(min=1.0)
        losses_C = torch.zeros_like(total_C)
        self._rows.grads.zero_()
        for number in range(run.passes_per_step):
            some = [rows[number * micro : (number + 1) * micro] for rows in drawn]
            most, with_targets = max(1, *map(len, some)), run.task.is_classification
            batch = batches.collate(some, most, with_targets=with_targets, packing=run.packing)
            self._ledger[list(self._rows.clients), SLOTS] += batch.slots // len(some)
            batch = batch.to(run.world.device)
            run.adapters.context.dropout_seeds = self._dropout_seeds(step, number)
            row_losses = objective.row_losses(run.backbone, batch)
            mean_C = row_losses.view(len(some), -1).sum(dim=1) / total_C
            torch.autograd.backward(mean_C.sum())
            losses_C += mean_C.detach()
        return losses_C

    def _dropout_seeds(self, step: int, number: int) -> tuple[int, ...] | None:
        if self._run.config.lora.dropout == 0.0:
            return None
        words = (self._run.config.seed, self._round_index, step, number)
        return tuple(derive(Stream.DROPOUT, *words, client) for client in self._rows.clients)

    def _learning_rates(self, step: int) -> torch.Tensor:
        """(C,) learning rates: the schedule runs over the whole run, per client."""
        config = self._run.config
        rates = [
            optimizer.learning_rate(
                config.train,
                config.federated.num_rounds,
                self._round_index + min(step / self._last[client], 1.0),
            )
            for client in self._rows.clients
        ]
        return torch.tensor(rates, device=self._run.world.device)

    def close(self) -> None:
        """Write the sums into the ledger; who turned non-finite is back where the round began."""
        self._sums.is_bad |= ~torch.isfinite(self._rows.values).all(dim=1)
        self._rows.put_back(self._sums.is_bad, self._start)
        for column, values in (
            (LOSS_SUM, self._sums.loss),
            (SUPERVISED, self._sums.supervised),
            (NORM_SUM, self._sums.norm),
            (FIRST_NORM, self._sums.first_norm),
            (IS_BAD, self._sums.is_bad),
        ):
            self._ledger[list(self._rows.clients), column] = values.double().cpu().numpy()
