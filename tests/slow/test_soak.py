"""Property 8: killed at random moments over and over, a run ends with the same adapters."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support.soak import soak


@pytest.mark.dist
@pytest.mark.slow
def test_five_kills_at_random_moments_change_no_bit(tmp_path: Path):
    tally = soak(tmp_path, kills=5, num_rounds=200, seed=1, end=math.inf)
    assert tally.kills + tally.terms == 5
    assert tally.starts >= 6
    assert tally.is_equal
