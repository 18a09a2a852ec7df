"""The learning rate over the rounds of a run, whose number may change when the run resumes.

Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sfed.config.sections.train import TrainSection


def learning_rate(
    section: TrainSection, lr: float, num_rounds: int, progress_rounds: float
) -> float:
    """Return the learning rate after ``progress_rounds`` rounds (a fraction within a round).

    Linear warm-up over ``warmup_rounds``, then constant, or cosine or linear down to 0 at the end
    of the run.

    Args:
        section: the schedule.
        lr: of the client, after the warm-up.
        num_rounds: of the run.
        progress_rounds: since its start.
    """
    warmup = section.warmup_rounds
    if progress_rounds < warmup:
        return lr * progress_rounds / warmup
    rest = (progress_rounds - warmup) / max(num_rounds - warmup, 1e-12)
    if section.schedule == "cosine":
        return lr * 0.5 * (1.0 + math.cos(math.pi * min(rest, 1.0)))
    if section.schedule == "linear":
        return lr * max(0.0, 1.0 - rest)
    return lr


@dataclass(frozen=True)
class Course:
    """With which number of rounds the schedule is computed, in each part of a run.

    A round keeps the number that it began with. A start with another ``federated.num_rounds``
    changes that of the rounds that have not begun.
    """

    parts: tuple[tuple[int, int], ...]
    """(0-based first round, number of rounds) of each part, in order; the first begins with 0."""

    def num_rounds(self, round_index: int) -> int:
        """The number of rounds with which the rate of a 0-based round is computed."""
        return next(total for first, total in reversed(self.parts) if first <= round_index)

    def resumed(self, begun_rounds: int, num_rounds: int) -> Course:
        """The course of a start after so many rounds have begun, with this number of rounds."""
        kept = tuple(part for part in self.parts if part[0] < begun_rounds)
        if kept and kept[-1][1] == num_rounds:
            return Course(kept)
        return Course((*kept, (begun_rounds, num_rounds)))

    def line(self, section: TrainSection) -> str | None:
        """Say which rounds have which rates; None where all follow one schedule."""
        if section.schedule == "constant" or len(self.parts) == 1:
            return None
        *before, (first, total) = self.parts
        starts = [start for start, _ in self.parts]
        past = [
            f"{_span(start, end)} over {rounds}"
            for (start, rounds), end in zip(before, starts[1:], strict=True)
        ]
        rate = learning_rate(section, section.lr, total, first)
        return (
            f"learning rate: {section.schedule} over {total} rounds from round {first + 1} on, "
            f"which begins with {rate:.3g}; {', '.join(past)}"
        )


def _span(start: int, end: int) -> str:
    one = end - start == 1
    return f"round {start + 1}" if one else f"rounds {start + 1} to {end}"


def course_of(parts: Sequence[Sequence[int]] | None, num_rounds: int) -> Course:
    """The course that a checkpoint has recorded.

    Args:
        parts: as recorded; None by an earlier version, under which it could not change.
        num_rounds: what the run was planned with then.
    """
    return Course(tuple((first, total) for first, total in parts or [(0, num_rounds)]))
