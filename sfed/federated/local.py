"""One round of a process's clients: optimizer steps on their own data, nothing communicated.

Clients share passes through the backbone: a pass holds the rows of C clients, and the loss is the
sum over clients of each client's mean over its own supervised tokens. The backbone is frozen and
treats rows separately, so no gradient crosses from one client to another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

import torch

from sfed.clients.local_terms import LocalTerms, MethodTerm, mean_weights
from sfed.clients.optimizer import StackedOptimizer
from sfed.clients.round_stats import RoundStats
from sfed.clients.schedule import learning_rate
from sfed.clients.state import CONTROL, PassState
from sfed.data import batches
from sfed.data.batches import Order
from sfed.data.tokenize import Row
from sfed.distributed.shutdown import StopRequest
from sfed.distributed.sync import barrier
from sfed.distributed.transfer import to_device
from sfed.distributed.world import all_gather_rows
from sfed.federated.context import RoundPlan, Run
from sfed.federated.lockstep import Lockstep
from sfed.utils.rng import Stream, derive

OnStep = Callable[[int, int, Callable[[], float], int], None]
"""Called after a step with (steps done, steps of the round, how to read its mean loss, tokens).

Steps are those of this process: of clients that share passes once, of others one after another.
"""

# Sums that grow on the device: reading them in each step would wait for it.
_ON_DEVICE = ("loss_sum", "supervised", "norm_sum", "first_norm", "is_bad")


def train(run: Run, plan: RoundPlan, stats: RoundStats, stop: StopRequest, on_step: OnStep) -> None:
    """Train this process's clients of the round from where their sums are, until a stop.

    Under a sharded backbone it is collective: all processes make equally many passes.

    Args:
        run: the run.
        plan: of the round.
        stats: filled in place for this process's clients.
        stop: is asked before each step whether to stop there.
        on_step: told about each step.
    """
    phase = f"round {plan.finished_rounds}, step"
    schedule = Lockstep(run, stop, phase, plan.groups, partial(plan.steps_left, stats))
    run.backbone.training()
    terms = _terms(run, plan)
    whole = sum(max(plan.steps[client] for client in group) for group in schedule.groups)
    made = whole - sum(len(plan.steps_left(stats, group)) for group in schedule.groups)
    with closing(run.clients.passes(schedule.groups, plan.trained)) as passes:
        for rows in passes:
            run.bind(rows.clients, rows.values, rows.grads, plan.trained)
            steps = LocalSteps(run, plan, rows, stats, terms)
            for step in schedule.units(rows.clients):
                steps.make(step)
                made += 1
                on_step(made, whole, steps.latest_loss, steps.latest_tokens)
            steps.close()
            if schedule.is_stopped:
                break
    schedule.shadow(partial(_shadow_step, run, plan.trained))
    stats.shadow_seconds += schedule.shadow_seconds
    stats.was_stopped = schedule.is_stopped


def gather(
    run: Run, plan: RoundPlan, stats: RoundStats, local_seconds: float
) -> list[tuple[float, float]]:
    """Wait for all processes, then fill in the sums of their clients. Collective.

    Sums of losses and norms and a process's seconds are sent, and nothing of an adapter.

    Args:
        run: the run.
        plan: of the round.
        stats: filled in place for the clients of the other processes, with whether any was stopped.
        local_seconds: how long ``train`` took here.

    Returns:
        Of each process: seconds of its own local steps; seconds idle, which are those of shadow
        passes and of waiting here.
    """
    started = time.monotonic()
    barrier(run.world, f"end of local training in round {plan.finished_rounds}")
    idle_seconds = stats.shadow_seconds + time.monotonic() - started
    own, placement = run.clients.own, run.placement
    mine = torch.zeros(1 + max(map(len, placement)), len(RoundStats.COLUMNS), dtype=torch.float64)
    mine[: len(own)] = torch.from_numpy(stats.table[list(own)])
    of_process = [local_seconds - stats.shadow_seconds, idle_seconds, float(stats.was_stopped)]
    mine[-1, :3] = torch.tensor(of_process, dtype=mine.dtype)
    gathered = all_gather_rows(run.world, mine)
    stats.was_stopped = any(bool(rows[-1, 2]) for rows in gathered)
    for clients, rows in zip(placement, gathered, strict=True):
        stats.table[list(clients)] = rows[: len(clients)].numpy()
    return [(float(rows[-1, 0]), float(rows[-1, 1])) for rows in gathered]


def _terms(run: Run, plan: RoundPlan) -> LocalTerms | None:
    """What joins the gradients of the round; None where nothing does.

    What was received rests beside the clients until the round ends, over an interruption too.
    """
    federated, clients, device = run.config.federated, run.clients, run.world.device
    of_method = _method_term(run, plan.trained)
    if federated.prox_mu == 0 and not federated.scaffold and of_method is None:
        return None
    values = {factor: clients.shared(factor).to(device) for factor in plan.received}
    controls = {
        factor: clients.common_state.get(f"{factor.lower()}_{CONTROL}", torch.zeros_like(one))
        for factor, one in values.items()
    }
    return LocalTerms(
        clients.layout,
        federated.prox_mu,
        values,
        controls if federated.scaffold else {},
        of_method,
    )


def _method_term(run: Run, trained: tuple[str, ...]) -> MethodTerm | None:
    term = run.method.local_term
    return None if term is None else MethodTerm(term, trained, run.gammas[0])


def try_method_term(run: Run) -> None:
    """Call the method's local term once for each turn of its rounds, and forget what it gives.

    Raises:
        UserError: where it fails. In a round the other processes would wait for this one.
    """
    clients, first = run.clients, run.clients.own[:1]
    for factors in run.method.trained:
        if (term := _method_term(run, factors)) is not None:
            received = {f: clients.shared(f).to(run.world.device) for f in run.method.received}
            values = clients.load_values(first)[:1].clone()
            rows = PassState(first, values, torch.zeros_like(values), {}, values)
            term.add_to(
                rows, clients.layout, {f: one for f, one in received.items() if f in factors}
            )


def _shadow_step(run: Run, trained: tuple[str, ...]) -> None:
    """The passes of an optimizer step that touches no client: its gradients go to a spare row."""
    device = run.world.device
    values, grads = (torch.zeros(1, run.clients.layout.size, device=device) for _ in range(2))
    run.adapters.bind(values, grads, trained)
    run.adapters.context.token_keys = None
    batch = run.objective.collate([[]], 1).to(device)
    for _ in range(run.passes_per_step):
        torch.autograd.backward(run.objective.losses(batch).sum())


class LocalSteps:
    """The optimizer steps of the clients that share passes, in one round.

    Suffix: C clients of the pass.
    """

    def __init__(
        self,
        run: Run,
        plan: RoundPlan,
        rows: PassState,
        stats: RoundStats,
        terms: LocalTerms | None,
    ) -> None:
        """Resume from the sums of these clients.

        Args:
            run: the run.
            plan: of the round.
            rows: the clients, on the device; their values move.
            stats: what is counted on the host grows with each step, the rest when this is closed.
            terms: what joins the gradients of the round.
        """
        self.plan = plan
        self._run, self._rows, self._stats = run, rows, stats
        self._clients = list(rows.clients)
        self._objective = run.objective
        self._optimizer = StackedOptimizer(
            run.config.train, run.clients.layout, plan.trained, run.backbone.kernels
        )
        seed = run.config.seed
        self._orders = {c: Order(seed, c, len(run.data.train[c])) for c in rows.clients}
        self._first = {c: int(stats.steps[c]) for c in rows.clients}
        self.last = max(plan.steps[c] for c in rows.clients)
        """Steps of the round, of the client that makes most."""
        self._table = torch.from_numpy(stats.table[self._clients]).to(run.world.device)
        self._sums = dict(zip(RoundStats.COLUMNS, self._table.unbind(dim=1), strict=True))
        self._is_bad_C = self._sums["is_bad"].bool()
        self._latest_losses_C = torch.zeros(len(rows.clients), device=run.world.device)
        self._latest_taken_C = torch.zeros_like(self._latest_losses_C, dtype=torch.bool)
        self._start = rows.values.clone()
        self._terms = terms
        self._active = [
            [self._first[c] <= step < plan.steps[c] for c in self._clients]
            for step in range(self.last)
        ]
        self._known = self._known_before()
        self.latest_tokens = 0

    def _known_before(self) -> dict[str, torch.Tensor]:
        """What is known of all steps of the round, on the device: (steps, C) each.

        Whether a client makes a step; its learning rate; the weight of the step's gradient in the
        mean gradient, where there are control variates.
        """
        plan, steps = self.plan, range(self.last)
        rates = [[self._rate(client, step) for client in self._clients] for step in steps]
        known = {"lr": torch.tensor(rates), "active": torch.tensor(self._active)}
        if self._terms is not None and self._terms.controls:
            weights = torch.zeros(self.last, len(self._clients))
            for place, client in enumerate(self._clients):
                of_steps = mean_weights([one[place] for one in rates[: plan.steps[client]]])
                weights[: len(of_steps), place] = torch.tensor(of_steps)
            known["weight"] = weights
        return to_device(known, self._run.world.device)

    def latest_loss(self) -> float:
        """Mean loss of the latest step over the clients that made it. Waits for the device."""
        taken_C = self._latest_taken_C
        return float(self._latest_losses_C[taken_C].mean()) if taken_C.any() else math.nan

    def make(self, step: int) -> None:
        """Make one optimizer step of every client that has this step to make."""
        clients = self._clients
        active = self._active[step]
        drawn = [self._draw(c, step) if on else [] for c, on in zip(clients, active, strict=True)]
        counts = {"supervised": torch.tensor(list(map(batches.supervised_count, drawn)))}
        supervised_C = to_device(counts, self._run.world.device)["supervised"]
        losses_C = self._backward(drawn, supervised_C, step)
        known = {name: values_SC[step] for name, values_SC in self._known.items()}
        active_C = known["active"]
        if self._terms is not None:
            self._terms.add_to(self._rows, known.get("weight"), active_C)
        norms_C = self._optimizer.gradient_norms(self._rows)
        finite_C = torch.isfinite(losses_C) & torch.isfinite(norms_C)
        # A client that turned non-finite rests until the round ends.
        self._is_bad_C |= active_C & ~finite_C
        taken_C = active_C & ~self._is_bad_C
        self._optimizer.step(self._rows, known["lr"], norms_C, taken_C)
        self._latest_losses_C, self._latest_taken_C = losses_C, taken_C
        self._sums["loss_sum"] += (losses_C * supervised_C).where(taken_C, 0.0)
        self._sums["norm_sum"] += norms_C.where(taken_C, 0.0)
        if step == 0:
            self._sums["first_norm"] += norms_C.where(taken_C, 0.0)
        self._sums["supervised"] += supervised_C.where(taken_C, 0.0)
        self._count(drawn, active)

    def _count(self, drawn: list[list[Row]], active: list[bool]) -> None:
        """Note what every client has read; on the host, without waiting for the device."""
        self.latest_tokens = 0
        for client, rows, on in zip(self._clients, drawn, active, strict=True):
            tokens = sum(len(row.ids) for row in rows)
            self._run.clients.examples_drawn[client] += len(rows)
            self._stats.steps[client] += on
            self._stats.tokens[client] += tokens
            self.latest_tokens += tokens

    def _draw(self, client: int, step: int) -> list[Row]:
        """A client's rows of a step; the last step of an epoch may have fewer."""
        run, settings = self._run, self._run.data.settings[client]
        size, examples, epochs = settings.batch_size, run.data.train[client], settings.local_epochs
        if settings.local_steps is None and epochs is not None:
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
        most = max(run.data.settings[client].batch_size for client in self._clients)
        micro = run.config.train.micro_batch_size or most
        # Under a sharded backbone all processes make equally many passes.
        num_passes = run.passes_per_step if run.backbone.sharding.is_sharded else -(-most // micro)
        total_C = supervised_C.clamp(min=1.0)
        losses_C = torch.zeros_like(total_C)
        self._rows.grads.zero_()
        for number in range(num_passes):
            some = [rows[number * micro : (number + 1) * micro] for rows in drawn]
            batch = self._objective.collate(some, max(1, *map(len, some)))
            self._stats.slots[self._clients] += batch.slots // len(some)
            if run.config.lora.dropout > 0.0:
                batch = batch.with_keys(self._dropout_seeds(step), number * micro)
            batch = batch.to(run.world.device)
            run.adapters.context.token_keys = batch.token_keys
            row_losses = self._objective.losses(batch)
            mean_C = row_losses.view(len(some), -1).sum(dim=1) / total_C
            torch.autograd.backward(mean_C.sum())
            losses_C += mean_C.detach()
        return losses_C

    def _dropout_seeds(self, step: int) -> tuple[int, ...]:
        """Of each client, for one step."""
        words = (self._run.config.seed, self.plan.round_index, step)
        return tuple(derive(Stream.DROPOUT, *words, client) for client in self._clients)

    def _rate(self, client: int, step: int) -> float:
        """The learning rate of a client's step: the schedule runs over the whole run."""
        run, begun = self._run, self.plan.round_index
        done = min(step / self.plan.steps[client], 1.0)
        lr = run.data.settings[client].lr
        return learning_rate(run.config.train, lr, run.course.num_rounds(begun), begun + done)

    def close(self) -> None:
        """Write the sums down; a client that turned non-finite is back where the round began."""
        self._is_bad_C |= ~torch.isfinite(self._rows.values).all(dim=1)
        self._rows.restore(self._is_bad_C, self._start)
        self._sums["is_bad"].copy_(self._is_bad_C)
        table = dict(zip(RoundStats.COLUMNS, self._table.cpu().numpy().T, strict=True))
        for name in _ON_DEVICE:
            getattr(self._stats, name)[self._clients] = table[name]
