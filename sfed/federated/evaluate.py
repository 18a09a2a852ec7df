"""Held-out losses and scores: each client's own adapter on its own data, and the global one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sfed.data import batches, scores
from sfed.distributed.shutdown import StopRequest
from sfed.distributed.world import all_gather_rows
from sfed.federated import generate
from sfed.federated.context import Group, Run
from sfed.federated.generate import Sample
from sfed.federated.lockstep import Lockstep
from sfed.lora.linear import Probe
from sfed.methods import aggregation

Numbers = NDArray[np.float64]
_LOSS_SUM, _SUPERVISED, _SQUARES, _COUNTED, _WAS_STOPPED = range(5)
_PREDICTION, _TARGET, _PART = range(3)


@dataclass(frozen=True)
class Measured:
    """What one kind of adapter does on the held-out data of all clients."""

    sums: Numbers
    """(N, 5): each client's summed loss and what it is a sum over; then the summed squares of its
    adapter's outputs on one batch, and how many they are; whether its process was stopped."""
    outcomes: Numbers
    """(N, most examples, 3): prediction, target and part of each example, NaN where there is none.
    No examples for tasks without scores."""
    parts: tuple[str, ...]
    samples: dict[int, list[Sample]]
    """Answers that some clients' adapters wrote."""

    @property
    def was_stopped(self) -> bool:
        """Whether some process was asked to stop before it had measured all; all see the same."""
        return bool(self.sums[:, _WAS_STOPPED].any())

    def loss(self, client: int | None = None) -> float | None:
        """Mean loss over one client's held-out data, or over everybody's; None of no data."""
        sums = self.sums.sum(axis=0) if client is None else self.sums[client]
        return float(sums[_LOSS_SUM] / sums[_SUPERVISED]) if sums[_SUPERVISED] else None

    def output_rms(self) -> float | None:
        """Root mean square of gamma * B A x over tokens and layers, in one batch of each client."""
        sums = self.sums.sum(axis=0)
        return float(np.sqrt(sums[_SQUARES] / sums[_COUNTED])) if sums[_COUNTED] else None

    @property
    def _of_parts(self) -> dict[str, tuple[str, int]]:
        """Name of the score of a part -> (score, number of the part)."""
        return {
            score_of_part(name, part): (name, number)
            for number, part in enumerate(self.parts)
            for name in scores.SCORES
        }

    def score(self, name: str, client: int | None = None) -> float | None:
        """A score over one client's held-out examples, or over everybody's in one.

        None where it is undefined, as of no examples.
        """
        rows = (self.outcomes if client is None else self.outcomes[client]).reshape(-1, 3)
        rows = rows[~np.isnan(rows[:, _TARGET])]
        if name not in scores.SCORES:
            name, number = self._of_parts[name]
            rows = rows[rows[:, _PART] == number]
        return scores.score(name, rows[:, _PREDICTION], rows[:, _TARGET])

    def confusion(self, num_classes: int) -> list[list[int]]:
        """Held-out examples of everybody by their class (rows) and the predicted one (columns)."""
        rows = self.outcomes.reshape(-1, 3)
        rows = rows[~np.isnan(rows[:, _TARGET])]
        cells = (num_classes * rows[:, _TARGET] + rows[:, _PREDICTION]).astype(np.int64)
        counts = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
        found: list[list[int]] = counts.tolist()
        return found


@dataclass(frozen=True)
class Evaluation:
    """What was measured, by kind of adapter: ``personal`` and ``global``."""

    kinds: dict[str, Measured]
    communicated_bytes: int
    """Bytes that the global adapter took to put together; training never sends them."""


def score_names(run: Run) -> tuple[str, ...]:
    """The scores of a run, the main one first; those of each part of the held-out set last."""
    if not (run.task.is_classification or run.config.evaluation.generate):
        return ()
    parts = [part for part in run.data.parts if part]
    return run.task.scores + tuple(
        score_of_part(name, part) for part in parts for name in run.task.scores
    )


def score_of_part(name: str, part: str) -> str:
    """The name of a score over one part of the held-out set."""
    return f"{name}_{part}"


def evaluate(run: Run, stop: StopRequest, finished_rounds: int) -> Evaluation | None:
    """Evaluate all clients, or those of the sample, whoever trained last. Collective.

    Under a sharded backbone all processes make equally many passes. Where every client has the same
    adapter, the personal one is the global one, and one measurement serves both.

    Args:
        run: the run.
        stop: asks before each pass whether to stop here.
        finished_rounds: before the first one B = 0 on all clients that start afresh, so that every
            adapter is the backbone itself and one measurement serves all of them. Where clients
            start with an A of their own each, there is no global adapter yet.

    Returns:
        None on every process, where somebody asked to stop before all was measured.
    """
    own = run.own_factors(finished_rounds)
    is_untrained = finished_rounds == 0 and run.origin is None
    run.backbone.evaluating()
    run.adapters.context.token_keys = None
    kinds: dict[str, Measured] = {}
    communicated = 0
    with torch.no_grad():
        if "personal" in run.config.evaluation.adapters:
            kinds["personal"] = Measuring(run, None).measure(stop, writes=True)
        wants_global = "global" in run.config.evaluation.adapters and run.method.has_global_adapter
        if run.origin is not None and "A" in own:
            wants_global = False
        if any(measured.was_stopped for measured in kinds.values()):
            wants_global = False
        is_one_adapter = not own and not run.has_mixed_ranks
        if wants_global and kinds and (is_untrained or is_one_adapter):
            kinds["global"] = kinds["personal"]
        elif wants_global:
            weights = run.weights(run.everyone)
            row = aggregation.global_row(run.world, run.clients, weights, own, run.gammas)
            communicated = aggregation.message_bytes(run.clients.layout, own)
            # Samples are shown of the first kind only; answers that are scored, of both.
            writes = bool(run.task.scores or not kinds)
            kinds["global"] = Measuring(run, row[None]).measure(stop, writes=writes)
    run.backbone.release()
    if any(measured.was_stopped for measured in kinds.values()):
        return None
    return Evaluation(kinds, communicated)


class Measuring:
    """Measures the held-out data of the clients, each with its own adapter, or all with one."""

    def __init__(self, run: Run, shared_row: torch.Tensor | None) -> None:
        """Measure nothing yet.

        Args:
            run: the run.
            shared_row: (1, layout.size) of one adapter for all; None = each client's own.
        """
        self._run, self._shared_row, self._objective = run, shared_row, run.objective
        widest = max(map(len, run.placement))
        most = max(run.data.eval_counts) if score_names(run) else 0
        self._sums = torch.zeros(widest, 5, dtype=torch.float64)
        self._outcomes = torch.full((widest, most, 3), torch.nan, dtype=torch.float64)

    def measure(self, stop: StopRequest, *, writes: bool) -> Measured:
        """Make the passes. Collective.

        Args:
            stop: is asked before each pass whether to stop there.
            writes: whether answers are written, where ``evaluation.generate`` is on.
        """
        run, samples = self._run, dict[int, list[Sample]]()
        groups = run.groups(run.evaluated)
        schedule = Lockstep(run, stop, "evaluation, pass", groups, self._passes)
        for group in schedule.groups:
            rows = run.clients.load_values(group) if self._shared_row is None else self._shared_row
            for number in schedule.units(group):
                self.make_pass(group, rows, number)
        schedule.shadow(self._shadow_pass)
        is_stopped = schedule.is_stopped
        if run.config.evaluation.generate and writes:
            samples, is_stopped = generate.write_answers(
                run, self._shared_row, self._outcomes, stop
            )
        self._sums[:, _WAS_STOPPED] = is_stopped
        sums, outcomes = (_from_all(run, mine) for mine in (self._sums, self._outcomes))
        return Measured(sums, outcomes, run.data.parts, samples)

    def _passes(self, group: Group) -> range:
        run = self._run
        most = max(run.data.eval_counts[client] for client in group)
        return range(-(-most // run.config.evaluation.batch_size))

    def _shadow_pass(self) -> None:
        run = self._run
        own = run.clients.own[:1]
        run.bind(own, run.clients.load_values(own))
        self._objective.losses(self._objective.collate([[]], 1).to(run.world.device))

    def make_pass(self, group: Group, rows: torch.Tensor, number: int) -> None:
        """Evaluate the group's batch of this number.

        Args:
            group: the clients.
            rows: an adapter for each of them, or one for all.
            number: of the batch, from 0.
        """
        run, size = self._run, self._run.config.evaluation.batch_size
        # Who has no examples left is left out, so that it costs nothing.
        left = [i for i, client in enumerate(group) if run.data.eval_counts[client] > number * size]
        clients = [group[i] for i in left]
        if self._shared_row is not None:
            run.adapters.bind(rows)
        else:
            run.bind(clients, rows if len(left) == len(group) else rows[left])
        held = [run.data.held_out[client] for client in clients]
        places = [list(range(len(e))[number * size : (number + 1) * size]) for e in held]
        examples = [[e.row(place) for place in own] for e, own in zip(held, places, strict=True)]
        batch = self._objective.collate(examples, max(map(len, examples))).to(run.world.device)
        # The adapter's outputs are looked at in one batch of each client.
        probe = Probe.of(self._objective.counted_tokens(batch)) if number == 0 else None
        run.adapters.context.probe = probe
        losses, predicted = self._objective.losses_and_predictions(batch)
        run.adapters.context.probe = None
        if predicted is not None:
            self._note_outcomes(clients, places, predicted)
        sums = {_LOSS_SUM: losses.double()}
        if probe is not None:
            sums |= {_SQUARES: probe.sum_squares, _COUNTED: probe.count}
        lines = [run.clients.lines[client] for client in clients]
        for column, values in sums.items():
            self._sums[lines, column] += values.view(len(lines), -1).sum(dim=1).double().cpu()
        supervised = [batches.supervised_count(some) for some in examples]
        self._sums[lines, _SUPERVISED] += torch.tensor(supervised, dtype=torch.float64)

    def _note_outcomes(
        self, clients: list[int], places: list[list[int]], predicted: torch.Tensor
    ) -> None:
        """Note predictions beside targets and parts of the held-out set."""
        by_client = predicted.view(len(clients), -1).double().cpu()
        for client, own, values in zip(clients, places, by_client, strict=True):
            line, examples = self._run.clients.lines[client], self._run.data.held_out[client]
            self._outcomes[line, own, _PREDICTION] = values[: len(own)]
            self._outcomes[line, own, _TARGET] = torch.from_numpy(examples.targets[own])
            self._outcomes[line, own, _PART] = torch.from_numpy(examples.parts[own]).double()


def _from_all(run: Run, mine: torch.Tensor) -> Numbers:
    """Put the clients of all processes together, in order. Collective."""
    found = np.empty((run.num_clients, *mine.shape[1:]))
    for clients, rows in zip(run.placement, all_gather_rows(run.world, mine), strict=True):
        found[list(clients)] = rows[: len(clients)].numpy()
    return found
