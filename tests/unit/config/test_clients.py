"""What single clients train with: by name, by number, by a list; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfed.config import load as config_load
from sfed.config.clients import (
    ClientSettings,
    largest_batch,
    largest_rank,
    may_have_mixed_ranks,
    most_steps,
    settings_of,
)
from sfed.config.diff import comparable, differences
from sfed.config.schema import Config
from sfed.federated import preflight
from sfed.sweep import grid
from sfed.utils.errors import ConfigError

NAMES = ["st-mary", "st.john", "7"]


def config(**sections: Any) -> Config:
    data = {"model": {"name": "x"}, "data": {"task": "gsm8k"}, **sections}
    return config_load.validate(data)


def test_names_numbers_and_defaults() -> None:
    clients = {"st-mary": {"rank": 16, "lr": 1e-4}, "1": {"local_steps": 20}, "7": {"rank": 2}}
    found = settings_of(config(clients=clients, train={"lr": 1e-3, "batch_size": 4}), NAMES)
    assert found == (
        ClientSettings(16, 1e-4, 4, 10, None),
        ClientSettings(8, 1e-3, 4, 20, None),
        ClientSettings(2, 1e-3, 4, 10, None),  # a name goes before a number
    )


def test_a_list_gives_ranks_in_the_order_of_the_clients() -> None:
    found = settings_of(config(lora={"rank": [4, 8, 64]}), NAMES)
    assert [one.lora_rank for one in found] == [4, 8, 64]


def test_local_steps_of_a_client_go_before_epochs() -> None:
    train = {"local_epochs": 2, "batch_size": 4}
    clients = {"0": {"local_steps": 3}, "1": {"batch_size": 2}}
    found = settings_of(config(train=train, clients=clients), ["", "", ""])
    assert [one.steps(9) for one in found] == [3, 9, 5]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "st-marie",
            "clients.st-marie: no client has this name; the clients are st-mary, st.john,",
        ),
        ("st-marie", "did you mean st-mary?"),
        ("3", "clients.3: no client has this name"),
    ],
)
def test_an_unknown_name_is_refused_with_those_there_are(key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(config(clients={key: {"rank": 4}}), NAMES)
    assert message in str(caught.value)


def test_clients_without_names_are_told_by_their_numbers() -> None:
    with pytest.raises(ConfigError, match="have no names: write their numbers, 0 to 1"):
        settings_of(config(clients={"a": {"rank": 4}}), ["", ""])


def test_a_client_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="client 0 is named twice"):
        settings_of(config(clients={"st-mary": {"rank": 4}, "0": {"lr": 1.0}}), NAMES)


def test_a_list_of_another_length_is_refused_early_or_late() -> None:
    with pytest.raises(ConfigError, match=r"2 ranks and federated\.num_clients=3; give one rank"):
        config(lora={"rank": [4, 8]}, federated={"num_clients": 3})
    with pytest.raises(ConfigError, match=r"lora\.rank has 2 ranks for 3 clients"):
        settings_of(config(lora={"rank": [4, 8]}), NAMES)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"rank": {"a": 4}}}, "clients: {NAME: {rank: R}}"),
        ({"lora": {"rank": []}}, "the list is empty"),
        ({"lora": {"rank": [4, 0]}}, "0 is no LoRA rank"),
        ({"lora": {"rank": [4, True]}}, "true is no LoRA rank"),
        ({"lora": {"rank": [4]}, "clients": {"0": {"rank": 4}}}, "both say this client's rank"),
        ({"clients": {"a": {"rnk": 4}}}, "clients.a.rnk = 4: unknown key; a client has rank, lr"),
        ({"clients": {"a": {"lr": 0}}}, "clients.a.lr = 0: "),
        ({"clients": {"a": 4}}, "clients.a = 4: "),
        ({"train": {"batch_size": 2, "micro_batch_size": 4}}, "is more than train.batch_size=2"),
    ],
)
def test_what_is_no_setting_of_a_client_is_refused(sections: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    assert message in str(caught.value)


def test_arguments_name_clients_too_also_those_with_dots_or_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name: x}\ndata: {task: gsm8k}\nclients: {0: {rank: 4}, a.b: {lr: 1}}\n"
    )
    found = config_load.load(str(path), ["clients.0.lr=0.5", "clients.a.b.rank=2"])
    assert found.clients["0"].rank == 4 and found.clients["0"].lr == 0.5
    assert found.clients["a.b"].rank == 2 and found.clients["a.b"].lr == 1.0
    path.write_text(
        'model: {name: x}\ndata: {task: gsm8k}\nclients: {0: {rank: 4}, "0": {lr: 1}}\n'
    )
    with pytest.raises(ConfigError, match="this client stands twice"):
        config_load.load(str(path))


def test_the_most_that_a_client_may_need() -> None:
    clients = {"a": {"rank": 64, "batch_size": 2, "local_steps": 3}, "b": {"rank": 4}}
    some = config(clients=clients)
    assert (largest_rank(some), largest_batch(some), most_steps(some)) == (64, 8, 10)
    assert may_have_mixed_ranks(some)
    all_named = config(clients={"a": {"rank": 4}, "b": {"rank": 4}}, federated={"num_clients": 2})
    assert largest_rank(all_named) == 4 and not may_have_mixed_ranks(all_named)
    epochs = config(train={"local_epochs": 1}, clients={"a": {"local_steps": 3}})
    assert most_steps(epochs) is None


def test_a_run_is_not_resumed_with_other_settings_of_a_client() -> None:
    before = comparable(config(clients={"a": {"rank": 4}}), 2)
    now = comparable(config(clients={"a": {"rank": 8}}), 2)
    [line] = differences(before, now)
    assert line.startswith("clients.a: ")
    assert differences(comparable(config(), 2), comparable(config(), 2)) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"clients": {"x": {"rank": 4}}}, "clients.x: no client has this name"),
        ({"lora": {"rank": [4, 8], "scaling": [1, -0.5]}}, "so N is no one number"),
        ({"lora": {"rank": [4, 8, 8]}}, "3 ranks and federated.num_clients=2"),
        ({"federated": {"scaffold": True}}, "federated.scaffold=true: the server's control"),
        (
            {"privacy": {"clip": 1.0, "noise_multiplier": 0.0}},
            "privacy.clip=1: a mean over the holders of a row divides by their number",
        ),
        ({"federated": {"method": "fedex"}}, "'fedex': its server step does not say"),
        (
            {
                "federated": {"method": "hetlora"},
                "lora": {"scaling": "sfed", "init": "independent"},
            },
            "counts rows that a client lacks as zeros",
        ),
        ({"lora": {"start_from": "adapters"}}, "ranks of single clients with lora.start_from: r"),
        ({"federated": {"join": "runs/x"}}, "ranks of single clients with federated.join: r is"),
    ],
)
def test_a_start_refuses_it_before_anything_is_loaded(sections: dict, message: str) -> None:
    ranks = {} if "rank" in sections.get("lora", {}) else {"clients": {"0": {"rank": 4}}}
    federated = {"num_clients": 2, **sections.get("federated", {})}
    with pytest.raises(ConfigError) as caught:
        preflight.check(config(**{**ranks, **sections, "federated": federated}), 1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "federated",
    [
        {"method": "fedsa", "scaffold": True},
        {"method": "fedex"},
        {"method": "hetlora"},
        {"method": "flexlora"},
        {"method": "flora"},
        {"method": "fedit", "server_optimizer": "fedadam", "prox_mu": 0.1},
    ],
)
def test_ranks_that_are_the_same_are_no_different_ranks(federated: dict) -> None:
    same = {"lora": {"rank": [4, 4]}, "federated": {"num_clients": 2, **federated}}
    own = config(**same)
    assert preflight._of_settings(own, 1) == []
    takes_others = "scaffold" not in federated and federated["method"] != "fedex"
    mixed = config(**{**same, "lora": {"rank": [4, 8]}})
    assert (preflight._of_settings(mixed, 1) == []) == takes_others


def test_a_sweep_varies_the_rank_of_a_client(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    text = "set: {model: {name: x}, data: {task: gsm8k}, federated: {num_clients: 2}}\n"
    path.write_text(text + "grid: {clients.1.rank: [4, 8], lora.rank: [2]}\n")
    found = grid.read(path, [], 1, lambda _: None)
    assert [cell.config.clients["1"].rank for cell in found.cells] == [4, 8]
    path.write_text(text + "grid: {lora.rank: [[4, 8], [8, 8]]}\n")
    found = grid.read(path, [], 1, lambda _: None)
    assert [cell.name for cell in found.cells] == ["r-4_8", "r-8_8"]
    path.write_text(text + "grid: {clients.1.rnk: [4, 8]}\n")
    with pytest.raises(Exception, match="a client has rank, lr, batch_size, local_steps"):
        grid.read(path, [], 1, lambda _: None)
