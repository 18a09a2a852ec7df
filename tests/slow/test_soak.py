"""Property 8: killed at random moments over and over, a run ends with the same adapters."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support.selection import full
from tests.support.soak import soak


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("kills", "num_rounds"), [(2, 40), full(5, 200)])
def test_kills_at_random_moments_change_no_bit(tmp_path: Path, kills: int, num_rounds: int):
    tally = soak(tmp_path, kills=kills, num_rounds=num_rounds, seed=1, end=math.inf)
    assert tally.kills + tally.terms == kills
    assert tally.starts >= kills + 1
    assert tally.is_equal
