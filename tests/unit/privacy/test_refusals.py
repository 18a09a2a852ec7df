"""What privacy cannot stand beside is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sfed.config.load import validate
from sfed.methods.method import METHODS, resolve
from sfed.methods.server import CommonLayer
from sfed.privacy import accounting, refusals
from sfed.utils.errors import ConfigError

ON = {"clip": 1.0, "noise_multiplier": 1.0}


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "problem", lambda: None)


def refused(**sections: dict) -> list[str]:
    config = validate({"privacy": ON, **sections})
    return refusals.mistakes(config, resolve(config))


def test_a_method_that_is_a_mean_is_not_refused() -> None:
    for name in METHODS.keys() - {"local", "flexlora", "fedex", "flora", "hetlora"}:
        assert not refused(federated={"method": name})
    shared = {"method": "local", "share_head": True}
    assert not refused(federated=shared, data={"task": "glue", "name": "sst2"})


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"federated": {"server_optimizer": "fedavgm"}}, "federated.server_optimizer=fedavgm"),
        ({"federated": {"scaffold": True}}, "federated.scaffold=true"),
        ({"federated": {"weighting": "examples"}}, "federated.weighting=examples"),
        ({"federated": {"method": "local"}}, "federated.method=local"),
        ({"federated": {"method": "flexlora"}}, "the server step of federated.method=flexlora"),
        ({"federated": {"method": "hetlora"}}, "federated.method=hetlora weighs clients"),
        ({"federated": {"method": "fedsa", "averaged": []}}, "shares nothing"),
        (
            {
                "train": {"class_weights": "balanced"},
                "data": {"task": "glue", "name": "sst2"},
            },
            "train.class_weights=balanced",
        ),
        ({"lora": {"start_from": "runs/other"}}, "lora.start_from=runs/other"),
        ({"output": {"resume": "runs/other/checkpoints/round-000001"}}, "output.resume="),
    ],
)
def test_what_no_clip_bounds_is_refused(sections: dict, named: str) -> None:
    [mistake] = refused(**sections)
    assert named in mistake and mistake.startswith("privacy.clip=1: ")


def test_a_server_step_is_refused() -> None:
    stepped = replace(METHODS["fedsa"], server_step=lambda sent: CommonLayer(sent.before))
    [mistake] = refusals.mistakes(validate({"privacy": ON}), stepped)
    assert "the server step of federated.method=sfed" in mistake


def test_a_missing_library_is_a_mistake_where_there_is_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accounting, "problem", lambda: "is not installed")
    assert refused() == ["privacy.clip=1: is not installed"]
    assert not refused(privacy={"clip": 1.0, "noise_multiplier": 0.0})
    assert refused(privacy={"clip": 1.0, "target_epsilon": 3.0})


def test_poisson_cohorts_are_for_privacy() -> None:
    [mistake] = refused(privacy={}, federated={"sampling": "poisson"})
    assert "federated.sampling=poisson" in mistake
    assert not refused(federated={"sampling": "poisson"})
    assert not refused(privacy={})


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"noise_multiplier": 1.0}, "needs privacy.clip"),
        ({"target_epsilon": 1.0}, "needs privacy.clip"),
        ({"clip": 1.0}, "are both null"),
        ({"clip": 1.0, "noise_multiplier": 1.0, "target_epsilon": 1.0}, "exclude each other"),
        ({"clip": 0.0, "noise_multiplier": 1.0}, "privacy.clip = 0"),
        ({"clip": 1.0, "noise_multiplier": -1.0}, "privacy.noise_multiplier = -1"),
        ({"clip": 1.0, "noise_multiplier": 1.0, "delta": 0.0}, "privacy.delta = 0"),
        ({"clip": 1.0, "noise_multiplier": 1.0, "delta": 1.0}, "privacy.delta = 1"),
        ({"clip": 1.0, "target_epsilon": 0.0}, "privacy.target_epsilon = 0"),
    ],
)
def test_a_section_that_says_too_little_or_too_much_is_refused(privacy: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate({"privacy": privacy})


def test_a_poisson_cohort_may_hold_everybody() -> None:
    """Memory is planned for the largest cohort, not for the expected one."""
    drawn = {"num_clients": 8, "clients_per_round": 2}
    assert validate({"federated": drawn}).most_in_round == 2
    assert validate({"federated": drawn, "privacy": ON}).most_in_round is None
    fixed = {**drawn, "sampling": "fixed"}
    assert validate({"federated": fixed, "privacy": ON}).most_in_round == 2
