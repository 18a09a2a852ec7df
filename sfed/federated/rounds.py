"""The rounds of a run: the file to read first.

A round is: every client of the cohort trains its own adapter on its own data, one message averages
the shared factor, and then evaluation, metrics and checkpoint where they are due. Follow it into
``local``, ``methods/method`` and ``methods/aggregation``.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from sfed.clients.round_stats import RoundStats
from sfed.clients.store import draw_initial, initial_a
from sfed.distributed.shutdown import StopRequest
from sfed.distributed.sync import raise_everywhere
from sfed.federated import evaluate, local
from sfed.federated.context import RoundPlan, Run
from sfed.federated.fingerprints import require_same_mean
from sfed.federated.log.round_metrics import RoundLog, RoundMeasurements
from sfed.methods import aggregation
from sfed.methods.aggregation import ServerSide
from sfed.methods.by_layer import BaseChanges, ByLayer
from sfed.methods.server_optimizer import ServerOptimizer
from sfed.storage import origin_rows
from sfed.storage.checkpoint import State
from sfed.storage.checkpoint_writer import Writer
from sfed.utils.errors import TrainingFailedError, UserError
from sfed.utils.rng import Stream, derive
from sfed.utils.text import some_of


def train(
    run: Run, state: State | None, checkpoints: Writer, log: RoundLog, stop: StopRequest
) -> bool:
    """Run the rounds that are left. Collective.

    Args:
        run: the run.
        state: where a checkpoint left it; None = at the very beginning.
        checkpoints: writes them.
        log: clocks and reports each round.
        stop: is asked before each pass whether to stop there.

    Returns:
        Whether all rounds are done; False after a request to stop. The last checkpoint may still be
        under way.
    """
    if run.method.local_term is not None:
        with raise_everywhere(run.world, "trying the local term"):
            local.try_method_term(run)
    state = _begin(run) if state is None else state
    if state.unreported is not None:
        log.measured = RoundMeasurements(**state.unreported)
        if not _evaluate_and_report(run, state, log, stop):
            return False
        state = replace(state, stats=None, unreported=None)
    for round_index in range(state.finished_rounds, run.config.federated.num_rounds):
        plan, stats = run.plan(round_index), _stats_of(run, state)
        _make_local_steps(run, plan, stats, log, stop)
        if stats.was_stopped and not plan.is_complete(stats):
            checkpoints.save(replace(state, stats=stats.table))
            return False
        _require_all_steps(run, plan, stats)
        healthy, bad_rounds = _exclude_nonfinite(run, plan, stats, state, log)
        _compare_clients(run, plan, log)
        with log.timed("aggregate"):
            log.measured.uploaded_bytes = _average(run, plan, healthy)
        log.take_seconds_of(checkpoints)
        state = State(plan.finished_rounds, stats.table, bad_rounds, asdict(log.measured))
        if not _evaluate_and_report(run, state, log, stop):
            checkpoints.save(state)
            return False
        state = State(plan.finished_rounds, None, bad_rounds)
        if checkpoints.is_due(state.finished_rounds):
            checkpoints.save(state)
    return True


def _begin(run: Run) -> State:
    """Draw the adapters; what there is before training has still to be reported."""
    return State(0, None, 0, asdict(RoundMeasurements(uploaded_bytes=prepare(run))))


def prepare(run: Run) -> int:
    """Draw every client's A and take the mean over all N before the first step ("round 0").

    Adapters on disk are taken as they are, without a mean.

    Returns:
        Bytes of the message. Collective.
    """
    seed, method = run.config.seed, run.method
    if run.origin is not None:
        origin_rows.start(run.origin, run.clients, run.adapters, run.world)
        return 0
    draw_initial(
        run.clients,
        run.adapters,
        seed=seed,
        independent=method.independent_init and not method.averages_a_at_start,
    )
    if not method.averages_a_at_start:
        return 0
    # The 1/N in the variance of this mean is what the factor sqrt(N) makes up for.
    draws = initial_a(run.clients.own, run.adapters, seed)
    return aggregation.share_draws(run.world, run.clients, draws, run.weights(run.everyone))


def _stats_of(run: Run, state: State) -> RoundStats:
    """The sums of the round that begins, or that was interrupted."""
    return RoundStats.empty(run.num_clients) if state.stats is None else RoundStats(state.stats)


def _make_local_steps(
    run: Run, plan: RoundPlan, stats: RoundStats, log: RoundLog, stop: StopRequest
) -> None:
    """Make the local steps that are left of a round and gather the sums of all clients. Collective.

    Args:
        run: the run.
        plan: of the round.
        stats: what an earlier start has made of it; filled in place for all clients.
        log: clocks and reports each step.
        stop: is asked before each pass whether to stop there.
    """
    log.begin(plan.round_index)
    log.measured.earlier_tokens = float(stats.tokens.sum())
    with log.timed("local"):
        local.train(run, plan, stats, stop, log.step)
    with log.timed("wait"):
        log.measured.processes = local.gather(run, plan, stats, log.measured.local_seconds)


def _require_all_steps(run: Run, plan: RoundPlan, stats: RoundStats) -> None:
    """Refuse the mean where a client has not made just its local steps, though nobody stopped it.

    Every process sees the same sums, so all raise or none.
    """
    wrong = [client for client in plan.cohort if stats.steps[client] != plan.steps[client]]
    if not wrong:
        return
    process_of = {client: rank for rank, own in enumerate(run.placement) for client in own}
    counts = [
        f"client {client} (process {process_of[client]}) made {stats.steps[client]:g} local steps "
        f"instead of {plan.steps[client]}"
        for client in wrong
    ]
    raise TrainingFailedError(
        f"round {plan.finished_rounds}: {some_of(counts, str)}, and nobody asked to stop; the run "
        "is not complete, and nothing of this round is kept. Start the same command again: it "
        "resumes from the last checkpoint. Where it happens again, compare the software of that "
        "process with that of the others"
    )


def _compare_clients(run: Run, plan: RoundPlan, log: RoundLog) -> None:
    """Measure how alike the clients have become, before the mean makes their A the same.

    It sends B in a sum over clients, as the global adapter does, and is left out with that, and
    under privacy, since it carries no noise.
    """
    is_due = run.is_due(plan.finished_rounds, run.config.evaluation.every_rounds)
    may_send = run.privacy is None and not run.method.is_alone
    if is_due and may_send and "global" in run.config.evaluation.adapters:
        with log.timed("evaluate"):
            log.measured.similarity = aggregation.similarity(run.world, run.clients)
        both = aggregation.message_bytes(run.clients.layout, ("A", "B"))
        log.measured.similarity_bytes = both


def _average(run: Run, plan: RoundPlan, healthy: tuple[int, ...]) -> int:
    """Take the federated mean of the round over these clients; returns the bytes of the message."""
    run.world.watch.at(f"round {plan.finished_rounds}, the mean")
    changes: BaseChanges = {}
    if run.privacy is None:
        num_bytes, changes = _share(run, plan, healthy)
    else:
        finished = plan.finished_rounds
        num_bytes = run.privacy.share(run.world, run.clients, plan.averaged, healthy, finished)
    require_same_mean(run.world, run.clients, plan.averaged, changes, plan.finished_rounds)
    _change_weights(run, changes)
    if run.resets_moments:
        run.clients.reset_optimizer()
    return num_bytes


def _share(run: Run, plan: RoundPlan, healthy: tuple[int, ...]) -> tuple[int, BaseChanges]:
    """The server step and the weighted mean.

    Returns:
        Bytes of the messages; what the server step adds to frozen weights.
    """
    weights, num_bytes = run.weights(healthy), 0
    if run.method.weighed_by is not None:
        weights = aggregation.measured_weights(
            run.world, run.clients, run.num_clients, healthy, run.method.weighed_by
        )
    changes: BaseChanges = {}
    if run.method.server_step is not None and plan.stepped:
        seed = derive(Stream.SERVER_STEP, run.config.seed, plan.round_index)
        layers = ByLayer(run.world, run.clients, run.senders(weights), weights, run.gammas, seed)
        shared = layers.share(run.method.server_step, plan.stepped)
        num_bytes, changes = num_bytes + shared.num_bytes, shared.base_changes
    server = _server_side(run, plan, healthy)
    num_bytes += aggregation.share(run.world, run.clients, plan.means, weights, server)
    return num_bytes, changes


def _server_side(run: Run, plan: RoundPlan, healthy: tuple[int, ...]) -> ServerSide:
    """What the server does beside the mean over these clients."""
    optimizer = ServerOptimizer.of(run.config.federated)
    if not run.config.federated.scaffold:
        return ServerSide(optimizer, zero_padded=run.method.zero_padded)
    # The server's variate is the mean of all clients' variates, whoever takes part.
    of_all = run.weights(run.everyone)
    of_senders = [of_all[client] * (client in healthy) for client in run.everyone]
    return ServerSide(optimizer, plan.received, of_senders)


def _change_weights(run: Run, changes: BaseChanges) -> None:
    """Add what the server step says to the frozen weights, and keep it for checkpoints."""
    if run.changed is not None:
        run.changed.add(changes)
        run.clients.server_state |= run.changed.stored()
    elif changes:
        raise UserError(
            f"federated.method: the server step of {run.method.name} returned a base_change, but "
            "its record does not say changes_base=True"
        )


def _exclude_nonfinite(
    run: Run, plan: RoundPlan, stats: RoundStats, state: State, log: RoundLog
) -> tuple[tuple[int, ...], int]:
    """Leave clients that turned non-finite out of the mean, and name them.

    Every process sees the same sums, so all raise or none.

    Returns:
        The clients of the mean; how many rounds so far had such clients.
    """
    bad = [client for client in plan.cohort if stats.is_bad[client]]
    healthy = tuple(client for client in plan.cohort if not stats.is_bad[client])
    if not bad:
        return healthy, state.bad_rounds
    names, bad_rounds = ", ".join(map(str, bad)), state.bad_rounds + 1
    fact = (
        f"round {plan.finished_rounds}: the loss or gradient of client {names} was not finite; it "
        "is back where the round began and left out of this round's mean"
    )
    if not healthy and run.privacy is None:  # a private mean has room for nobody
        raise TrainingFailedError(f"{fact}. No client is left; lower train.lr or lora.alpha")
    if bad_rounds > run.config.federated.max_bad_rounds:
        raise TrainingFailedError(
            f"{fact}. That is round {bad_rounds} of this kind and federated.max_bad_rounds is "
            f"{run.config.federated.max_bad_rounds}; lower train.lr or lora.alpha, or look at the "
            "data of these clients"
        )
    log.warning(fact)
    return healthy, bad_rounds


def _evaluate_and_report(run: Run, state: State, log: RoundLog, stop: StopRequest) -> bool:
    """Evaluate where it is due and keep the round's event, before the checkpoint of the round.

    Returns:
        False, and no event, where somebody asked to stop meanwhile.
    """
    finished, evaluation = state.finished_rounds, None
    run.world.watch.at(f"the end of round {finished}")
    if run.is_due(finished, run.config.evaluation.every_rounds):
        with log.timed("evaluate"):
            evaluation = evaluate.evaluate(run, stop, finished)
        if evaluation is None:
            return False
    stats = None if state.stats is None else RoundStats(state.stats)
    log.end(finished, stats, evaluation)
    return True
