"""Whole runs as on GPUs (tests/support/pretended_gpu): nothing CUDA refuses, no race, few waits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support import glue, pretended_runs, runs, tiny
from tests.support.pretended_runs import Seen, Settings, StepCounts, watched
from tests.support.processes import ends_of
from tests.support.selection import full

# Upper bounds: they may only be lowered. A change that needs a higher one makes training slower.
MOST_WAITS_OF_A_STEP = {"padded": 9, "packed": 11}
"""Waits of the host for the device in one optimizer step of one pass."""
MOST_LAUNCHES_OF_A_LAYER = {"forward": 31, "backward": 50}
"""Kernel launches of one LLaMA layer with adapters on all its linear layers, bf16."""

NOTHING_STAYS_GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ZERO3 = {"sharding": "zero3", "deepspeed": NOTHING_STAYS_GATHERED}
QUICK: dict[str, dict[str, Any]] = {
    "federated": {"num_clients": 4, "num_rounds": 2},
    "train": {"local_steps": 2, "batch_size": 4, "lr": 1e-2},
    "evaluation": {"max_examples": 2},
}
IN_TURNS = {"clients_per_pass": 1, "clients_per_round": 3, "num_rounds": 3}
SCENARIOS: dict[str, dict[str, dict[str, Any]]] = {
    "in turns, partial cohorts": {"federated": IN_TURNS},
    "two of five": {"federated": {**IN_TURNS, "num_clients": 5, "clients_per_pass": 2}},
    "checkpointing, dropout, micro passes": {
        "backbone": {"gradient_checkpointing": True},
        "lora": {"dropout": 0.1},
        "train": {"micro_batch_size": 2},
    },
    "rolora": {"federated": {**IN_TURNS, "method": "rolora", "optimizer_state": "reset"}},
    "generation": {"evaluation": {"generate": True, "max_new_tokens": 3}},
    "fp32, padded, sgd": {
        "model": {"dtype": "fp32"},
        "data": {"packing": False},
        "train": {"optimizer": "sgd"},
    },
    "offload": {"backbone": {**ZERO3, "offload": "cpu"}},
}
IN_FULL = ("two of five", "fp32, padded, sgd", "llama")


def merged(*many: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = {key for one in many for key in one}
    return {key: {k: v for one in many for k, v in one.get(key, {}).items()} for key in keys}


def settings_of(tiny_folder: Path, out: Path, name: str, **sections: Any) -> Settings:
    output = {"output": {"dir": str(out), "name": name.replace(" ", "-").replace(",", "")}}
    return tiny.settings(tiny_folder, **merged(QUICK, sections, output))


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, glue_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The settings of every scenario, in the order in which one process can run them."""
    out = tmp_path_factory.mktemp("pretended")
    found: dict[str, Settings] = {}
    for family in ("roberta", "llama"):
        found[family] = glue.settings(glue_folder, family, "sst2", out / family)
    for name, sections in SCENARIOS.items():
        found[name] = settings_of(tiny_folder, out, name, **sections)
        if name == "in turns, partial cohorts":
            longer = {**found[name]["federated"], "num_rounds": 4}
            found["a resumed run"] = {**found[name], "federated": longer}
    return found


@pytest.fixture(scope="module")
def seen(settings: dict[str, Settings]) -> dict[str, Seen]:
    """What was noted of the scenarios of the test command; all in one process."""
    [found] = watched({name: one for name, one in settings.items() if name not in IN_FULL})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta", "a resumed run", *SCENARIOS.keys() - {*IN_FULL}])
def test_cuda_has_nothing_against_a_run(name: str, seen: dict[str, Seen]):
    seen[name].require_clean()


@pytest.mark.full
@pytest.mark.parametrize("name", IN_FULL)
def test_cuda_has_nothing_against_other_runs(name: str, settings: dict[str, Settings]):
    [found] = watched({name: settings[name]})
    found[name].require_clean()
