"""Epsilon against published values, the library's own, and what its relations mean here."""

from __future__ import annotations

import math
from importlib import metadata

import pytest

from sfed.privacy import accounting
from sfed.privacy.accounting import Sampling

needs_library = pytest.mark.skipif(
    accounting.problem() is not None, reason="accounts for epsilon: pip install 'sfed[privacy]'"
)


@needs_library
@pytest.mark.parametrize(
    ("rate", "multiplier", "steps", "delta", "published", "own"),
    [
        # Abadi et al. 2016 (1607.00133); McMahan et al. 2018 (1710.06963), 5,000 of 763,430 users.
        # Both by whole orders, as ours are.
        (0.01, 4.0, 10_000, 1e-5, 1.26, 1.0355),
        (5000 / 763_430, 1.0, 5000, 1e-9, 4.634, 4.2115),
    ],
    ids=["Abadi", "McMahan"],
)
def test_published_values_by_the_classic_conversion_and_the_librarys_own_say_less(
    rate: float, multiplier: float, steps: int, delta: float, published: float, own: float
) -> None:
    import dp_accounting
    from dp_accounting import rdp

    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
    accountant = rdp.RdpAccountant(accounting.ORDERS)
    accountant.compose(event, steps)
    pairs = zip(accountant._orders, accountant._rdp, strict=True)
    classic = min(one + math.log(1 / delta) / (order - 1) for order, one in pairs)
    assert classic == pytest.approx(published, abs=0.005)
    assert accountant.get_epsilon(delta) == pytest.approx(own, abs=2e-4)


@needs_library
def test_our_epsilon_is_the_librarys_of_the_same_releases() -> None:
    sampling = Sampling(100, 1, is_poisson=True)
    assert accounting.epsilon(sampling, 4.0, range(10_000), 1e-5) == pytest.approx(1.0355, abs=2e-4)


@needs_library
@pytest.mark.parametrize(
    ("num_clients", "cohort", "poisson", "fixed"),
    [(16, 8, 6.2352, 27.2926), (64, 16, 3.1236, 14.5361), (1000, 50, 0.5999, 3.2679)],
)
def test_pinned_values_of_small_federations(
    num_clients: int, cohort: int, poisson: float, fixed: float
) -> None:
    """z = 2, 20 rounds, delta 1e-5. The two hide different things, so neither is a gain."""
    for is_poisson, pinned in ((True, poisson), (False, fixed)):
        sampling = Sampling(num_clients, cohort, is_poisson)
        assert accounting.epsilon(sampling, 2.0, range(20), 1e-5) == pytest.approx(pinned, abs=2e-4)


@needs_library
def test_the_library_halves_no_multiplier_by_itself() -> None:
    """A cohort of all, drawn without replacement, is the plain mechanism at z / 2.

    Should the library begin to halve it, ours would be halved twice: then this fails.
    """
    import dp_accounting
    from dp_accounting import rdp

    def told(event: object) -> float:
        accountant = rdp.RdpAccountant(
            accounting.ORDERS, dp_accounting.NeighboringRelation.REPLACE_ONE
        )
        accountant.compose(event)
        return float(accountant.get_epsilon(1e-5))

    half = dp_accounting.GaussianDpEvent(0.5)
    sampled = dp_accounting.SampledWithoutReplacementDpEvent(16, 16, half)
    assert told(sampled) == pytest.approx(told(half), rel=1e-9)
    ours = accounting.epsilon(Sampling(16, 16, is_poisson=False), 1.0, [1], 1e-5)
    assert ours == pytest.approx(told(half), rel=1e-9) == pytest.approx(10.8017, abs=2e-4)
    # Every client in every round, add or remove one: the sensitivity is C, so z counts whole.
    everyone = accounting.epsilon(Sampling(16, 16, is_poisson=True), 1.0, [1], 1e-5)
    assert everyone == pytest.approx(told(dp_accounting.GaussianDpEvent(1.0)), rel=1e-9)


@needs_library
@pytest.mark.parametrize("is_poisson", [True, False])
def test_two_releases_of_one_round_cost_more_than_those_of_two_rounds(is_poisson: bool) -> None:
    """They share the cohort: it was drawn once and hides a client once."""
    sampling = Sampling(64, 16, is_poisson)
    once, repeated, two = (
        accounting.epsilon(sampling, 2.0, rounds, 1e-5) for rounds in ([1], [1, 1], [1, 2])
    )
    assert once < two < repeated
    # Without sampling nothing is shared: there they cost the same.
    everyone = Sampling(64, 64, is_poisson)
    repeated, two = (accounting.epsilon(everyone, 2.0, r, 1e-5) for r in ([1, 1], [1, 2]))
    assert repeated == pytest.approx(two, rel=1e-9)


def test_nothing_released_costs_nothing_and_no_noise_hides_nothing() -> None:
    sampling = Sampling(8, 4, is_poisson=True)
    assert accounting.epsilon(sampling, 0.0, [], 1e-5) == 0.0
    assert accounting.epsilon(sampling, 0.0, [1], 1e-5) == math.inf


@pytest.mark.parametrize(
    ("version", "is_known"),
    [("0.0.2", False), ("0.5.9", False), ("0.6.0", True), ("0.6.9", True), ("0.7.0", False),
     ("1.0", False), ("odd", False)],
)  # fmt: skip
def test_a_version_that_is_not_known_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, is_known: bool
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    problem = accounting.problem()
    assert (problem is None) is is_known
    assert problem is None or f"in version {version}" in problem


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    assert "is not installed; install it with pip install 'sfed[privacy]'" in str(
        accounting.problem()
    )
