"""The plan of a round: which steps are left, and when a round is complete."""

from __future__ import annotations

import numpy as np
import pytest

from sfed.clients.round_stats import RoundStats
from sfed.federated.context import RoundPlan

STEPS = {0: 3, 2: 5}
PLAN = RoundPlan(4, (0, 2), STEPS, [[(0, 2)]], ("A", "B"), ("A",))


def made(*steps: int) -> RoundStats:
    """The sums of three clients after so many steps each."""
    stats = RoundStats(np.zeros((3, len(RoundStats.COLUMNS))))
    stats.steps[:] = steps
    return stats


@pytest.mark.parametrize(
    ("steps", "is_complete"),
    [
        ((3, 0, 5), True),
        ((2, 0, 5), False),  # client 0 is one step short
        ((3, 0, 4), False),
        ((0, 0, 0), False),
        ((3, 9, 5), True),  # client 1 is not of the cohort
    ],
)
def test_a_round_is_complete_when_every_client_has_made_its_last_step(
    steps: tuple[int, ...], is_complete: bool
) -> None:
    assert PLAN.is_complete(made(*steps)) == is_complete


@pytest.mark.parametrize(
    ("steps", "left"),
    [((0, 0, 0), range(5)), ((2, 0, 1), range(1, 5)), ((3, 0, 4), range(3, 5))],
)
def test_a_group_has_the_steps_from_the_first_that_a_client_has_still_to_make(
    steps: tuple[int, ...], left: range
) -> None:
    assert PLAN.steps_left(made(*steps), (0, 2)) == left


def test_a_round_counts_from_0_and_is_reported_from_1() -> None:
    assert (PLAN.round_index, PLAN.finished_rounds) == (4, 5)
