"""What privacy cannot stand beside, in one place: each by its key, with the reason. Needs no torch.

What is released has to be a function of the noisy sum of clipped changes, and of nothing else that
the clients' data moves.
"""

from __future__ import annotations

from collections.abc import Iterator

from sfed.config.schema import Config
from sfed.methods.method import Method
from sfed.privacy import accounting


def mistakes(config: Config, method: Method) -> list[str]:
    """Name what keeps a run from being private; nothing where privacy is off."""
    if not config.privacy.is_on:
        if config.federated.sampling == "poisson":
            return [
                "federated.sampling=poisson is for runs with privacy, where the denominator of the "
                "mean is fixed; set privacy.clip, or leave it at auto"
            ]
        return []
    reasons = [*_of_noise(config), *_of_method(config, method), *_of_data(config)]
    reasons += _of_earlier_releases(config)
    return [f"privacy.clip={config.privacy.clip:g}: {one}" for one in reasons]


def _of_noise(config: Config) -> Iterator[str]:
    if config.privacy.noise_multiplier != 0 and (lacking := accounting.problem()):
        yield lacking


def _of_method(config: Config, method: Method) -> Iterator[str]:
    """Where the release would be no function of the clipped noisy sum, or there is none."""
    federated = config.federated
    if method.server_step is not None:
        yield (
            f"the server step of federated.method={federated.method} gets each client's factors, "
            "and what it makes of them is no function of a noisy sum of clipped changes; choose a "
            "method without one"
        )
    if method.weighed_by is not None:
        yield (
            f"federated.method={federated.method} weighs clients by what they have trained, which "
            "no clip bounds; choose a method without such weights"
        )
    if federated.server_optimizer != "none":
        yield (
            f"federated.server_optimizer={federated.server_optimizer} steps on the plain mean and "
            "not on the noisy sum; set it to none"
        )
    if federated.scaffold:
        yield (
            "federated.scaffold=true sends control variates beside the changes, which no clip "
            "bounds; set it to false"
        )
    if not any(method.averaged) and not federated.share_head:
        yield (
            f"federated.method={federated.method} with federated.averaged={federated.averaged!r} "
            "shares nothing, so there is nothing to protect; remove the section privacy"
        )


def _of_data(config: Config) -> Iterator[str]:
    """What brings the data of all clients into a run beside the sum."""
    if config.federated.weighting == "examples":
        yield (
            "federated.weighting=examples weighs clients by their data, which no clip bounds; set "
            "it to uniform"
        )
    if config.train.class_weights == "balanced":
        yield (
            "train.class_weights=balanced is computed from the labels of all clients, without "
            "noise; give weights as {label: weight}, or set it to none"
        )


def _of_earlier_releases(config: Config) -> Iterator[str]:
    """What the ledger would not count."""
    origins = {"lora.start_from": config.lora.start_from, "federated.join": config.federated.join}
    for key, folder in origins.items():
        if folder is not None:
            yield (
                f"{key}={folder} may be adapters of these clients, whose releases would not be "
                "counted; remove it"
            )
    if config.output.resume not in ("auto", "never"):
        yield (
            f"output.resume={config.output.resume} may be a checkpoint of another run, whose "
            "releases would not be counted; set it to auto"
        )
