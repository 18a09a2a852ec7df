"""Runs that start from adapters on disk: the losses of stock PEFT, gamma of the file, no mean."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sfed.config.load import validate
from sfed.federated import preflight
from sfed.report import tables
from sfed.storage import origin
from sfed.storage.run_record import open_run
from sfed.utils.errors import CheckpointError, ConfigError
from tests.support import glue, runs, tiny
from tests.support.disturbed import Moment, train_with_signal
from tests.support.processes import ends_of
from tests.support.reference import parts_of, tokenised
from tests.support.selection import full

N = 4
KINDS = [f"kind-{kind}" for kind in range(N)]
BY_KIND = {"kind": "by_key", "key": "kind"}
TRAIN = {"local_steps": 2, "batch_size": 3, "optimizer": "sgd", "lr": 0.05}


def settings(folder: Path, out: Path, name: str = "run", **sections: dict) -> dict:
    base: dict[str, dict] = {
        "lora": {},
        "federated": {"num_clients": N, "num_rounds": 1},
        "partition": BY_KIND,
        "train": TRAIN,
        "output": {"dir": str(out), "name": name},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}
    made = tiny.settings(folder, **merged)
    if "rank" not in merged["lora"]:  # that of the adapters
        del made["lora"]["rank"]
    return made


def train(*arguments, **sections) -> Path:
    own = settings(*arguments, **sections)
    runs.train_settings(own)
    return Path(own["output"]["dir"]) / own["output"]["name"]


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of clients with names: only read it."""
    out = tmp_path_factory.mktemp("base")
    return train(tiny_folder, out, "base", lora={"rank": 3})


def losses(event: dict) -> list[float]:
    return [client["eval_loss"] for client in event["clients"]]


def stock_loss(folder: Path, adapter: Path, rows: list[int]) -> float:
    """The loss per supervised token of an adapter in stock PEFT, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(model, adapter).eval()
    total, count, tokens = 0.0, 0, tokenised(folder)
    for row in rows:
        ids, prompt = tokens[row]
        labels = torch.tensor([[-100] * prompt + ids[prompt:]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        total, count = total + float(loss) * (len(ids) - prompt), count + len(ids) - prompt
    return total / count


def save_stock(folder: Path, path: Path, seed: int = 0, **over) -> Path:
    """A LoRA adapter that stock PEFT has made and saved, with B that is not 0."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    shape = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **over}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(path)
    return path


# --- what a run starts with -----------------------------------------------------------------------


def test_each_client_starts_from_the_adapter_of_its_name(
    tiny_folder: Path, tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
):
    there = base / "adapters"
    again = train(tiny_folder, tmp_path, lora={"start_from": str(there)})
    before, after = runs.rounds(again)[0], runs.rounds(base)[-1]
    assert losses(before) == pytest.approx(losses(after), rel=1e-6)
    assert before["eval/global_loss"] == pytest.approx(after["eval/global_loss"], rel=1e-6)
    assert before["comm/uploaded_bytes"] == 0
    saved = json.loads((again / "config.json").read_text())
    known = json.loads((base / "config.json").read_text())["resolved"]
    assert saved["lora"]["rank"] == 3
    assert saved["resolved"]["gamma"] == pytest.approx(known["gamma"], rel=1e-15)
    record = saved["resolved"]["origin"]
    assert (record["named_by"], record["path"]) == ("lora.start_from", str(there))
    assert not record["is_for_all"] and record["has_common_a"]
    assert f"started from {there}: an adapter for each client (digest {record['digest']}" in (
        caplog.text
    )
    shown = dict(tables.facts_table(open_run(again)).rows)
    assert shown["started from"] == f"lora.start_from = {there} (digest {record['digest']})"


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_stock_peft_has_there_the_loss_that_it_has_here(
    tiny_folder: Path, tmp_path: Path, rslora: bool
):
    adapter = save_stock(tiny_folder, tmp_path / "stock", use_rslora=rslora)
    folder = train(tiny_folder, tmp_path, lora={"start_from": str(adapter)})
    expected = [stock_loss(tiny_folder, adapter, part["eval"]) for part in parts_of(folder)]
    event = runs.rounds(folder)[0]
    assert losses(event) == pytest.approx(expected, rel=2e-6)
    assert event["eval/global_loss"] == event["eval/personal_loss"]
    saved = json.loads((folder / "config.json").read_text())
    assert saved["resolved"]["gamma"] == (5 / 2**0.5 if rslora else 2.5)
    assert saved["lora"]["target_modules"] == ["down_proj", "q_proj"]
    written = json.loads((folder / "adapters" / KINDS[0] / "adapter_config.json").read_text())
    assert written["lora_alpha"] / written["r"] == pytest.approx(saved["resolved"]["gamma"])


def test_a_of_each_client_stays_as_loaded_until_the_first_mean(tiny_folder: Path, tmp_path: Path):
    for number, kind in enumerate(KINDS):
        save_stock(tiny_folder, tmp_path / "some" / kind, seed=number)
    own = {"start_from": str(tmp_path / "some")}
    folder = train(tiny_folder, tmp_path, lora=own, train={**TRAIN, "lr": 1e-30})
    before, after = runs.rounds(folder)
    expected = [
        stock_loss(tiny_folder, tmp_path / "some" / kind, part["eval"])
        for kind, part in zip(KINDS, parts_of(folder), strict=True)
    ]
    assert losses(before) == pytest.approx(expected, rel=2e-6)
    assert "eval/global_loss" not in before, "their A have no mean yet"
    assert after["eval/global_loss"] > 0
    loaded = [
        runs.load_file(tmp_path / "some" / kind / "adapter_model.safetensors") for kind in KINDS
    ]
    for name, exported in runs.adapters(folder).items():
        for key, tensor in exported.items():
            mean = torch.stack([one[key] for one in loaded]).double().mean(dim=0).float()
            is_own = ".lora_B." in key and name != "global"
            wanted = loaded[int(name[-1])][key] if is_own else mean
            torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("federated", "sharding", "processes"),
    [
        full({}, "none", 2),
        ({"clients_per_pass": 1}, "zero3", 2),
        full({"clients_per_pass": 2, "clients_per_round": 2}, "none", 1),
        full({}, "zero3", 1),
    ],
)
@pytest.mark.dist
def test_wherever_the_clients_are_the_adapters_are_the_same(
    tiny_folder: Path,
    tmp_path: Path,
    base: Path,
    federated: dict,
    sharding: str,
    processes: int,
):
    shape = {"lora": {"start_from": str(base / "adapters")}}
    few = {key: federated[key] for key in federated if key == "clients_per_round"}
    plain = train(tiny_folder, tmp_path, "plain", **shape, federated=few)
    own = settings(
        tiny_folder,
        tmp_path,
        "moved",
        **shape,
        federated=federated,
        backbone={"sharding": sharding},
    )
    moved = runs.run(processes, own)
    assert runs.relative_difference(runs.adapters(plain), runs.adapters(moved)) <= 2e-5
    assert losses(runs.rounds(plain)[0]) == pytest.approx(losses(runs.rounds(moved)[0]), rel=1e-5)


def test_who_has_not_taken_part_keeps_the_b_that_was_loaded(
    tiny_folder: Path, tmp_path: Path, base: Path
):
    own = {"start_from": str(base / "adapters")}
    folder = train(tiny_folder, tmp_path, lora=own, federated={"clients_per_round": 2})
    trained = {c["client"] for c in runs.rounds(folder)[-1]["clients"] if c.get("steps")}
    assert len(trained) == 2
    before, after = runs.adapters(base), runs.adapters(folder)
    for client in range(N):
        name = f"client-{client:04d}"
        same = runs.identical(
            {name: runs.factors(before[name], "B")}, {name: runs.factors(after[name], "B")}
        )
        assert same == (client not in trained)


# --- going on -------------------------------------------------------------------------------------


def test_a_resumed_run_does_not_read_the_folder_again(
    tiny_folder: Path, tmp_path: Path, base: Path
):
    copied = tmp_path / "copied"
    shutil.copytree(base / "adapters", copied)
    shape = {"lora": {"start_from": str(copied)}}
    whole = train(tiny_folder, tmp_path, "whole", **shape, federated={"num_rounds": 2})
    train(tiny_folder, tmp_path, **shape)
    shutil.rmtree(copied)
    folder = train(tiny_folder, tmp_path, **shape, federated={"num_rounds": 2})
    assert runs.identical(runs.adapters(whole), runs.adapters(folder))
    first, second = (json.loads((f / "config.json").read_text()) for f in (whole, folder))
    assert first["resolved"]["origin"] == second["resolved"]["origin"]
    assert first["lora"] == second["lora"]
    lines = preflight.look_back(validated(tiny_folder, tmp_path, **shape, rounds=2))
    assert lines is not None and "nothing to do" in lines[0]


@pytest.mark.dist
def test_a_run_that_is_stopped_before_the_first_mean_keeps_the_a_of_each_client(
    tiny_folder: Path, tmp_path: Path
):
    for number, kind in enumerate(KINDS):
        save_stock(tiny_folder, tmp_path / "some" / kind, seed=number)
    shape = {"lora": {"start_from": str(tmp_path / "some")}, "federated": {"clients_per_round": 2}}
    whole = train(tiny_folder, tmp_path, "whole", **shape)
    own = settings(tiny_folder, tmp_path, **shape)
    (end,) = ends_of(1, train_with_signal, own, Moment(0, 1, 1), signal.SIGTERM)
    assert "stopped as asked" in end.said, end
    shutil.rmtree(tmp_path / "some")
    assert runs.identical(
        runs.adapters(whole), runs.adapters(train(tiny_folder, tmp_path, **shape))
    )


def validated(folder: Path, out: Path, *, rounds: int = 1, **sections: dict):
    sections["federated"] = {"num_rounds": rounds}
    config = validate(settings(folder, out, **sections))
    preflight.check(config)
    return origin.adopted(config)


def test_another_folder_is_refused_when_a_run_resumes(
    tiny_folder: Path, tmp_path: Path, base: Path
):
    train(tiny_folder, tmp_path, lora={"start_from": str(base / "adapters")})
    for other in (None, str(base / "adapters" / "global")):
        config = validated(tiny_folder, tmp_path, lora={"start_from": other, "rank": 3}, rounds=2)
        with pytest.raises(CheckpointError, match=r"lora\.start_from: .* there, .* now"):
            preflight.look_back(config)


# --- a classifier ---------------------------------------------------------------------------------


def test_the_head_of_a_classifier_is_loaded_too(glue_folder: Path, tmp_path: Path):
    def classify(name: str, **sections: dict) -> Path:
        output = {"output": {"dir": str(tmp_path), "name": name}}
        own = glue.settings(glue_folder, "roberta", "sst2", tmp_path, **output, **sections)
        if "lora" in sections:
            own["lora"] = sections["lora"]
        runs.train_settings(own)
        return tmp_path / name

    first = classify("first", federated={"num_rounds": 1})
    own = {"start_from": str(first / "adapters")}
    second = classify("second", federated={"num_rounds": 1}, lora=own)
    assert losses(runs.rounds(second)[0]) == pytest.approx(losses(runs.rounds(first)[-1]), rel=1e-6)
    record = open_run(second).config["resolved"]["origin"]
    assert record["factors"] == ["A", "B", "head"]
    card = next((second / "adapters").glob("*/README.md")).read_text()
    assert f"| started from | lora.start_from = {first / 'adapters'} (digest " in card


# --- what is refused ------------------------------------------------------------------------------


def refusal(folder: Path, out: Path, **sections: dict) -> str:
    with pytest.raises(ConfigError) as mistake:
        preflight.check(validate(settings(folder, out, **sections)))
    return str(mistake.value)


def test_clients_without_an_adapter_are_all_named_with_what_is_there(
    tiny_folder: Path, tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
):
    few = tmp_path / "few"
    shutil.copytree(base / "adapters", few)
    for kind in KINDS[1:3]:
        shutil.rmtree(few / kind)
    with pytest.raises(ConfigError) as mistake:  # the names are values of a column
        train(tiny_folder, tmp_path, lora={"start_from": str(few)})
    said = str(mistake.value)
    assert "2 clients have no adapter there: 'kind-1', 'kind-2'" in said
    assert "the adapters are of 'global', 'kind-0', 'kind-3'" in said
    assert not (tmp_path / "run").exists()
    loading = f"loading {tiny_folder / 'model'}"
    assert loading not in caplog.text, "before the model is loaded"
    sections = {"partition": {"kind": "iid", "key": None}, "lora": {"start_from": str(few)}}
    assert "4 clients have no adapter there: 'client-0000'" in refusal(
        tiny_folder, tmp_path, **sections
    ), "their number is known before anything is loaded"


def test_a_key_that_is_set_to_something_else_is_refused_with_both_values(
    tiny_folder: Path, tmp_path: Path, base: Path
):
    there = str(base / "adapters")
    said = refusal(tiny_folder, tmp_path, lora={"start_from": there, "rank": 4})
    assert f"lora.rank = 4: it is 3 in {there} (lora.start_from)" in said
    own = {"start_from": there, "target_modules": ["q_proj"]}
    assert "lora.target_modules = ['q_proj']: the adapters of" in refusal(
        tiny_folder, tmp_path, lora=own
    )
    stock = save_stock(tiny_folder, tmp_path / "stock")
    own = {"start_from": str(stock), "target_modules": "all-linear"}
    with pytest.raises(ConfigError, match=r"not for the layers that lora\.target_modules names"):
        train(tiny_folder, tmp_path, lora=own)
    own = {"start_from": str(stock), "target_modules": ["down_proj", "q_proj"], "init": "shared"}
    assert train(tiny_folder, tmp_path, lora=own).is_dir()


@pytest.mark.parametrize("key", ["alpha", "scaling"])
def test_what_gamma_would_follow_from_is_refused(
    tiny_folder: Path, tmp_path: Path, base: Path, key: str
):
    value = {"alpha": 4.0, "scaling": "rslora"}[key]
    own = {"start_from": str(base / "adapters"), key: value}
    with pytest.raises(ConfigError, match=f"lora.{key}=.* gamma is that of the adapters"):
        validate(settings(tiny_folder, tmp_path, lora=own))


@pytest.mark.parametrize("method", ["ffa", "rolora"])
def test_a_method_that_never_averages_a_needs_the_same_a(
    tiny_folder: Path, tmp_path: Path, base: Path, method: str
):
    for number, kind in enumerate(KINDS):
        save_stock(tiny_folder, tmp_path / "some" / kind, seed=number)
    federated = {"method": method}
    own = {"start_from": str(tmp_path / "some")}
    with pytest.raises(ConfigError, match=f"the clients' A differ, and federated.method={method}"):
        train(tiny_folder, tmp_path, lora=own, federated=federated)
    own = {"start_from": str(base / "adapters")}  # each of its clients has the same A
    assert train(tiny_folder, tmp_path, lora=own, federated=federated).is_dir()


def test_what_needs_a_common_value_needs_one_at_the_start(
    tiny_folder: Path, tmp_path: Path, base: Path
):
    """The clients of ``base`` hold a B of their own, which fedit averages."""
    own = {"method": "fedit", "server_optimizer": "fedavgm"}
    start = {"start_from": str(base / "adapters")}
    with pytest.raises(ConfigError, match=r"federated\.server_optimizer=fedavgm is about one"):
        train(tiny_folder, tmp_path, lora=start, federated=own)


def test_an_adapter_of_another_model_is_refused(tiny_folder: Path, tmp_path: Path):
    tiny.save_model(tmp_path / "model", hidden=48)
    adapter = save_stock(tmp_path, tmp_path / "stock")
    with pytest.raises(ConfigError, match=r"is of shape \[.*\] in .* and of shape \[.*\] in the"):
        train(tiny_folder, tmp_path, lora={"start_from": str(adapter)})


def test_numbers_that_are_not_finite_are_refused(tiny_folder: Path, tmp_path: Path):
    adapter = save_stock(tiny_folder, tmp_path / "stock")
    path = adapter / "adapter_model.safetensors"
    tensors = copy.copy(runs.load_file(path))
    next(iter(tensors.values())).flatten()[0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="A holds numbers that are not finite"):
        train(tiny_folder, tmp_path, lora={"start_from": str(adapter)})
