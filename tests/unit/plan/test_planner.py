"""The plan: what it predicts is what a run does; mistakes are answered as in the trainer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sfed.config import load as config_load
from sfed.memory import profile
from sfed.plan import __main__ as plan
from sfed.plan import estimate, tables
from sfed.plan.request import Machine, Pace
from sfed.utils.errors import UserError
from tests.support import runs, tiny

LLAMA = ["model.name=llama2-7b", "data.task=gsm8k", "train.micro_batch_size=1"]


@pytest.fixture(autouse=True)
def _passes_are_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To follow one takes seconds of CPU, and it costs what it costs in every test."""
    follow = profile.measure

    def measure(config: Any, frozen: Any, say: Any) -> Any:
        of_pass = ("model", "data", "lora", "clients", "train", "backbone")
        key = (config.model_dump_json(include=dict.fromkeys(of_pass, True)), repr(frozen))
        if key not in _FOLLOWED:
            _FOLLOWED[key] = follow(config, frozen, say)
        return _FOLLOWED[key]

    monkeypatch.setattr(profile, "measure", measure)


_FOLLOWED: dict[Any, Any] = {}


def predicted(config, gpus=1, link="nvlink", pace=Pace()):  # noqa: B008  (frozen)
    machine = Machine(gpus, 80 * 2**30, link, datasheet_flops=1e15)
    return estimate.predict(config, machine, pace, lambda _: None)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("method", "scaffold"),
    [
        *((name, False) for name in ("sfed", "fedit", "local", "flexlora", "fedex", "hetlora")),
        ("sfed", True),
    ],
)
def test_bytes_per_round_are_those_that_a_run_sends(
    tiny_folder: Path, tmp_path: Path, method: str, scaffold: bool
) -> None:
    federated = {"method": method, "num_rounds": 1, "scaffold": scaffold}
    own = tiny.settings(tiny_folder, federated=federated)
    own["output"] = {"dir": str(tmp_path), "name": method}
    uploaded = runs.rounds(runs.run(1, own))[-1]["comm/uploaded_bytes"]
    assert predicted(config_load.validate(own))["upload"]["bytes"] == uploaded


def test_a_private_mean_sends_the_sum_and_the_result(tiny_folder: Path) -> None:
    plain = predicted(tiny.config(tiny_folder))["upload"]
    private = predicted(tiny.config(tiny_folder, privacy={"clip": 1.0, "noise_multiplier": 0.0}))
    assert private["upload"]["factors"] == plain["factors"] == ["A"]
    assert private["upload"]["bytes"] == 3 * plain["bytes"]


def test_clients_of_mixed_ranks_are_planned_at_the_largest_with_the_largest_batch(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clients = {"0": {"rank": 2, "local_steps": 7}, "1": {"batch_size": 6}}
    mixed = predicted(tiny.config(tiny_folder, clients=clients))
    whole = predicted(tiny.config(tiny_folder, train={"batch_size": 6, "local_steps": 7}))
    tables.show(mixed)
    assert "r = 4 (the largest), " in capsys.readouterr().out
    tables.show(whole)
    assert "r = 4, " in capsys.readouterr().out
    assert mixed.pop("mixed_ranks") and not whole.pop("mixed_ranks")
    assert mixed == whole


def test_more_tokens_per_second_and_faster_links_take_less_time(tiny_folder: Path) -> None:
    config = tiny.config(tiny_folder, backbone={"sharding": "zero3"})
    slow = predicted(config, gpus=2, link="100gbe", pace=Pace(None, 10.0))["round"]
    fast = predicted(config, gpus=2, link="nvlink", pace=Pace(None, 100.0))["round"]
    assert slow["compute_seconds_per_pass"] == pytest.approx(10 * fast["compute_seconds_per_pass"])
    assert slow["gather_seconds_per_pass"] > fast["gather_seconds_per_pass"] > 0
    assert slow["mean_seconds"] > fast["mean_seconds"] > 0


def test_host_memory_holds_what_rests_and_what_a_checkpoint_still_reads(tiny_folder: Path) -> None:
    def host_bytes(**federated: object) -> int:
        own = {"num_clients": 6, "clients_per_pass": 2, **federated}
        return int(predicted(tiny.config(tiny_folder, federated=own))["host_bytes"])

    one = tiny.config(tiny_folder, federated={"num_clients": 1})
    state = predicted(one)["checkpoint_bytes"]
    assert host_bytes() == (6 + 6) * state
    assert host_bytes(clients_per_round=2) == (6 + 2) * state
    assert host_bytes(clients_per_pass=6) == 0
    assert host_bytes(clients_per_pass="auto") == (6 + 6) * state, "a run may take fewer"


def test_a_plan_says_where_a_run_may_take_fewer_clients_than_fit(tiny_folder: Path) -> None:
    def may(sharding: str = "none", **federated: object) -> bool:
        own = {"num_clients": 6, **federated}
        config = tiny.config(tiny_folder, federated=own, backbone={"sharding": sharding})
        found = predicted(config, gpus=2)
        said = "would share a pass" in " ".join(tables._verdict(found))
        assert said == (found["auto_clients_per_pass"] is not None)
        return said

    assert may()
    auto = predicted(tiny.config(tiny_folder, federated={"num_clients": 6}))[
        "auto_clients_per_pass"
    ]
    assert auto["clients_per_pass"] == 6, "launches are all that a GPU does for a tiny model"
    assert (
        "tokens/s are expected with 6" in auto["reason"] and "100 % of the best" in auto["reason"]
    )
    assert not may("zero3")
    assert not may(num_clients=2)
    assert not may(clients_per_pass=3)


def test_host_memory_holds_original_weights_and_what_is_added_to_them(tiny_folder: Path) -> None:
    """q, k, v, o, gate, up, down of two layers; 4 clients of rank 2 in each round."""

    def plan_of(method: str, num_rounds: int) -> dict:
        federated = {"method": method, "num_clients": 4, "num_rounds": num_rounds}
        own = {"federated": federated, "lora": {"rank": 2}}
        return predicted(
            tiny.config(tiny_folder, **own, model={"name": str(tiny_folder / "model")})
        )

    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 72)
    numbers = 2 * 2 * (2 * 64 + 2 * 48 + 3 * 104)  # of A and B
    few, many, plain = plan_of("flora", 1), plan_of("flora", 100), plan_of("flexlora", 1)
    size = plain["backbone_bytes"] // plain["weights"]
    assert size in (2, 4)
    for found, change in ((few, 4 * 4 * numbers), (many, 4 * weights)):
        assert found["host_bytes"] - plain["host_bytes"] == size * weights + change
        assert found["checkpoint_bytes"] - plain["checkpoint_bytes"] == change


@pytest.mark.slow
def test_a_classifier_has_a_plan_too() -> None:
    found = predicted(config_load.load("configs/paper/roberta-large-mnli.yaml"), gpus=5)
    assert found["fits"]
    # 24 layers, query and value, r = 8, 1,024 wide, fp32.
    assert found["upload"]["bytes"] == 24 * 2 * 8 * 1024 * 4


def test_a_model_with_code_of_its_own_has_a_plan_where_it_is_trusted(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    tiny.plant_code(tmp_path / "model", tmp_path / "proof")
    trusting, wary = (
        tiny.config(tmp_path, backbone={"trust_remote_code": trusted}) for trusted in (True, False)
    )
    with pytest.raises(UserError, match="trust_remote_code"):
        predicted(wary)
    assert not (tmp_path / "proof").exists()
    # Code of its own keeps its masks, since nobody knows what it makes of packed rows.
    plain = predicted(tiny.config(tiny_folder, model={"attention": "sdpa"}))
    assert predicted(trusting)["needs"] == plain["needs"]


def test_what_does_not_fit_is_told_with_what_would(tiny_folder: Path, capsys) -> None:
    """2 GiB, of which the driver has one, are too little for rows as long as these."""
    words = [
        f"model.name={tiny_folder / 'model'}",
        "data.task=gsm8k",
        "data.max_tokens=128",
        "train.batch_size=4096",
        "evaluation.batch_size=1",
        "federated.num_clients=1",
    ]
    with pytest.raises(SystemExit) as ended:
        plan.main([*words, "--gpus", "1", "--gpu-memory", "2GiB"])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "It does not fit" in said
    assert "train.micro_batch_size=" in said


def test_a_plan_is_shown_and_written(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "plan.json"
    words = [f"model.name={tiny_folder / 'model'}", "data.task=gsm8k", "--json", str(file)]
    plan.main([*words, "--gpus", "2", "--link", "pcie"])
    shown = capsys.readouterr()
    assert "It fits" in shown.out
    assert "following a pass through two layers of" in shown.err, "silence while a person waits"
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["fits"]
    assert results["needed_bytes"] <= results["gpu_memory_bytes"]
    config = config_load.load(None, words[:2])
    same = estimate.estimate(config, gpus=2, gpu_memory="80GiB", link="pcie")
    assert json.loads(json.dumps(same)) == results
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"gpu_memory": "80"}, "no size such as 80GiB"),
        ({"gpus": 0}, "gpus = 0 is less than 1"),
        ({"link": "rope"}, "link = 'rope': it is one of nvlink, pcie, 100gbe"),
        ({"gpus": 4}, "give --gpus 3"),
    ],
)
def test_an_estimate_that_makes_no_sense_is_refused(asked: dict[str, Any], told: str) -> None:
    federated = {"num_clients": 3}
    config = config_load.validate(
        {"model": {"name": "tiny"}, "data": {"task": "gsm8k"}, "federated": federated}
    )
    with pytest.raises(UserError, match=re.escape(told)):
        estimate.estimate(config, **asked)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lora.rnk=4"], "did you mean lora.rank?"),
        (["lora.rank=4"], "set model.name, or data.task=demo"),
        (["data.task=gsm8k"], "set model.name, or data.task=demo"),
        (["model.name=llama2-7b"], "data.task: no default"),
        (["lora.rank=4", "--gpu-memory", "80"], "no size such as 80GiB"),
        (["lora.rank=4", "--gpus", "0"], "whole number"),
        (["lora.rank=4", "--gpu", "8"], "--gpu"),
        ([*LLAMA, "federated.num_clients=3"], "give --gpus 3"),
        (["data.task=demo"], "give a CONFIG"),
        (["model.name=demo", "data.task=gsm8k"], "give a CONFIG"),
        ([*LLAMA, "--json", "nowhere/at/all.json"], "does not exist"),
    ],
)
def test_mistakes_are_answered_before_anything_heavy_is_imported(
    words: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        plan.main(words)
