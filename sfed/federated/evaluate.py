"""Held-out losses and scores: each client's own adapter on its own data, and the global one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sfed.clients.store import groups
from sfed.data import batches, scores
from sfed.distributed.shutdown import StopRequest
from sfed.distributed.world import all_gather_rows
from sfed.federated import generate
from sfed.federated.context import Run
from sfed.federated.generate import Sample
from sfed.lora.linear import Probe
from sfed.methods import aggregation
from sfed.models import objective

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


def evaluate(run: Run, stop: StopRequest, *, untrained: bool = False) -> Evaluation | None:
    """Evaluate all clients, whoever trained last. Collective.

    Under a sharded backbone all processes make equally many passes.

    Args:
        run: the run.
        stop: asks before each pass whether to stop here.
        untrained: B = 0 on all clients, so that every adapter is the backbone itself and one
            measurement serves all of them.

    Returns:
        None on every process, where somebody asked to stop before all was measured.
    """
    run.backbone.evaluating()
    run.adapters.context.dropout_seeds = None
    kinds: dict[str, Measured] = {}
    communicated = 0
    with torch.no_grad():
        if "personal" in run.config.evaluation.adapters:
            kinds["personal"] = _measure(run, None, stop, writes=True)
        wants_global = "global" in run.config.evaluation.adapters and run.method.has_global_adapter
        if any(measured.was_stopped for measured in kinds.values()):
            wants_global = False
        if wants_global and untrained and kinds:
            kinds["global"] = kinds["personal"]
        elif wants_global:
            everyone = tuple(range(run.num_clients))
            row = aggregation.global_row(run.world, run.clients, run.weights(everyone))
            layout = run.clients.layout
            communicated = aggregation.message_bytes(layout, aggregation.personal_factors(layout))
            # Samples are shown of the first kind only; answers that are scored, of both.
            writes = bool(run.task.scores or not kinds)
            kinds["global"] = _measure(run, row[None], stop, writes=writes)
    run.backbone.release()
    if any(measured.was_stopped for measured in kinds.values()):
        return None
    return Evaluation(kinds, communicated)


def _measure(
    run: Run, shared_row: torch.Tensor | None, stop: StopRequest, *, writes: bool
) -> Measured:
    """Measure all clients, each with its own adapter, or all with one.

    Args:
        run: the run.
        shared_row: (1, layout.size) of one adapter for all; None = each client's own.
        stop: asks before each pass whether to stop here.
        writes: whether answers are written, where ``evaluation.generate`` is on.
    """
    own, device = run.clients.own, run.world.device
    widest = max(map(len, run.placement()))
    sums = torch.zeros(widest, 5, dtype=torch.float64)
    most = max(run.data.eval_counts) if score_names(run) else 0
    outcomes = torch.full((widest, most, 3), torch.nan, dtype=torch.float64)
    samples: dict[int, list[Sample]] = {}
    done, stopped = 0, False
    for group in groups(own, run.clients_per_pass(own)):
        place = slice(group[0] - own.start, group[-1] - own.start + 1)
        rows = run.clients.load_values(group) if shared_row is None else shared_row
        for number in range(_passes(run, group)):
            if stopped := stopped or stop.due(f"evaluation, pass {done + 1}"):
                break
            _one_pass(run, group, rows, number, sums[place], outcomes[place])
            done += 1
    for number in range(done, _planned_passes(run) if run.backbone.sharding.is_sharded else done):
        if stopped := stopped or stop.due(f"evaluation, keeping company in pass {number + 1}"):
            break
        run.adapters.bind(run.clients.load_values(own[:1]))
        objective.row_losses(
            run.backbone, batches.empty(1, with_targets=run.task.is_classification).to(device)
        )
    if run.config.evaluation.generate and writes:
        samples, stopped = generate.write_answers(run, shared_row, outcomes, stop)
    sums[:, _WAS_STOPPED] = stopped
    return Measured(_from_all(run, sums), _from_all(run, outcomes), run.data.parts, samples)


def _from_all(run: Run, mine: torch.Tensor) -> Numbers:
    """Put the clients of all processes together, in order. Collective."""
    gathered = zip(run.placement(), all_gather_rows(run.world, mine), strict=True)
    return np.concatenate([rows[: len(clients)].numpy() for clients, rows in gathered])


def _one_pass(
    run: Run,
    group: tuple[int, ...],
    rows: torch.Tensor,
    number: int,
    sums_C4: torch.Tensor,
    outcomes_CE3: torch.Tensor,
) -> None:
    """Evaluate the group's batch of this number, with one row of numbers each or one for all."""
    size = run.config.evaluation.batch_size
    # Who has no examples left is left out, so that it costs nothing.
    left = [i for i, client in enumerate(group) if run.data.eval_counts[client] > number * size]
    run.adapters.bind(rows if len(rows) == 1 or len(left) == len(group) else rows[left])
    held = [run.data.held_out[group[i]] for i in left]
    places = [list(range(len(e))[number * size : (number + 1) * size]) for e in held]
    examples = [[e.row(place) for place in own] for e, own in zip(held, places, strict=True)]
    most = max(map(len, examples))
    batch = batches.collate(
        examples, most, with_targets=run.task.is_classification, packing=run.packing
    ).to(run.world.device)
    probe = Probe.of(objective.counted_tokens(batch)) if number == 0 else None
    run.adapters.context.probe = probe
    if batch.targets is None:
        losses = objective.row_losses(run.backbone, batch)
    else:
        outputs = objective.outputs(run.backbone, batch)
        losses = objective.target_losses(outputs, batch.targets)
        predicted = objective.predictions(outputs).view(len(left), most).double().cpu()
        for i, e, own, values in zip(left, held, places, predicted, strict=True):
            outcomes_CE3[i, own, _PREDICTION] = values[: len(own)]
            outcomes_CE3[i, own, _TARGET] = torch.from_numpy(e.targets[own])
            outcomes_CE3[i, own, _PART] = torch.from_numpy(e.parts[own]).double()
    run.adapters.context.probe = None
    supervised = [batches.supervised_count(some) for some in examples]
    sums_C4[left, _LOSS_SUM] += losses.double().view(len(left), -1).sum(dim=1).cpu()
    sums_C4[left, _SUPERVISED] += torch.tensor(supervised, dtype=torch.float64)
    if probe is not None:
        sums_C4[left, _SQUARES] += probe.sum_squares.view(len(left), -1).sum(dim=1).double().cpu()
        sums_C4[left, _COUNTED] += probe.count.view(len(left), -1).sum(dim=1).double().cpu()


def _passes(run: Run, group: tuple[int, ...]) -> int:
    size = run.config.evaluation.batch_size
    return max(-(-run.data.eval_counts[client] // size) for client in group)


def _planned_passes(run: Run) -> int:
    """The most passes that any process makes: known to all without a word."""
    return max(
        sum(_passes(run, group) for group in groups(own, run.clients_per_pass(own)))
        for own in run.placement()
    )
