"""What a run under privacy promises, and how its noise is shared out. Needs no torch.

The clip is fixed, or it follows a quantile of the lengths of the clients' changes (Andrew et al.
2021, arXiv 1905.03871, Algorithm 1). Then each round also releases which share was within the clip:

    b = 1/2 + (sum_i (b_i - 1/2) + N(0, s^2)) / m,        C <- C exp(-clip_lr (b - clip_quantile))

with b_i = 1 where |d_i| <= C. One client moves the count by 1/2 at most, and the sum by C, so both
together are one Gaussian mechanism of multiplier z where the noise of the sum is z' C with

    1 / z'^2  +  1 / (2 s)^2  =  1 / z^2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sfed.config.schema import Config
from sfed.config.sections.privacy import CLIP_LR, MOST_CLIP, PrivacySection
from sfed.methods.method import Method
from sfed.privacy import accounting
from sfed.privacy.accounting import Sampling
from sfed.utils.errors import ConfigError
from sfed.utils.text import delta_text

_LEAST_CLIP = 1e-12


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clip follows a quantile of the lengths of the changes."""

    quantile: float
    """The share of changes that are to be within the clip."""
    lr: float
    """Of the logarithm of the clip."""
    count_noise: float
    """s: standard deviation of the noise on the count, in clients."""

    def next(self, clip: float, within: float) -> float:
        """Return the clip of the next round.

        Args:
            clip: of this round.
            within: the noisy share of changes within it, perhaps below 0 or above 1.
        """
        following = clip * math.exp(-self.lr * (within - self.quantile))
        return min(max(following, _LEAST_CLIP), MOST_CLIP)


@dataclass(frozen=True)
class Guarantee:
    """What a run promises."""

    sampling: Sampling
    clip: float
    """C; of the first round where it adapts."""
    noise_multiplier: float
    """z, of all that a round releases."""
    delta: float
    adaptive: AdaptiveClip | None = None
    """None where the clip is fixed."""

    def epsilon(self, rounds: Sequence[int]) -> float:
        """Return epsilon of releases in these rounds."""
        return accounting.epsilon(self.sampling, self.noise_multiplier, rounds, self.delta)

    @property
    def sum_multiplier(self) -> float:
        """Standard deviation of the noise on the sum, divided by C: z, or z' beside a count."""
        z = self.noise_multiplier
        if self.adaptive is None or z == 0:
            return z
        return 1 / math.sqrt(1 / z**2 - 1 / (2 * self.adaptive.count_noise) ** 2)

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as plain data."""
        adaptive = self.adaptive
        return {
            "clip": self.clip,
            "noise_multiplier": self.noise_multiplier,
            "delta": self.delta,
            "num_clients": self.sampling.num_clients,
            "cohort": self.sampling.cohort,
            "sampling": "poisson" if self.sampling.is_poisson else "fixed",
            "neighbours": self.sampling.neighbours,
            "clip_quantile": None if adaptive is None else adaptive.quantile,
            "clip_lr": None if adaptive is None else adaptive.lr,
            "clip_count_noise": None if adaptive is None else adaptive.count_noise,
        }


def guarantee_of(config: Config, method: Method, num_clients: int) -> Guarantee:
    """What a configuration with privacy promises for N clients; target_epsilon gives the noise.

    Raises:
        ConfigError: where no noise reaches ``privacy.target_epsilon``, or the count of an adaptive
            clip has too little.
    """
    privacy = config.privacy
    z = privacy.noise_multiplier
    if privacy.target_epsilon is not None:
        sampling = sampling_of(config, num_clients)
        releases = len(planned_releases(config, method, config.federated.num_rounds))
        try:
            z = accounting.noise_for(sampling, privacy.target_epsilon, releases, privacy.delta)
        except ValueError as problem:
            raise ConfigError(
                f"privacy.target_epsilon={privacy.target_epsilon:g}: {problem}; set a larger one, "
                "fewer federated.num_rounds, or a smaller federated.clients_per_round"
            ) from None
    assert z is not None  # the section has one of the two
    return guarantee_with(config, num_clients, z)


def guarantee_with(config: Config, num_clients: int, noise_multiplier: float) -> Guarantee:
    """The promise with a known noise multiplier.

    Raises:
        ConfigError: where the count of an adaptive clip has too little noise.
    """
    privacy, sampling = config.privacy, sampling_of(config, num_clients)
    assert privacy.clip is not None
    adaptive = _adaptive(privacy, sampling, noise_multiplier)
    return Guarantee(sampling, privacy.clip, noise_multiplier, privacy.delta, adaptive)


def _adaptive(privacy: PrivacySection, sampling: Sampling, z: float) -> AdaptiveClip | None:
    if privacy.clip_quantile is None:
        return None
    noise = privacy.clip_count_noise
    if noise is None:
        # m / 20 is the paper's; z leaves the count a quarter of 1 / z^2 where m is small.
        noise = max(sampling.cohort / 20, z) if z else 0.0
    if z and 2 * noise <= z:
        raise ConfigError(
            f"privacy.clip_count_noise={noise:g}: the count alone would spend more than the noise "
            f"multiplier {z:.4g} allows; set it above {z / 2:.4g}, half of the multiplier"
        )
    lr = CLIP_LR if privacy.clip_lr is None else privacy.clip_lr
    return AdaptiveClip(privacy.clip_quantile, lr, noise)


def sampling_of(config: Config, num_clients: int) -> Sampling:
    """How cohorts are drawn under privacy."""
    federated = config.federated
    cohort = federated.clients_per_round or num_clients
    return Sampling(num_clients, cohort, is_poisson=config.has_poisson_cohorts)


def planned_releases(config: Config, method: Method, num_rounds: int) -> list[int]:
    """The rounds, from 1, that share something."""
    shares_head = config.federated.share_head
    return [i + 1 for i in range(num_rounds) if shares_head or method.averaged_in(i)]


def describe(guarantee: Guarantee, epsilon: float) -> str:
    """Say a guarantee in words."""
    told = f"{epsilon:.4g}" if math.isfinite(epsilon) else "infinite (no noise)"
    adaptive, clip = guarantee.adaptive, f"clip {guarantee.clip:g}"
    if adaptive is not None:
        clip = f"clip from {guarantee.clip:g} towards the quantile {adaptive.quantile:g} of changes"
    return (
        f"epsilon {told} at delta {delta_text(guarantee.delta, guarantee.sampling.num_clients)} "
        f"({guarantee.sampling.neighbours}), "
        f"{clip}, noise multiplier {guarantee.noise_multiplier:.4g}"
    )
