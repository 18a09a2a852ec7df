"""Runs on a backbone of nf4 or int8 codes: those on its dequantised weights, however stored."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sfed.config import load as config_load
from sfed.federated import preflight
from sfed.lora.frozen.quantized import Stored, loading_settings
from sfed.models.hf_config import MetaModel
from sfed.storage.run_record import open_run
from sfed.utils.errors import CheckpointError, ConfigError, UserError
from tests.support import glue, runs, tiny
from tests.support.processes import ends_of, on_processes
from tests.support.selection import full

pytestmark = pytest.mark.dist

SCHEMES = ["nf4", "int8"]
SGD = {"optimizer": "sgd", "lr": 0.1, "local_steps": 3, "batch_size": 4}
# The persistence threshold of 0 lets nothing stay gathered, however small.
SHARDED = {
    "sharding": "zero3",
    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}


def settings(folder: Path, out: Path, name: str, scheme: str, **sections: Any) -> dict[str, Any]:
    model = {"name": str(folder / "model"), "quantization": scheme, **sections.pop("model", {})}
    sections.setdefault("train", SGD)
    sections.setdefault("federated", {"num_clients": 2, "num_rounds": 2})
    sections.setdefault("evaluation", {"every_rounds": 0})
    output = {"dir": str(out), "name": name}
    return tiny.settings(folder, model=model, output=output, **sections)


def plain_run(folder: Path, out: Path, scheme: str) -> Path:
    return runs.run(1, settings(folder, out, "plain", scheme))


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def replica(scheme: str, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a replica on one process."""
    return plain_run(tiny_folder, tmp_path_factory.mktemp(scheme), scheme)


def dequantised(folder: Path, model: Path, scheme: Any) -> Path:
    """A folder with the same model and rows, and the dequantised weights in the model's files."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.float32,
        quantization_config=loading_settings(plain, scheme, torch.float32),
    )
    shutil.copytree(model, folder / "model")
    changed = 0
    for name, module in loaded.named_modules():
        if name in (rows := dict(plain.named_modules())) and hasattr(module, "source_cls"):
            rows[name].weight.data = of_bitsandbytes(module)
            changed += 1
    assert changed == 14
    plain.save_pretrained(folder / "model")
    return folder


def of_bitsandbytes(module: Any) -> torch.Tensor:
    if hasattr(module.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.data.float() * (module.weight.SCB.view(-1, 1) / 127)


def test_a_run_trains_the_adapters_of_its_dequantised_backbone(
    scheme: str, replica: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = dequantised(tmp_path, tiny_folder / "model", scheme)
    shutil.copy(tiny_folder / "rows.jsonl", folder)
    other = runs.run(1, settings(folder, tmp_path / "runs", "plain", "none"))
    assert runs.identical(runs.adapters(replica), runs.adapters(other))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_zero3_trains_the_adapters_of_a_replica(
    scheme: str, replica: Path, tiny_folder: Path, tmp_path: Path, num_processes: int
) -> None:
    own = settings(tiny_folder, tmp_path, "sharded", scheme, backbone=SHARDED)
    sharded = runs.run(num_processes, own)
    found = runs.relative_difference(runs.adapters(replica), runs.adapters(sharded))
    assert found <= 5e-6


@pytest.mark.parametrize(
    "sections",
    [
        {"backbone": {**SHARDED, "gradient_checkpointing": True}},
        full({"backbone": {**SHARDED, "offload": "cpu"}}),
    ],
    ids=["checkpointed", "offloaded"],
)
def test_so_it_does_under(tiny_folder: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    plain = plain_run(tiny_folder, tmp_path, "nf4")
    sharded = runs.run(2, settings(tiny_folder, tmp_path, "sharded", "nf4", **sections))
    assert runs.relative_difference(runs.adapters(plain), runs.adapters(sharded)) <= 5e-6


@pytest.mark.parametrize("family", ["roberta", full("bert"), full("llama")])
def test_so_it_does_for_classifiers(glue_folder: Path, tmp_path: Path, family: str) -> None:
    found = []
    for stored in ({"sharding": "none"}, SHARDED):
        own = glue.settings(
            glue_folder,
            family,
            "sst2",
            tmp_path / str(stored["sharding"]),
            model={"quantization": "nf4"},
            backbone=stored,
            evaluation={"every_rounds": 0},
        )
        found.append(runs.adapters(runs.run(2, own)))
    assert runs.identical(*found)


def test_bf16_trains_the_same_bits_on_shards(tiny_folder: Path, tmp_path: Path) -> None:
    model, found = {"dtype": "bf16"}, []
    for name, stored in (("plain", {"sharding": "none"}), ("sharded", SHARDED)):
        own = settings(tiny_folder, tmp_path, name, "int8", model=model, backbone=stored)
        own["train"] = {**own["train"], "local_steps": 1}
        found.append(runs.adapters(runs.run(2, own)))
    assert runs.identical(*found)


def test_a_resumed_run_is_the_uninterrupted_one_and_keeps_its_quantization(
    scheme: str, replica: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    one = {"federated": {"num_clients": 2, "num_rounds": 1}}
    runs.run(1, settings(tiny_folder, tmp_path, "plain", scheme, **one))
    assert runs.identical(
        runs.adapters(plain_run(tiny_folder, tmp_path, scheme)), runs.adapters(replica)
    )
    other = config_load.validate(settings(tiny_folder, tmp_path, "plain", "none"))
    with pytest.raises(CheckpointError, match=r"model.quantization: '\w+' there, 'none' now"):
        preflight.look_back(other)


def test_the_export_loads_on_the_plain_and_on_the_quantised_base(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """On the quantised one, by the settings in README.md, it computes what the run computed."""
    own = settings(tiny_folder, tmp_path, "run", "nf4", evaluation={"every_rounds": 2})
    (end,) = ends_of(1, runs.train_settings, own)
    assert end.code == 0, end.said
    assert "nf4 codes for the 19,968 weights of 14 linear layers, float32 for all" in end.said
    folder = tmp_path / "run"
    path = next(iter(open_run(folder).clients.values())).adapter
    assert path is not None
    card = (path / "README.md").read_text(encoding="utf-8")
    named = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'
    assert "nf4 codes" in card and named in card
    keys = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    assert not [key for key in keys if "quant" in key]
    base = tiny_folder / "model"
    eager: dict[str, Any] = {"dtype": torch.float32}
    quantised = eval(named, {"BitsAndBytesConfig": BitsAndBytesConfig})
    ids = torch.arange(2, 40)[None]
    on_plain, on_quantised = (
        # In evaluation mode bitsandbytes repacks nf4 codes on some CPUs and fails on small layers.
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **one), path)
        .train()(input_ids=ids)
        .logits
        for one in (eager, {**eager, "quantization_config": quantised})
    )
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(
            dequantised(tmp_path, base, "nf4") / "model", dtype=torch.float32
        ),
        path,
    ).eval()(input_ids=ids)
    assert torch.isfinite(on_plain).all()
    torch.testing.assert_close(on_quantised, expected.logits, rtol=1e-4, atol=1e-5)
    assert (on_plain - on_quantised).abs().max() > 1e-3


def test_the_plan_counts_what_is_stored(tiny_folder: Path, tmp_path: Path) -> None:
    found = {}
    for scheme in ("none", *SCHEMES):
        config = config_load.validate(settings(tiny_folder, tmp_path, "run", scheme))
        found[scheme] = MetaModel.read(config, config.model.name)
    weights = found["none"].num_weights
    assert {meta.num_weights for meta in found.values()} == {weights}
    linear = 2 * (32 * (32 + 32 + 2 * 16) + 3 * 32 * 72)
    rows = 2 * (32 + 32 + 2 * 16 + 2 * 72 + 32)
    others = weights - linear
    assert found["none"].stored == Stored(weights, 0, 0)
    assert found["nf4"].stored == Stored(others, linear // 2, 4 * linear // 64)
    assert found["int8"].stored == Stored(others, linear, 4 * rows)


def test_a_missing_package_is_named_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest),
    )
    config = config_load.validate(settings(tiny_folder, tmp_path, "run", "int8"))
    with pytest.raises(ConfigError, match=r"pip install 'sfed\[quantization\]'"):
        preflight.check(config)


def refused(own: dict[str, Any]) -> str:
    with pytest.raises(UserError) as mistake:
        runs.train_settings(own)
    return str(mistake.value)


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_files_that_are_quantised_already_are_refused(
    tiny_folder: Path, tmp_path: Path, scheme: str
) -> None:
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    shutil.copy(tiny_folder / "rows.jsonl", tmp_path)
    file = tmp_path / "model" / "config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(stored), encoding="utf-8")
    (message,) = on_processes(1, refused, settings(tmp_path, tmp_path, "run", scheme))
    assert "its files are quantised already" in message
    assert "set model.quantization=nf4" in message
