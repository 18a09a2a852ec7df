"""Clients that join a finished federation: its A and gamma, B alone is trained, nothing is sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from sfed.config.load import validate
from sfed.data.batches import Order
from sfed.federated import preflight
from sfed.methods.method import METHODS
from sfed.storage.run_record import open_run
from sfed.utils.errors import ConfigError
from tests.support import glue, runs, tiny
from tests.support.counting import counted_run
from tests.support.processes import on_processes
from tests.support.reference import parts_of, tokenised
from tests.support.selection import full

STEPS, BATCH, CLIP = 3, 4, 0.5
FEDERATION = {"local_steps": 2, "batch_size": 3, "optimizer": "sgd", "lr": 0.05}
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
}


def settings(folder: Path, out: Path, name: str, **sections: dict) -> dict:
    """Of a federation, or of clients that join one."""
    made = tiny.settings(folder, output={"dir": str(out), "name": name}, **sections)
    if "rank" not in sections.get("lora", {}):
        del made["lora"]["rank"]
    return made


def train(*arguments, **sections) -> Path:
    own = settings(*arguments, **sections)
    runs.train_settings(own)
    return Path(own["output"]["dir"]) / own["output"]["name"]


def federate(folder: Path, out: Path, name: str = "federation", **federated) -> Path:
    shape = {"num_clients": 3, "num_rounds": 2, **federated}
    return train(folder, out, name, lora={"rank": 3}, federated=shape, train=FEDERATION)


@pytest.fixture(scope="module")
def federation(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: only read it."""
    return federate(tiny_folder, tmp_path_factory.mktemp("federation"))


def mean_loss(model: nn.Module, batch: list[tuple[list[int], int]]) -> torch.Tensor:
    width = max(len(ids) for ids, _ in batch)
    input_ids = torch.tensor([ids + [1] * (width - len(ids)) for ids, _ in batch])
    labels = torch.full_like(input_ids, -100)
    for i, (ids, prompt) in enumerate(batch):
        labels[i, prompt : len(ids)] = input_ids[i, prompt : len(ids)]
    return model(input_ids=input_ids, labels=labels).loss


def by_hand(
    folder: Path, adapter: Path, rows: list[int], train: dict, *, from_b: bool
) -> dict[str, torch.Tensor]:
    """B after a few steps of stock PEFT and torch.optim, with A frozen."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    b = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in b)
    if not from_b:
        for parameter in b.values():
            parameter.data.zero_()
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[train["optimizer"]]
    optimizer = kind(b.values(), lr=train["lr"], weight_decay=train["weight_decay"])
    order, tokens = Order(0, 0, len(rows)), tokenised(folder)
    for step in range(STEPS):
        optimizer.zero_grad()
        mean_loss(
            model, [tokens[rows[order.at(step * BATCH + i)]] for i in range(BATCH)]
        ).backward()
        nn.utils.clip_grad_norm_(list(b.values()), CLIP)
        optimizer.step()
    return {name.replace(".default", ""): p.detach() for name, p in b.items()}


def join(folder: Path, out: Path, run: Path, name: str = "joined", **sections: dict) -> Path:
    shape = {"num_clients": 1, "num_rounds": 1, "join": str(run)}
    sections["federated"] = {**shape, **sections.get("federated", {})}
    sections.setdefault("train", OPTIMIZERS["sgd"])
    steps = {"local_steps": STEPS, "batch_size": BATCH, "max_grad_norm": CLIP}
    sections["train"] = {**steps, **sections["train"]}
    return train(folder, out, name, seed=0, **sections)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_client_that_joins_trains_b_as_stock_peft_does(
    tiny_folder: Path, tmp_path: Path, federation: Path, optimizer: str
):
    folder = join(tiny_folder, tmp_path, federation, train=OPTIMIZERS[optimizer])
    (part,) = parts_of(folder)
    there = federation / "adapters" / "global"
    expected = by_hand(tiny_folder, there, part["train"], OPTIMIZERS[optimizer], from_b=False)
    ours = runs.adapters(folder)
    assert ours.keys() == {"client-0000"}, "there is no global adapter"
    b = runs.factors(ours["client-0000"], "B")
    assert runs.relative_difference({"B": expected}, {"B": b}) <= 1e-5
    a = runs.factors(runs.load_file(there / "adapter_model.safetensors"), "A")
    assert runs.identical({"A": a}, {"A": runs.factors(ours["client-0000"], "A")})
    config, known = (open_run(one).config for one in (folder, federation))
    assert config["resolved"]["gamma"] == known["resolved"]["gamma"], "of N = 3, not of N = 1"
    assert config["resolved"]["origin"]["named_by"] == "federated.join"
    assert config["lora"]["rank"] == 3


@pytest.mark.parametrize("method", ["ffa", full("rolora"), full("fedit")])
def test_where_b_is_common_too_clients_start_from_it(
    tiny_folder: Path, tmp_path: Path, method: str
):
    run = federate(tiny_folder, tmp_path, method=method)
    folder = join(tiny_folder, tmp_path, run)
    (part,) = parts_of(folder)
    expected = by_hand(
        tiny_folder, run / "adapters" / "global", part["train"], OPTIMIZERS["sgd"], from_b=True
    )
    b = runs.factors(runs.adapters(folder)["client-0000"], "B")
    assert runs.relative_difference({"B": expected}, {"B": b}) <= 1e-5


def test_several_clients_join_each_by_itself_and_nothing_of_an_adapter_is_sent(
    tiny_folder: Path, tmp_path: Path, federation: Path
):
    by_kind = {"kind": "by_key", "key": "kind"}
    together = join(
        tiny_folder, tmp_path, federation, partition=by_kind, federated={"num_clients": 4}
    )
    apart = join(
        tiny_folder,
        tmp_path,
        federation,
        "apart",
        partition=by_kind,
        federated={"num_clients": 4, "clients_per_pass": 1, "num_rounds": 1},
    )
    assert runs.relative_difference(runs.adapters(together), runs.adapters(apart)) <= 2e-6
    for event in runs.rounds(together):
        assert (event["comm/uploaded_bytes"], event["comm/evaluation_bytes"]) == (0, 0)
        assert "eval/global_loss" not in event
    assert runs.adapters(together).keys() == {f"client-{c:04d}" for c in range(4)}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("there", "here"), [("none", "zero3"), full("zero3", "none"), full("zero3", "zero3")]
)
def test_clients_join_on_any_processes_however_the_backbone_is_stored(
    tiny_folder: Path, tmp_path: Path, federation: Path, there: str, here: str
):
    run = federation
    if there == "zero3":
        own = settings(
            tiny_folder,
            tmp_path,
            "run",
            lora={"rank": 3},
            federated={"num_clients": 3, "num_rounds": 2},
            train=FEDERATION,
            backbone={"sharding": there},
        )
        run = runs.run(3, own)
    shape = {"num_clients": 2, "num_rounds": 2, "join": str(run)}
    own = settings(tiny_folder, tmp_path, "joined", federated=shape, backbone={"sharding": here})
    for seen in on_processes(2, counted_run, own):
        assert not [kind for _, kind, _, _ in seen if "reduce" in kind]
    folder = tmp_path / "joined"
    a = [runs.factors(one, "A") for one in runs.adapters(folder).values()]
    first = runs.factors(runs.adapters(run)["client-0000"], "A")
    assert len(a) == 2 and all(runs.identical({"A": one}, {"A": first}) for one in a)


def test_a_client_that_has_joined_resumes_without_the_run(
    tiny_folder: Path, tmp_path: Path, federation: Path
):
    copied = tmp_path / "copied"
    shutil.copytree(federation, copied)
    whole = join(tiny_folder, tmp_path, copied, "whole", federated={"num_rounds": 2})
    join(tiny_folder, tmp_path, copied)
    shutil.rmtree(copied)
    folder = join(tiny_folder, tmp_path, copied, federated={"num_rounds": 2})
    assert runs.identical(runs.adapters(whole), runs.adapters(folder))


def test_a_client_can_join_those_who_have_joined(
    tiny_folder: Path, tmp_path: Path, federation: Path
):
    second = join(tiny_folder, tmp_path, join(tiny_folder, tmp_path, federation), "second")
    third = join(tiny_folder, tmp_path, federation, "third")
    assert runs.identical(runs.adapters(second), runs.adapters(third))


def test_a_classifier_that_joins_has_a_head_of_its_own_or_starts_from_the_shared_one(
    glue_folder: Path, tmp_path: Path
):
    for shares in (False, True):
        own = glue.settings(glue_folder, "roberta", "sst2", tmp_path)
        own["federated"] |= {"num_rounds": 1, "share_head": shares}
        own["output"]["name"] = f"shared-{shares}"
        runs.train_settings(own)
        new = glue.settings(glue_folder, "roberta", "sst2", tmp_path)
        new["federated"] |= {"num_rounds": 1, "join": str(tmp_path / f"shared-{shares}")}
        new["lora"] = {}
        new["output"]["name"] = f"joined-{shares}"
        runs.train_settings(new)
        record = open_run(tmp_path / f"joined-{shares}").config["resolved"]["origin"]
        assert record["factors"] == (["A", "head"] if shares else ["A"])
        losses = [
            [client["eval_loss"] for client in runs.rounds(tmp_path / name)[0]["clients"]]
            for name in (f"shared-{shares}", f"joined-{shares}")
        ]
        assert (losses[0] == pytest.approx(losses[1])) != shares


# --- what is refused ------------------------------------------------------------------------------


def refusal(folder: Path, out: Path, **sections: dict) -> str:
    with pytest.raises(ConfigError) as mistake:
        preflight.check(validate(settings(folder, out, "refused", **sections)))
    return str(mistake.value)


@pytest.mark.parametrize(
    ("shape", "rest"),
    [
        ({"method": "local"}, "federated.method=local with federated.averaged=auto"),
        full({"averaged": ["B"]}, "federated.method=sfed with federated.averaged=[B]"),
    ],
)
def test_a_run_without_a_common_a_is_refused_and_the_others_are_named(
    tiny_folder: Path, tmp_path: Path, shape: dict, rest: str
):
    lora = {"lora": {"rank": 3, **({"scaling": "rslora"} if "averaged" in shape else {})}}
    federated = {"num_clients": 2, "num_rounds": 1, **shape}
    run = train(tiny_folder, tmp_path, "run", federated=federated, **lora, train=FEDERATION)
    federated = {"join": str(run)}
    said = refusal(tiny_folder, tmp_path, federated=federated)
    names = [name for name in METHODS if name not in ("local", "fedex", "flora")]
    assert f"federated.join = {str(run)!r}: {rest} leaves each client an A of its own" in said
    assert f"such as one of {', '.join(names)}" in said


def test_a_run_that_cannot_be_joined_is_refused_before_its_settings_are_asked_for(
    tiny_folder: Path, tmp_path: Path, federation: Path
):
    copied = tmp_path / "copied"
    shutil.copytree(federation, copied)
    facts = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    facts["federated"]["method"] = "fedex"
    (copied / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    said = refusal(tiny_folder, tmp_path, federated={"join": str(copied)}, lora={"rank": 9})
    assert "fedex has changed the frozen weights" in said and "lora.rank" not in said


def test_a_run_that_is_not_finished_is_refused(tiny_folder: Path, tmp_path: Path, federation: Path):
    copied = tmp_path / "copied"
    shutil.copytree(federation, copied)
    (copied / "finished.json").unlink()
    said = refusal(tiny_folder, tmp_path, federated={"join": str(copied)})
    assert "the run is not finished" in said and "to the end of its 2 rounds" in said
    said = refusal(tiny_folder, tmp_path, federated={"join": str(tmp_path / "no-run")})
    assert "it holds no config.json, so it is no run folder" in said


@pytest.mark.parametrize(
    ("section", "values", "rest"),
    [
        ("federated", {"method": "fedsa"}, "federated.method = 'fedsa': it is 'sfed' in"),
        ("lora", {"rank": 4}, "lora.rank = 4: it is 3 in"),
        ("data", {"max_tokens": 32}, "data.max_tokens = 32: it is 64 in"),
        ("data", {"template": "Q: {prompt}"}, "data.template = 'Q: {prompt}': it is None in"),
    ],
)
def test_settings_that_do_not_match_are_refused_with_both_values(
    tiny_folder: Path, tmp_path: Path, federation: Path, section: str, values: dict, rest: str
):
    sections = {"federated": {"join": str(federation)}}
    sections[section] = {**sections.get(section, {}), **values}
    said = refusal(tiny_folder, tmp_path, **sections)
    assert rest in said and f"in {federation} (federated.join)" in said


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("federated", {"averaged": ["A"]}),
        ("lora", {"alpha": 2.0}),
        ("lora", {"start_from": "somewhere"}),
    ],
)
def test_keys_without_a_meaning_are_refused(
    tiny_folder: Path, tmp_path: Path, federation: Path, section: str, values: dict
):
    sections = {"federated": {"join": str(federation)}}
    sections[section] = {**sections.get(section, {}), **values}
    with pytest.raises(ConfigError, match=f"{section}.{next(iter(values))}="):
        validate(settings(tiny_folder, tmp_path, "refused", **sections))


def test_another_backbone_is_refused_with_both_digests(
    tiny_folder: Path, tmp_path: Path, federation: Path
):
    tiny.save_model(tmp_path / "model", seed=1)
    (tmp_path / "rows.jsonl").symlink_to(tiny_folder / "rows.jsonl")
    known = json.loads((federation / "config.json").read_text())["resolved"]["backbone_digest"]
    with pytest.raises(ConfigError, match=rf"the backbone is another one: .* digest {known}\)"):
        join(tmp_path, tmp_path, federation)
    assert not (tmp_path / "joined").exists()
