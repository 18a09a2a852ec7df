"""What a model card says of a run and of an adapter, in words. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfed.config.schema import Config
from sfed.observability import metrics
from sfed.storage.run_record import (
    Event,
    RunRecord,
    clients_of,
    held_out,
    look,
    number,
    words_of,
)
from sfed.utils.redaction import mask
from sfed.utils.text import counted, delta_text

Facts = list[tuple[str, str]]

PRIVACY = ("epsilon", "delta", "clip", "noise_multiplier")
"""Names of the numbers of a guarantee."""


@dataclass(frozen=True)
class Course:
    """What a run was, as far as the configuration does not say it."""

    method: str
    num_clients: int
    finished_rounds: int
    started_from: str = ""
    """What the adapters started from, as of ``RunRecord.started_from``; empty where A was drawn."""
    privacy: str = ""
    """The guarantee of what was sent, as ``privacy_of`` says it; empty where there is none."""


def of_run(config: Config, course: Course) -> Facts:
    """What is the same of all adapters of a run."""
    planned = config.federated.num_rounds
    rounds = str(course.finished_rounds)
    return [
        ("federated method", course.method),
        ("clients (N)", str(course.num_clients)),
        ("rounds", rounds if course.finished_rounds == planned else f"{rounds} of {planned}"),
        *([("started from", course.started_from)] if course.started_from else []),
        *([("differential privacy", course.privacy)] if course.privacy else []),
    ]


def of_adapter(lora_rank: int, gamma: float) -> Facts:
    """Rank and factor of one adapter."""
    return [
        ("LoRA rank (r)", str(lora_rank)),
        ("scaling (gamma = lora_alpha / r)", f"{gamma:.6g}"),
    ]


def privacy_numbers(resolved: Mapping[str, Any], event: Event | None) -> dict[str, float | None]:
    """Return epsilon after a round, delta, clip and noise multiplier; nothing without privacy.

    An adaptive clip is told as that of the first round.

    Args:
        resolved: that part of ``config.json``.
        event: of the round; None = it has none.

    Returns:
        The numbers by the names of ``PRIVACY``, None where one is not known. Epsilon is infinite
        without noise.
    """
    facts = look(resolved, "privacy")
    if not isinstance(facts, dict):
        return {}
    clip, noise, delta = (number(facts, name) for name in ("clip", "noise_multiplier", "delta"))
    epsilon = math.inf if noise == 0 else number(event, metrics.EPSILON)
    return dict(zip(PRIVACY, (epsilon, delta, clip, noise), strict=True))


def privacy_of(config: Mapping[str, Any], event: Event | None) -> str:
    """Say what a run guarantees of what was sent; empty where privacy is off.

    Args:
        config: content of ``config.json``.
        event: of the round; None = it has none.
    """
    known = privacy_numbers(config.get("resolved", {}), event)
    if not known:
        return ""
    numbers = {name: "unknown" if one is None else f"{one:.4g}" for name, one in known.items()}
    num_clients = number(config, "resolved.privacy.num_clients")
    if known["delta"] is not None and num_clients:
        numbers["delta"] = delta_text(known["delta"], num_clients)
    if known["epsilon"] == math.inf:
        numbers["epsilon"] = "infinite (no noise)"
    releases = number(event, metrics.RELEASES)
    counted_as = "" if releases is None else f", {counted(int(releases), 'release')}"
    return (
        f"epsilon {numbers['epsilon']} at delta {numbers['delta']} "
        f"({look(config, 'resolved.privacy.neighbours')}), clip {numbers['clip']}"
        f"{_adapted(config, event)}, noise multiplier {numbers['noise_multiplier']}{counted_as}; "
        "of the shared factors only: what is a client's own carries no noise"
    )


def _adapted(config: Mapping[str, Any], event: Event | None) -> str:
    """What an adaptive clip has become; empty where it is fixed."""
    quantile = look(config, "resolved.privacy.clip_quantile")
    if quantile is None:
        return ""
    clip = number(event, metrics.CLIP)
    reached = "unknown" if clip is None else f"{clip:.4g}"
    return f" at first and {reached} at last, towards the quantile {quantile:g} of the changes"


def of_client(client: int, name: str, examples: int) -> Facts:
    """Whose adapter it is, and the size of its data."""
    whose = f"client {client}" + (f", {mask(name)}" if name else "")
    return [("adapter of", whose), ("training examples of the client", f"{examples:,}")]


def of_global(train_counts: Sequence[int]) -> Facts:
    """That it is the global adapter, and the size of the data of all clients."""
    clients = counted(len(train_counts), "client")
    return [
        ("adapter of", f"all {clients} together: A with the mean of B"),
        ("training examples of all clients", f"{sum(train_counts):,}"),
    ]


def scores_of(run: RunRecord, event: Event | None, client: int | None) -> Facts:
    """Held-out losses and scores of a round.

    Args:
        run: the record.
        event: of the round; None = it has none.
        client: number; None = of the global adapter on the data of all clients.
    """
    if event is None:
        return []
    if client is None:
        values = {what: held_out(event, "global", what, "") for what in run.held}
    else:
        entry = next((one for one in clients_of(event) if one["client"] == client), {})
        values = {what: number(entry, f"personal_{what}") for what in run.held}
    data = "all held-out data" if client is None else "the client's own held-out data"
    return [
        (f"{words_of(what)} on {data}", _measured(run, what, value))
        for what, value in values.items()
        if value is not None
    ]


def _measured(run: RunRecord, what: str, value: float) -> str:
    return f"{value:.4f} {run.unit}" if what == "loss" else f"{value:.4f}"
