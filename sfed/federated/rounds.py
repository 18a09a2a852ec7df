"""The rounds of a run: the file to read first.

A round is: every client of the cohort trains its own adapter on its own data, one message averages
the shared factor, and then evaluation, metrics and checkpoint where they are due. Follow it into
``local``, ``methods/method`` and ``methods/aggregation``.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace

from sfed.clients.store import draw_initial, initial_a
from sfed.distributed.shutdown import StopRequest
from sfed.distributed.sync import meet
from sfed.federated import evaluate, local, round_metrics, round_stats
from sfed.federated.context import Run
from sfed.federated.fingerprints import require_same_mean
from sfed.federated.round_metrics import Facts
from sfed.federated.round_stats import IS_BAD, Ledger
from sfed.methods import aggregation
from sfed.observability.console import Console
from sfed.observability.trackers import Journal
from sfed.storage.checkpoint import State
from sfed.storage.checkpoint_writer import Writer


class TrainingFailedError(RuntimeError):
    """Training cannot go on: clients keep turning non-finite."""


def prepare(run: Run) -> int:
    """Draw every client's A and take the mean over all N before the first step ("round 0").

    Returns:
        Bytes of the message. Collective.
    """
    seed, independent = run.config.seed, run.method.independent_init
    draw_initial(
        run.clients,
        run.adapters,
        seed=seed,
        independent=independent and not run.method.averages_a_at_start,
    )
    if not run.method.averages_a_at_start:
        return 0
    # The 1/N in the variance of this mean is what the factor sqrt(N) makes up for.
    draws = initial_a(run.clients.own, run.adapters, seed)
    return aggregation.share_draws(run.world, run.clients, draws, run.weights(_everyone(run)))


def train(
    run: Run,
    state: State | None,
    writer: Writer,
    journal: Journal | None,
    console: Console,
    stop: StopRequest,
) -> bool:
    """Run the rounds that are left. Collective.

    Args:
        run: the run.
        state: where a checkpoint left it; None = at the very beginning.
        writer: of checkpoints.
        journal: on process 0.
        console: speaks on process 0.
        stop: asks whether to stop.

    Returns:
        Whether all rounds are done; False after a request to stop. The last checkpoint may still be
        under way.
    """
    state = _begin(run, state, journal, console, stop)
    if state is None:
        return False
    ledger, bad_rounds = state.ledger, state.bad_rounds
    for round_index in range(state.finished_rounds, run.config.federated.num_rounds):
        console.begin_round(round_index)
        facts, started = Facts(), time.monotonic()
        ledger = round_stats.new_ledger(run.num_clients) if ledger is None else ledger
        local.train_round(run, round_index, ledger, stop, console.step)
        facts.local_seconds = time.monotonic() - started
        meet(run.world, f"end of local training in round {round_index + 1}")
        facts.wait_seconds = time.monotonic() - started - facts.local_seconds
        local.exchange(run, ledger)
        if not local.is_complete(run, round_index, ledger):
            writer.save(State(round_index, ledger, bad_rounds))
            return False
        bad_rounds += _exclude_bad_clients(run, round_index, ledger, bad_rounds, console)
        _compare_clients(run, round_index + 1, facts)
        _average(run, round_index, ledger, facts)
        facts.round_seconds = time.monotonic() - started
        facts.checkpoint_seconds, facts.checkpoint_write_seconds = writer.take_seconds()
        known = asdict(facts)
        if not _evaluate_and_report(run, round_index + 1, ledger, facts, journal, console, stop):
            writer.save(State(round_index + 1, ledger, bad_rounds, known))
            return False
        ledger = None
        if _is_due(run, round_index + 1, run.config.output.checkpoint_every_rounds):
            writer.save(State(round_index + 1, None, bad_rounds))
    return True


def _begin(
    run: Run,
    state: State | None,
    journal: Journal | None,
    console: Console,
    stop: StopRequest,
) -> State | None:
    """Draw the adapters, or go on; report what has not been reported. None = stopped meanwhile."""
    facts = Facts()
    if state is None:
        state, facts = State(0, None, 0, {}), Facts(uploaded_bytes=prepare(run))
    if state.unreported is None:
        return state
    facts, last = replace(facts, **state.unreported), state.finished_rounds
    if not _evaluate_and_report(run, last, state.ledger, facts, journal, console, stop):
        return None
    return State(last, None, state.bad_rounds)


def _everyone(run: Run) -> tuple[int, ...]:
    return tuple(range(run.num_clients))


def _is_due(run: Run, finished_rounds: int, every: int) -> bool:
    return finished_rounds % every == 0 or finished_rounds == run.config.federated.num_rounds


def _compare_clients(run: Run, finished_rounds: int, facts: Facts) -> None:
    """How alike the clients have become, before the mean makes their A the same.

    It sends B in a sum over clients, as the global adapter does, and is left out with that.
    """
    is_due = _is_due(run, finished_rounds, run.config.evaluation.every_rounds)
    if is_due and "global" in run.config.evaluation.adapters:
        started = time.monotonic()
        facts.similarity = aggregation.similarity(run.world, run.clients)
        facts.similarity_bytes = aggregation.message_bytes(run.clients.layout, ("A", "B"))
        facts.evaluate_seconds = time.monotonic() - started


def _average(run: Run, round_index: int, ledger: Ledger, facts: Facts) -> None:
    """The federated mean of the round."""
    started = time.monotonic()
    run.world.watch.at(f"round {round_index + 1}, the mean")
    good = tuple(c for c in run.cohort(round_index) if not ledger[c, IS_BAD])
    factors, weights = run.averaged_in(round_index), run.weights(good)
    facts.uploaded_bytes = aggregation.share(run.world, run.clients, factors, weights)
    require_same_mean(run.world, run.clients, factors, round_index + 1)
    if run.config.federated.optimizer_state == "reset":
        run.clients.reset_optimizer()
    facts.aggregate_seconds = time.monotonic() - started


def _exclude_bad_clients(
    run: Run, round_index: int, ledger: Ledger, bad_rounds: int, console: Console
) -> int:
    """Name the clients that turned non-finite and are left out of the mean; 1 if there are any.

    Every process sees the same ledger, so all raise or none.
    """
    bad = [client for client in run.cohort(round_index) if ledger[client, IS_BAD]]
    if not bad:
        return 0
    names = ", ".join(map(str, bad))
    fact = (
        f"round {round_index + 1}: the loss or gradient of client {names} was not finite; it "
        "is back where the round began and left out of this round's mean"
    )
    if len(bad) == len(run.cohort(round_index)):
        raise TrainingFailedError(f"{fact}. No client is left; lower train.lr or lora.alpha")
    if bad_rounds + 1 > run.config.federated.max_bad_rounds:
        raise TrainingFailedError(
            f"{fact}. That is round {bad_rounds + 1} of this kind and federated.max_bad_rounds is "
            f"{run.config.federated.max_bad_rounds}; lower train.lr or lora.alpha, or look at the "
            "data of these clients"
        )
    console.warn(fact)
    return 1


def _evaluate_and_report(
    run: Run,
    finished_rounds: int,
    ledger: Ledger | None,
    facts: Facts,
    journal: Journal | None,
    console: Console,
    stop: StopRequest,
) -> bool:
    """Evaluate where it is due and keep the round's event, before the checkpoint of the round.

    Returns:
        False, and no event, where somebody asked to stop meanwhile.
    """
    evaluation = None
    started = time.monotonic()
    run.world.watch.at(f"the end of round {finished_rounds}")
    if _is_due(run, finished_rounds, run.config.evaluation.every_rounds):
        evaluation = evaluate.evaluate(run, stop, untrained=finished_rounds == 0)
        if evaluation is None:
            return False
        seconds = time.monotonic() - started
        facts.evaluate_seconds += seconds
        facts.round_seconds += seconds
    event = round_metrics.round_event(run, finished_rounds, ledger, evaluation, facts)
    if journal is not None:
        journal.write_event(event)
    console.end_round(event)
    return True
