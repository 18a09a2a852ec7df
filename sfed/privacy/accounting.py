"""What the noise is worth: epsilon of the releases of a run, by dp-accounting. Needs no torch.

A release of a round is the Gaussian mechanism on the sum of the clipped changes of a cohort, with
noise of standard deviation z C. Poisson cohorts: each client takes part with probability m / N, and
neighbours differ in one client that contributes or does not; the sum's sensitivity is C. Cohorts of
fixed size m: neighbours differ in what one client contributes; the sensitivity is 2 C, which
halves the multiplier. The library (0.6) does not halve it by itself.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

PACKAGE = "dp-accounting"
_VERSIONS = ">=0.6,<0.7"
_KNOWN = ((0, 6), (0, 7))
"""The first version, and the first that is not known any more: from there the library might halve
the multiplier itself."""
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
"""Of Renyi divergences. Whole numbers: the others do not converge for large m / N."""
_TOLERANCE = 1e-3
"""Of a noise multiplier that is searched for."""


@dataclass(frozen=True)
class Sampling:
    """How the cohort of a round is drawn."""

    num_clients: int
    """N."""
    cohort: int
    """m: the expected size of a Poisson cohort, or the size of a fixed one."""
    is_poisson: bool

    @property
    def neighbours(self) -> str:
        """What epsilon hides, in words."""
        return "add or remove one client" if self.is_poisson else "replace one client"

    @property
    def is_everyone(self) -> bool:
        """Whether all clients take part in every round, so that nothing is amplified."""
        return self.cohort == self.num_clients


def problem() -> str | None:
    """What is wrong with the installed library, and the remedy; None where nothing is."""
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        found = "is not installed"
    else:
        parts = re.match(r"(\d+)\.(\d+)", version)
        if parts and _KNOWN[0] <= (int(parts[1]), int(parts[2])) < _KNOWN[1]:
            return None
        found = f"is here in version {version}"
    return (
        f"epsilon is accounted by {PACKAGE} {_VERSIONS}, which {found}; install it with "
        "pip install 'sfed[privacy]' (it needs attrs below 24)"
    )


def epsilon(
    sampling: Sampling, noise_multiplier: float, rounds: Iterable[int], delta: float
) -> float:
    """Return epsilon of releases; infinite without noise.

    Releases of one round share its cohort, so k of them are one release of a sampled Gaussian
    mechanism with multiplier z / sqrt(k), and not k sampled ones.

    Args:
        sampling: of the cohorts.
        noise_multiplier: z.
        rounds: the round of each release.
        delta: at which epsilon is told.
    """
    times = Counter(Counter(rounds).values())
    if not times:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    accountant = _accountant(sampling)
    for releases, count in sorted(times.items()):
        accountant.compose(_event(sampling, noise_multiplier, releases), count)
    return float(accountant.get_epsilon(delta))


def noise_for(sampling: Sampling, target_epsilon: float, num_rounds: int, delta: float) -> float:
    """Return the smallest noise multiplier with which so many rounds stay at an epsilon.

    Within 0.001, above the smallest and never below.

    Raises:
        ValueError: where no multiplier up to 1000 does.
    """
    import dp_accounting

    try:
        found = dp_accounting.calibrate_dp_mechanism(
            lambda: _accountant(sampling),
            lambda z: dp_accounting.SelfComposedDpEvent(_event(sampling, z, 1), num_rounds),
            target_epsilon,
            delta,
            dp_accounting.ExplicitBracketInterval(1e-2, 1e3),
            tol=_TOLERANCE,
        )
    except ValueError:
        found = math.nan
    if not found <= 1e3:
        raise ValueError(
            f"no noise multiplier from 0.01 to 1000 gives epsilon {target_epsilon:g} after "
            f"{num_rounds} rounds at delta {delta:g}"
        )
    return float(found)


def _accountant(sampling: Sampling) -> Any:
    from dp_accounting import NeighboringRelation, rdp

    relation = (
        NeighboringRelation.ADD_OR_REMOVE_ONE
        if sampling.is_poisson
        else NeighboringRelation.REPLACE_ONE
    )
    return rdp.RdpAccountant(ORDERS, relation)


def _event(sampling: Sampling, noise_multiplier: float, releases: int) -> Any:
    """The releases of one round."""
    import dp_accounting

    # Standard deviation over sensitivity, which is C or 2 C.
    multiplier = noise_multiplier / (1 if sampling.is_poisson else 2) / math.sqrt(releases)
    gaussian = dp_accounting.GaussianDpEvent(multiplier)
    if sampling.is_everyone:
        return gaussian
    if sampling.is_poisson:
        rate = sampling.cohort / sampling.num_clients
        return dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    return dp_accounting.SampledWithoutReplacementDpEvent(
        sampling.num_clients, sampling.cohort, gaussian
    )
