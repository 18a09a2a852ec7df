"""Property 8: killed at random moments over and over, a run ends with the same adapters."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from tests.support.selection import full
from tests.support.soak import Plan, soak

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize(("kills", "num_rounds"), [(2, 40), full(5, 200)])
def test_kills_at_random_moments_change_no_bit(tmp_path: Path, kills: int, num_rounds: int) -> None:
    plan = Plan(kills, math.inf, random.Random(1), one_process=False)
    tally = soak(tmp_path, plan, num_rounds)
    assert tally.kills + tally.terms == kills
    assert tally.starts >= kills + 1
    assert tally.is_equal


@pytest.mark.full
def test_the_process_that_is_left_leaves_by_itself(tmp_path: Path) -> None:
    """Within ten seconds on a quiet machine; here only that it comes to an end."""
    tally = soak(tmp_path, Plan(2, math.inf, random.Random(1), one_process=True), 40)
    assert {how: len(seconds) for how, seconds in tally.seconds_until_gone.items()} == {
        "not told to stop": 1,
        "told to stop": 1,
    }
    assert tally.is_equal
