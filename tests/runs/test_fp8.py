"""Runs whose frozen layers compute in FP8: one process or two, resumed, against full precision."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sfed.config import load as config_load
from sfed.distributed.world import World
from sfed.federated import preflight
from sfed.kernels import choice
from sfed.kernels.choice import OPTIONS, PLAIN
from sfed.models import backbone
from sfed.models.hf_config import MetaModel
from sfed.plan.estimate import estimate
from sfed.utils.errors import CheckpointError, ConfigError, UserError
from tests.support import runs, tiny
from tests.support.processes import ends_of

pytestmark = pytest.mark.dist

# A pass holds one client: passes of other shapes round in other places.
FEDERATED = {"num_clients": 2, "num_rounds": 2, "clients_per_pass": 1}
LOSS_TOLERANCE = 0.015
"""Of the loss of full precision, for a tiny model with random weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sizes are multiples of 16, and rows."""
    folder = tmp_path_factory.mktemp("fp8")
    tiny.save_model(folder / "model", inner=80)
    tiny.save_rows(folder / "rows.jsonl", 80, kinds=4)
    return folder


def settings(
    folder: Path, out: Path, name: str = "run", compute: str = "fp8", **sections: Any
) -> dict[str, Any]:
    own = {
        "federated": FEDERATED,
        "train": {"local_steps": 5, "batch_size": 4, "lr": 1e-2},
        "evaluation": {"every_rounds": 2, "adapters": ["personal"]},
        "backbone": {"compute": compute},
        "output": {"dir": str(out), "name": name, "report": False},
    }
    return tiny.settings(folder, **(own | sections))


@pytest.fixture(scope="module")
def one_process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run on one process."""
    return runs.run(1, settings(folder, tmp_path_factory.mktemp("one")))


def test_two_processes_train_the_adapters_of_one(
    folder: Path, one_process: Path, tmp_path: Path
) -> None:
    two = runs.run(2, settings(folder, tmp_path))
    assert runs.identical(runs.adapters(one_process), runs.adapters(two))


def test_ten_steps_come_near_the_loss_of_full_precision(
    folder: Path, one_process: Path, tmp_path: Path
) -> None:
    """On random weights, whose losses follow every rounding more than those of a trained model."""
    full = runs.run(1, settings(folder, tmp_path, compute="full"))
    before, after = (
        [runs.rounds(one)[place]["eval/personal_loss"] for one in (full, one_process)]
        for place in (0, -1)
    )
    assert after[0] < 0.8 * before[0], "nothing was learned"
    for exact, found in (before, after):
        assert 0 < abs(found / exact - 1) < LOSS_TOLERANCE


def test_a_resumed_run_is_the_uninterrupted_one_and_keeps_its_arithmetic(
    folder: Path, one_process: Path, tmp_path: Path
) -> None:
    first = settings(folder, tmp_path, federated={**FEDERATED, "num_rounds": 1})
    (end,) = ends_of(1, runs.train_settings, first)
    assert end.code == 0, end.said
    assert "FP8 products (e4m3, a scale per row) for the 21,504 weights of 14 linear" in end.said
    full = config_load.validate(settings(folder, tmp_path, compute="full"))
    with pytest.raises(CheckpointError, match=r"backbone.compute: 'fp8' there, 'full' now"):
        preflight.look_back(full)
    resumed = runs.run(1, settings(folder, tmp_path))
    assert runs.identical(runs.adapters(one_process), runs.adapters(resumed))


def test_the_record_and_the_card_state_the_arithmetic(one_process: Path) -> None:
    kept = json.loads((one_process / "config.json").read_text(encoding="utf-8"))
    assert kept["backbone"]["compute"] == "fp8"
    path = next(iter(runs.adapter_paths(one_process).values()))
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "computed in FP8" in card and "`backbone.compute=fp8`" in card
    plain = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    assert not [key for key in plain if "fp8" in key or "quant" in key]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"quantization": "nf4"}}, "model.quantization=nf4 and backbone.compute=fp8"),
        ({"backbone": {"compute": "fp8", "sharding": "zero3"}}, "compute=fp8 and sharding=zero3"),
        ({"backbone": {"compute": "fp8", "offload": "cpu"}}, "compute=fp8 and offload=cpu"),
    ],
)
def test_what_excludes_fp8_is_refused_with_a_remedy(
    folder: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message} exclude each other.*set") as caught:
        config_load.validate(settings(folder, tmp_path, **sections))
    assert "backbone.compute=full" in str(caught.value)


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_methods_that_change_weights_are_refused(folder: Path, tmp_path: Path, method: str) -> None:
    own = settings(folder, tmp_path, federated={**FEDERATED, "method": method})
    with pytest.raises(ConfigError, match=rf"backbone.compute=fp8: {method} changes the frozen"):
        preflight.check(config_load.validate(own))


def test_files_that_are_quantised_already_are_refused(folder: Path, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", inner=80)
    file = model / "config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["quantization_config"] = {"quant_method": "fp8"}
    file.write_text(json.dumps(stored), encoding="utf-8")
    config = config_load.validate(settings(folder, tmp_path, model={"name": str(model)}))
    with pytest.raises(UserError, match=r"quantised already .*or set backbone.compute=full"):
        MetaModel.read(config, str(model))


def test_a_plan_counts_two_bytes_a_weight_and_offers_no_shards(
    folder: Path, tmp_path: Path
) -> None:
    found = {}
    for compute in ("full", "fp8"):
        stored = {"backbone": {"compute": compute, "sharding": "none"}}
        config = config_load.validate(settings(folder, tmp_path, **stored))
        found[compute] = estimate(config, gpus=2, gpu_memory="1GiB")
    fp8, full = found["fp8"], found["full"]
    assert fp8["weights"] == full["weights"] and fp8["sharding"]["kind"] == "none"
    # In bf16, beside codes of as many bytes: a scale for each row of W and of W^T.
    sides = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 80))
    assert fp8["backbone_bytes"] - full["backbone_bytes"] == 4 * sides
    # To look for remedies is to check each: zero3, which fp8 excludes, would raise an error.
    assert not fp8["fits"] and not full["fits"]


def train_with_counted_kernels(settings: dict[str, Any]) -> None:
    """Fails unless the run drops and quantises with the functions that were chosen for it."""
    called: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def work(*arguments: Any) -> Any:
            called[name] += 1
            return getattr(PLAIN, name)(*arguments)

        return work

    made = dataclasses.replace(PLAIN, **{name: counted(name) for name in OPTIONS})
    choice.choose = lambda *_arguments, **_options: made  # the process ends with the test
    runs.train_settings(settings)
    assert set(called) == set(OPTIONS), called


def test_layers_use_the_kernels_that_were_chosen(folder: Path, tmp_path: Path) -> None:
    own = settings(folder, tmp_path, lora={"rank": 4, "dropout": 0.1})
    (end,) = ends_of(1, train_with_counted_kernels, own)
    assert end.code == 0, end.said


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("compute", ["full", "fp8"])
def test_kernels_are_chosen_for_what_a_run_has(
    dropout: float, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(choice, "choose", lambda *arguments: asked.append(arguments[3]))
    config = config_load.validate(
        {
            "model": {"name": "demo"},
            "data": {"task": "demo"},
            "lora": {"dropout": dropout},
            "backbone": {"compute": compute},
        }
    )
    backbone.kernels_of(config, cast(World, SimpleNamespace(device=torch.device("cpu"))))
    expected = {"dropout": dropout > 0, "quantise": compute == "fp8"}
    assert asked == [tuple(name for name in OPTIONS if expected[name])]
