"""How fast arms learn: rounds and local steps to a target loss, final losses, gradient norms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sfed.observability import metrics
from sfed.report.arms.blocks import Arm
from sfed.report.series import sample_of
from sfed.storage.run_record import RunRecord, clients_of, held_out, number


@dataclass(frozen=True)
class Reached:
    """When a run's mean held-out loss was first at or below the target."""

    round: int | None
    """The first evaluated round; None where it was not reached."""
    steps: float | None
    """Local steps of a client until then, mean over the clients; None where that is unknown."""
    lowest: float
    """The lowest loss of any evaluated round."""


def reached(story: RunRecord, kind: str, target: float) -> Reached | None:
    """Find the first evaluated round at or below a target; nothing between rounds is estimated.

    Args:
        story: the run.
        kind: of adapter, personal or global; its loss is the unweighted mean over clients.
        target: loss.

    Returns:
        None where this loss was never measured.
    """
    # Means over other clients than those of the last evaluation say nothing of the target.
    same = sample_of(story.evaluated[-1]) if story.evaluated else None
    events = [event for event in story.rounds if sample_of(event) == same]
    losses = [(e["round"], x) for e in events if (x := held_out(e, kind)) is not None]
    if not losses:
        return None
    first = next((number for number, loss in losses if loss <= target), None)
    steps = None if first is None else local_steps(story, first)
    return Reached(first, steps, min(loss for _, loss in losses))


def local_steps(story: RunRecord, until: int) -> float | None:
    """Local steps of a client up to a round, mean over clients; those who rested made none.

    None where an event does not say them, as under privacy.
    """
    total = 0.0
    for event in story.rounds:
        if not 0 < event["round"] <= until:
            continue
        entries = clients_of(event)
        steps = [number(entry, "steps") for entry in entries]
        if all(one is None for one in steps):
            return None
        total += math.fsum(one or 0.0 for one in steps) / len(entries)
    return total


def gradient_norms(arm: Arm) -> tuple[float | None, float | None]:
    """Norms before clipping of the first and of the last round, mean over the seeds."""
    norms = [
        [x for event in story.rounds if (x := number(event, metrics.GRAD_NORM)) is not None]
        for story in arm.runs.values()
    ]
    known = [some for some in norms if some]
    if not known:
        return None, None
    first, last = (statistics.fmean(some[place] for some in known) for place in (0, -1))
    return first, last


def final_loss(arm: Arm, kind: str) -> float | None:
    """Held-out loss after the last round, mean over clients and over the seeds."""
    ends: Sequence[float | None] = [held_out(s.evaluated[-1], kind) for s in arm.runs.values()]
    known = [end for end in ends if end is not None]
    return statistics.fmean(known) if known and len(known) == len(ends) else None
