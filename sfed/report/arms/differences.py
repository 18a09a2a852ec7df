"""Paired differences between two arms, and their intervals.

The main interval is a t interval over the seeds' mean differences (n - 1 degrees of freedom): only
seeds are independent of each other, since the clients of one run share averaged factors. The
second one takes the seeds as given and varies the clients within them: strata with their own
variances, and degrees of freedom after Welch and Satterthwaite.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

COVERED = 0.95
BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"
ONE_SEED, NO_SPREAD = "one seed: no interval", "no spread over seeds: no interval"
# Differences of seeds within this share of the largest client's are equal but for round-off.
_ROUND_OFF = 1e-9


class Interval(NamedTuple):
    """Both ends."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """An arm minus the reference, over seeds and clients."""

    mean: float
    """Mean over the seeds of the mean over clients."""
    seeds: int
    over_seeds: Interval | None
    """None of one seed, and where all seeds have the same difference."""
    over_clients: Interval | None
    """Of these seeds as they are; None where a seed has one client, or nothing varies."""


def difference(by_seed: Mapping[int, Sequence[float]]) -> Difference:
    """Summarise the clients' differences of each seed.

    Args:
        by_seed: seed -> one difference per client; at least one seed with at least one client.
    """
    means = [math.fsum(some) / len(some) for some in by_seed.values()]
    mean = math.fsum(means) / len(means)
    largest = max(abs(one) for some in by_seed.values() for one in some)
    return Difference(
        mean=mean,
        seeds=len(means),
        over_seeds=_over_seeds(means, mean, _ROUND_OFF * largest),
        over_clients=_over_clients(list(by_seed.values()), mean),
    )


def _over_seeds(means: Sequence[float], mean: float, round_off: float) -> Interval | None:
    if len(means) < 2 or max(means) - min(means) <= round_off:
        return None
    error = statistics.stdev(means) / math.sqrt(len(means))
    return _around(mean, error, len(means) - 1)


def _over_clients(strata: Sequence[Sequence[float]], mean: float) -> Interval | None:
    if any(len(some) < 2 for some in strata):
        return None
    parts = [statistics.variance(some) / len(some) for some in strata]
    whole = math.fsum(parts)
    if not whole:
        return None
    below = math.fsum(part**2 / (len(some) - 1) for part, some in zip(parts, strata, strict=True))
    return _around(mean, math.sqrt(whole) / len(strata), whole**2 / below)


def _around(mean: float, error: float, freedom: float) -> Interval:
    half = t_quantile(freedom) * error
    return Interval(mean - half, mean + half)


def t_quantile(freedom: float) -> float:
    """How many standard errors a two-sided 95 % interval reaches to either side."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + COVERED) / 2))


def verdict(one: Difference, *, lower_is_better: bool) -> str:
    """What the interval over the seeds shows, in words."""
    if one.seeds < 2:
        return ONE_SEED
    if one.over_seeds is None:
        return NO_SPREAD if one.mean else NOT_SHOWN
    if one.over_seeds.low <= 0 <= one.over_seeds.high:
        return NOT_SHOWN
    return BETTER if (one.mean < 0) == lower_is_better else WORSE
