"""What is promised, and the clip that follows a quantile (Andrew et al. 2021, Algorithm 1)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.config.load import validate
from sfed.methods.method import resolve
from sfed.privacy.accounting import Sampling
from sfed.privacy.guarantee import AdaptiveClip, Guarantee, describe, guarantee_of
from sfed.storage.card_facts import privacy_of
from sfed.utils.errors import ConfigError

EVERYONE = Sampling(1000, 100, is_poisson=True)


def guarantee(z: float = 1.0, count_noise: float = 5.0, quantile: float = 0.5) -> Guarantee:
    return Guarantee(EVERYONE, 0.1, z, 1e-5, AdaptiveClip(quantile, 0.2, count_noise))


def promised(cohort: int = 100, **privacy: Any) -> Guarantee:
    federated = {"num_clients": 1000, "clients_per_round": cohort}
    privacy = {"clip": 0.1, "noise_multiplier": 1.0, "clip_quantile": 0.5} | privacy
    config = validate({"federated": federated, "privacy": privacy})
    return guarantee_of(config, resolve(config), 1000)


def test_the_published_noise_of_the_sum() -> None:
    """Section 3.1 of the paper: with s = m / 20 = 5 the noise grows by half a percent at z = 1."""
    assert guarantee().sum_multiplier == pytest.approx((1 - 1 / 100) ** -0.5, rel=1e-12)
    assert guarantee(z=2.0).sum_multiplier == pytest.approx((1 / 4 - 1 / 100) ** -0.5, rel=1e-12)
    assert guarantee(z=0.0).sum_multiplier == 0


@given(z=st.floats(0.01, 100), above=st.floats(1.001, 1000))
def test_sum_and_count_together_cost_what_the_multiplier_says(z: float, above: float) -> None:
    """A client moves the sum by C and the count by 1/2: the squares of both, over their noise."""
    both = guarantee(z, count_noise=z / 2 * above)
    moved = (1 / both.sum_multiplier) ** 2 + (0.5 / (z / 2 * above)) ** 2
    assert moved == pytest.approx(1 / z**2, rel=1e-9)
    assert both.sum_multiplier >= z


def test_epsilon_is_that_of_a_fixed_clip() -> None:
    pytest.importorskip("dp_accounting", reason="accounts for epsilon: pip install 'sfed[privacy]'")
    fixed = Guarantee(EVERYONE, 0.1, 1.0, 1e-5)
    assert guarantee().epsilon([1, 2, 3]) == fixed.epsilon([1, 2, 3])


def test_a_step_of_the_clip() -> None:
    """C exp(-0.2 (b - 0.5)): all within shrink it by a tenth, none within let it grow."""
    adaptive = AdaptiveClip(0.5, 0.2, 5.0)
    assert adaptive.next(3.0, 1.0) == pytest.approx(3.0 * math.exp(-0.1), rel=1e-12)
    assert adaptive.next(3.0, 0.0) == pytest.approx(3.0 * math.exp(0.1), rel=1e-12)
    assert adaptive.next(3.0, 0.5) == 3.0
    assert adaptive.next(1e9, -1.0) == 1e9  # the bound of privacy.clip
    assert AdaptiveClip(0.5, 10.0, 5.0).next(1e-12, 5.0) == 1e-12


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_the_clip_finds_the_quantile_from_either_side(quantile: float, start: float) -> None:
    lengths = np.exp(np.random.default_rng(0).normal(size=1000))
    adaptive, clip = AdaptiveClip(quantile, 0.2, 5.0), start
    for _ in range(1000):
        clip = adaptive.next(clip, float(np.mean(lengths <= clip)))
    assert float(np.mean(lengths <= clip)) == pytest.approx(quantile, abs=0.01)


def test_the_count_has_a_twentieth_of_the_cohort_or_the_multiplier() -> None:
    noises = [promised(m).adaptive.count_noise for m in (100, 20, 8)]  # type: ignore[union-attr]
    assert noises == [5.0, 1.0, 1.0]
    assert promised(8).sum_multiplier == pytest.approx((4 / 3) ** 0.5)
    without = promised(noise_multiplier=0.0)
    assert without.adaptive == AdaptiveClip(0.5, 0.2, 0.0) and without.sum_multiplier == 0
    own = promised(clip_quantile=0.3, clip_lr=0.1, clip_count_noise=0.6).adaptive
    assert own == AdaptiveClip(0.3, 0.1, 0.6)


def test_a_count_that_would_spend_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.clip_count_noise=0\.5: .* set it above 0\.5"):
        promised(clip_count_noise=0.5)


@pytest.mark.parametrize(
    ("privacy", "named"),
    [
        (
            {"clip_quantile": 0.5},
            "clip_quantile=0.5 needs privacy.clip; set it too, or leave privacy.clip_quantile out",
        ),
        ({"clip": 1, "noise_multiplier": 1, "clip_lr": 0.1}, "clip_lr=0.1 needs privacy.clip_quan"),
        (
            {"clip": 1, "noise_multiplier": 1, "clip_count_noise": 2},
            "clip_count_noise=2 needs privacy.clip_quantile",
        ),
        (
            {"clip": 1, "noise_multiplier": 0, "clip_quantile": 0.5, "clip_count_noise": 2},
            "clip_count_noise=2 and noise_multiplier=0",
        ),
        ({"clip": 1, "noise_multiplier": 1, "clip_quantile": 1.0}, "clip_quantile"),
    ],
)
def test_keys_without_effect_are_refused(privacy: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        validate({"privacy": privacy})


def test_it_is_told_in_words() -> None:
    told = describe(guarantee(), 1.5)
    assert "epsilon 1.5" in told and "clip from 0.1 towards the quantile 0.5 of changes" in told
    assert "clip 0.1," in describe(Guarantee(EVERYONE, 0.1, 1.0, 1e-5), 1.5)
    assert guarantee().facts["clip_quantile"] == 0.5
    assert Guarantee(EVERYONE, 0.1, 1.0, 1e-5).facts["clip_quantile"] is None


@pytest.mark.parametrize(("delta", "is_weak"), [(9e-4, False), (1e-3, True), (0.5, True)])
def test_a_delta_that_lets_one_client_be_published_is_named_wherever_epsilon_is(
    delta: float, is_weak: bool
) -> None:
    """Of 1,000 clients: a mechanism that publishes one of them at random has a delta of 1 / N."""
    found = Guarantee(EVERYONE, 0.1, 1.0, delta)
    card = privacy_of({"resolved": {"privacy": found.facts}}, {"privacy/epsilon": 1.5})
    for told in (describe(found, 1.5), card):
        assert f"epsilon 1.5 at delta {delta:g}" in told
        assert ("not below 1 / N = 0.001: this protects no single client" in told) == is_weak
