"""The section of differential privacy. Needs no torch."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, model_validator

from sfed.config.fields import Location, Section

MOST_CLIP = 1e9
CLIP_LR = 0.2
"""Of the logarithm of an adaptive clip, where none is given: that of Andrew et al. 2021."""


class PrivacySection(Section):
    """Differential privacy, at the level of clients, of what is shared."""

    clip: float | None = Field(default=None, gt=0, le=MOST_CLIP)
    """Bound C, above 0 and at most 1e9, on the L2 norm of a client's change of all shared factors
    in a round; larger changes are scaled down to it. null = no differential privacy."""
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    """Share of the changes, above 0 and below 1, that are to be within the clip. privacy.clip is
    then that of the first round, and the clip follows a noisy count (Andrew et al. 2021). null =
    the clip is fixed."""
    clip_lr: float | None = Field(default=None, gt=0, le=10)
    """Learning rate of the logarithm of an adaptive clip, above 0 and at most 10. null = 0.2."""
    clip_count_noise: float | None = Field(default=None, gt=0, le=MOST_CLIP)
    """Standard deviation, in clients, of the noise on the count of changes within an adaptive clip:
    above half of the noise multiplier. The noise of the sum grows so that both together cost what
    the noise multiplier says. null = a twentieth of the cohort, at least the noise multiplier."""
    noise_multiplier: float | None = Field(default=None, ge=0, le=1000)
    """Standard deviation of the Gaussian noise on the sum of the clipped changes, divided by C: at
    least 0 and at most 1000. With 0 epsilon is infinite: the changes are clipped, and nothing is
    private."""
    target_epsilon: PositiveFloat | None = None
    """Epsilon after federated.num_rounds rounds, above 0, instead of noise_multiplier: the smallest
    noise with which the run stays at or below it is computed at the start."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """Delta at which epsilon is told, above 0 and below 1. It should be well below 1 / N."""
    key_folder: Location | None = None
    """Folder of the secret keys of runs, from which noise and cohorts are drawn. Never publish it.
    null = .keys in output.dir."""

    @model_validator(mode="after")
    def _check(self) -> PrivacySection:
        given = [
            key for key in ("noise_multiplier", "target_epsilon") if getattr(self, key) is not None
        ]
        if self.clip is None and given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])} needs privacy.clip; set it to the largest "
                "norm of a client's change, such as 1.0"
            )
        self._check_adaptive()
        if self.clip is not None and len(given) != 1:
            what = "exclude each other" if given else "are both null"
            raise ValueError(
                f"noise_multiplier and target_epsilon {what}: privacy.clip={self.clip:g} needs one "
                "of them"
            )
        return self

    def _check_adaptive(self) -> None:
        """Refuse keys of an adaptive clip where there is none, or no noise."""
        needs = {
            "clip_quantile": "clip",
            "clip_lr": "clip_quantile",
            "clip_count_noise": "clip_quantile",
        }
        for key, needed in needs.items():
            if getattr(self, key) is not None and getattr(self, needed) is None:
                raise ValueError(
                    f"{key}={getattr(self, key):g} needs privacy.{needed}; set it too, or leave "
                    f"privacy.{key} out"
                )
        if self.clip_count_noise is not None and self.noise_multiplier == 0:
            raise ValueError(
                f"clip_count_noise={self.clip_count_noise:g} and noise_multiplier=0, which means "
                "no noise at all, exclude each other; remove one of them"
            )

    @property
    def is_on(self) -> bool:
        """Whether what is shared is clipped."""
        return self.clip is not None
