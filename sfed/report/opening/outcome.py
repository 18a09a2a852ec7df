"""What a run came to: each client before and after, what was sent, and that in one sentence."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfed.observability import metrics
from sfed.report.series import evaluated_of
from sfed.report.tables import mebibytes, sample_words, show, total
from sfed.storage.run_record import (
    LOSS,
    Event,
    RunRecord,
    clients_of,
    look,
    number,
    was_evaluated,
    words_of,
)

BEFORE, GLOBAL, OWN = "before", "global", "own"
STATES = (BEFORE, GLOBAL, OWN)
_ADAPTERS = {GLOBAL: "the global adapter", OWN: "their own adapter"}
_KEYS = {GLOBAL: "global", OWN: "personal"}
_BYTES_PER_PARAMETER = 4  # adapters and messages are fp32


@dataclass(frozen=True)
class ClientOutcome:
    """The main score of a client, or its held-out loss where the task has no score."""

    client: int
    title: str
    values: Mapping[str, float]
    """By state: ``before`` any training, with the ``global`` adapter, with its ``own``. A state
    that was not measured, or was not finite, is left out."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of a whole run."""

    sent: float
    """For training: of the messages of all rounds, as one process sends them."""
    messages: int
    """How many these were; one before training where A is averaged first."""
    evaluation: float
    """For evaluation only, such as the mean of B for the global adapter."""
    stayed: float | None
    """Of the factors that no message of training holds, of all clients; None where the run folder
    does not say it, as of an older version."""
    factors: Sequence[str]
    """Names of these factors."""
    is_whole: bool = True
    """Whether each round so far is reported, from round 0 on."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to, after its last evaluated round."""

    rounds: int
    planned: int | None
    what: str
    """In words: "held-out loss", or a score."""
    unit: str
    """Of the loss; "" of a score."""
    is_loss: bool
    """Whether lower is better."""
    base: str
    """What "before" is, in words."""
    clients: Sequence[ClientOutcome]
    """Those that were evaluated."""
    traffic: Traffic
    sample: str = ""
    """Which clients these are, where not all were evaluated."""

    def values(self, state: str) -> list[float]:
        """The values of all clients that have one."""
        return [one.values[state] for one in self.clients if state in one.values]

    @property
    def states(self) -> list[str]:
        """The states that some client has a value of."""
        return [state for state in STATES if self.values(state)]

    def is_better(self, one: float, other: float) -> bool:
        """Whether one value is better than another."""
        return one < other if self.is_loss else one > other


def outcome_of(story: RunRecord) -> Outcome | None:
    """What a run came to; None where no client was evaluated after the start.

    A run whose last evaluation gave no finite number has clients without values.
    """
    last = story.evaluated[-1] if story.evaluated else {"round": 0}
    after = evaluated_of(last) if last["round"] else []
    main = next((what for what in (*story.score_names[:1], LOSS) if _has(after, what)), None)
    if main is None and not (after and was_evaluated(last)):
        return None
    main = main or LOSS
    first = story.evaluated[0]
    earlier = {entry["client"]: entry for entry in clients_of(first) if first["round"] == 0}
    planned = number(story.config, "federated.num_rounds")
    return Outcome(
        rounds=last["round"],
        planned=None if planned is None else int(planned),
        what="held-out loss" if main == LOSS else words_of(main),
        unit=story.unit if main == LOSS else "",
        is_loss=main == LOSS,
        base=_base(story),
        clients=[
            ClientOutcome(
                entry["client"],
                story.title(entry["client"]),
                _values(earlier.get(entry["client"], {}), entry, main),
            )
            for entry in after
        ],
        traffic=_traffic(story),
        sample=sample_words(story),
    )


def _has(entries: Sequence[Event], what: str) -> bool:
    """Whether some client has a value of a score or of the loss."""
    return any(_of(entry, key, what) is not None for entry in entries for key in _KEYS.values())


def _of(entry: Event, adapter: str, what: str) -> float | None:
    return number(entry, f"{adapter}_{what}")


def _base(story: RunRecord) -> str:
    """What was evaluated before training."""
    if look(story.config, "lora.start_from"):
        return "the adapters that training started from"
    return "the base model" if story.by_token else "the base model with an untrained head"


def _values(before: Event, after: Event, what: str) -> dict[str, float]:
    # Before training every adapter is the same, so what was measured of one is that of both.
    earlier = (_of(before, adapter, what) for adapter in ("personal", "global"))
    found = {BEFORE: next((value for value in earlier if value is not None), None)}
    found |= {state: _of(after, adapter, what) for state, adapter in _KEYS.items()}
    return {state: value for state, value in found.items() if value is not None}


def _traffic(story: RunRecord) -> Traffic:
    own, num_clients = look(story.config, "resolved.own_parameters"), story.num_clients
    sizes = {
        str(factor): count
        for factor in (own if isinstance(own, dict) else {})
        if (count := number(own, factor)) is not None
    }
    is_known = isinstance(own, dict) and num_clients is not None
    held = {factor: count * _holders(story, factor) for factor, count in sizes.items()}
    stayed = _BYTES_PER_PARAMETER * sum(held.values())
    return Traffic(
        sent=total(story, metrics.UPLOADED_BYTES),
        messages=sum(bool(number(event, metrics.UPLOADED_BYTES)) for event in story.rounds),
        evaluation=total(story, metrics.EVALUATION_BYTES),
        stayed=stayed if is_known else None,
        factors=list(sizes),
        is_whole=not story.rounds or len(story.rounds) > story.rounds[-1]["round"],
    )


def _holders(story: RunRecord, factor: str) -> float:
    """How many clients hold a factor; one of a smaller rank holds that share of A and B."""
    ranks, num_clients = story.ranks, story.num_clients or 0.0
    if factor == "head" or len(ranks) != num_clients:
        return num_clients
    return sum(ranks) / max(ranks)


def sentences(outcome: Outcome) -> str:
    """Say what happened in the run's own numbers: clients, their mean, what was sent."""
    state = OWN if outcome.values(OWN) else GLOBAL
    rounds = f"{outcome.rounds} round{'' if outcome.rounds == 1 else 's'}"
    if outcome.planned is not None and outcome.planned > outcome.rounds:
        rounds = f"{outcome.rounds} of {outcome.planned} rounds"
    pairs = [
        (one.values[BEFORE], one.values[state])
        for one in outcome.clients
        if {BEFORE, state} <= one.values.keys()
    ]
    if not outcome.values(state):
        told = f"After {rounds} no client has a finite {outcome.what}."
    elif pairs:
        told = f"After {rounds} {_counted(outcome, state, pairs)}: {_means(outcome, state, pairs)}."
    else:
        mean = f"{show(statistics.fmean(outcome.values(state)))}{_unit(outcome)}"
        told = (
            f"After {rounds} the clients' mean {outcome.what} with {_ADAPTERS[state]} is {mean}; "
            "it was not measured before training."
        )
    sampled = f" These are {outcome.sample}." if outcome.sample else ""
    return f"{told}{sampled} {_sent(outcome.traffic)}"


def _counted(outcome: Outcome, state: str, pairs: Sequence[tuple[float, float]]) -> str:
    """How many clients are better and, where there are some, worse or as before."""
    better = sum(outcome.is_better(now, was) for was, now in pairs)
    worse = sum(outcome.is_better(was, now) for was, now in pairs)
    same = len(pairs) - better - worse
    measured = " with a measured value" if len(pairs) < len(outcome.clients) else ""
    clients = f"{len(pairs):,} client{'' if len(pairs) == 1 else 's'}{measured}"
    verb = "is" if better == 1 or len(pairs) == 1 else "are"
    told = f"{better:,} of {clients} {verb} better with {_ADAPTERS[state]} than with {outcome.base}"
    rest = [
        f"{count:,} {_be(count)} {word}"
        for count, word in ((worse, "worse"), (same, "as before"))
        if count
    ]
    return told + (f" ({', '.join(rest)})" if rest else "")


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _means(outcome: Outcome, state: str, pairs: Sequence[tuple[float, float]]) -> str:
    was, now = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    unit, shared = _unit(outcome), outcome.values(GLOBAL)
    if show(was) == show(now):
        told = f"the clients' mean {outcome.what} stayed at {show(now)}{unit}"
    else:
        verb = "fell" if now < was else "rose"
        told = f"the clients' mean {outcome.what} {verb} from {show(was)} to {show(now)}{unit}"
    if not outcome.is_better(now, was):
        told += ", so training made it no better"
    if state == OWN and shared:
        told += f"; with the global adapter it is {show(statistics.fmean(shared))}"
    return told


def _unit(outcome: Outcome) -> str:
    return f" {outcome.unit}" if outcome.unit else ""


def _sent(traffic: Traffic) -> str:
    sent = (
        f"{mebibytes(traffic.sent)} were sent for training"
        if traffic.sent
        else "Training sent nothing"
    )
    if not traffic.is_whole:
        sent += " in the rounds that metrics.jsonl reports, which are not all"
    if traffic.stayed is None:
        return f"{sent}."
    if not traffic.stayed:
        return f"{sent}; every trained factor is averaged, so nothing stayed with the clients."
    factors = " and ".join(traffic.factors)
    return f"{sent}; {mebibytes(traffic.stayed)} of {factors} stayed with the clients."
