"""Whole runs: what trains and what stays, whose numbers depend on whom, what is left on disk."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sfed.config import load as config_load
from sfed.data.batches import Batch
from sfed.federated import session
from sfed.methods import sampling
from sfed.models import backbone
from sfed.observability.console import Console
from sfed.report.page import write_report
from sfed.storage.run_record import open_run
from sfed.utils.errors import UserError
from tests.support import runs, tiny
from tests.support.processes import on_processes

SGD = {"optimizer": "sgd", "lr": 0.1, "local_steps": 3, "batch_size": 4}


def settings(folder: Path, out: Path, name: str, **sections: object) -> dict:
    return tiny.settings(folder, output={"dir": str(out), "name": name}, **sections)


def with_method(folder: Path, out: Path, method: str, rounds: int, **sections: object) -> dict:
    federated = {"num_clients": 4, "num_rounds": rounds, "method": method}
    name = f"{method}-{rounds}"
    own = settings(folder, out, name, federated=federated, **sections)
    session.run_session(config_load.validate(own))
    return runs.adapters(out / name)


def test_rolora_moves_b_first_and_leaves_the_other_factor_alone_bit_for_bit(
    tiny_folder: Path, tmp_path: Path
) -> None:
    train = {"lr": 1e-2, "local_steps": 3, "batch_size": 4, "weight_decay": 0.5}
    start = with_method(tiny_folder, tmp_path, "ffa", 1, train=train)["client-0000"]
    one = with_method(tiny_folder, tmp_path, "rolora", 1, train=train)["client-0000"]
    two = with_method(tiny_folder, tmp_path, "rolora", 2, train=train)["client-0000"]
    for name in runs.factors(one, "A"):
        assert torch.equal(one[name], start[name]), "weight decay moved a frozen A"
        assert not torch.equal(two[name], one[name])
    for name in runs.factors(one, "B"):
        assert bool(one[name].any()), "the first round was a no-op"
        assert torch.equal(two[name], one[name]), "weight decay moved a frozen B"


def test_ffa_never_moves_a_and_shares_b(tiny_folder: Path, tmp_path: Path) -> None:
    after_one = with_method(tiny_folder, tmp_path, "ffa", 1)
    after_three = with_method(tiny_folder, tmp_path, "ffa", 3)
    for client in ("client-0000", "client-0003"):
        for name, tensor in after_three[client].items():
            assert torch.equal(tensor, after_three["client-0001"][name])
            assert torch.equal(tensor, after_one[client][name]) == (".lora_A." in name)


def test_local_shares_nothing_and_has_no_global_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    adapters = with_method(tiny_folder, tmp_path, "local", 2)
    assert "global" not in adapters
    for name, tensor in adapters["client-0000"].items():
        assert not torch.equal(tensor, adapters["client-0001"][name])
    assert {event["comm/uploaded_bytes"] for event in runs.rounds(tmp_path / "local-2")} == {0}


@pytest.mark.parametrize("averaged", [["A"], ["B"], ["B", "A"], []])
def test_what_is_averaged_can_be_overridden_for_ablations(
    tiny_folder: Path, tmp_path: Path, averaged: list[str]
) -> None:
    federated = {"num_clients": 3, "num_rounds": 2, "method": "fedsa", "averaged": averaged}
    own = settings(tiny_folder, tmp_path, "run", federated=federated)
    session.run_session(config_load.validate(own))
    adapters = runs.adapters(tmp_path / "run")
    one, other = adapters["client-0000"], adapters["client-0002"]
    for factor in ("A", "B"):
        for name, tensor in runs.factors(one, factor).items():
            assert torch.equal(tensor, other[name]) == (factor in averaged), name
    assert ("global" in adapters) == ("A" in averaged)
    num = sum(t.numel() for f in averaged for t in runs.factors(one, f).values())
    assert runs.rounds(tmp_path / "run")[-1]["comm/uploaded_bytes"] == 4 * num


def test_a_run_leaves_the_backbone_bit_identical(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[backbone.Backbone] = []
    original = backbone.load

    def load(*arguments: object) -> backbone.Backbone:
        frozen = original(*arguments)
        loaded.append(frozen)
        return frozen

    monkeypatch.setattr(backbone, "load", load)
    with_method(tiny_folder, tmp_path, "sfed", 2)
    [frozen] = loaded
    # The adapted layers now stand below their stacked ones: compare by the weights alone.
    names = [name.replace(".base_layer", "") for name, _ in frozen.model.named_parameters()]
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    assert sorted(names) == sorted(name for name, _ in plain.named_parameters())
    for (name, after), own in zip(frozen.model.named_parameters(), names, strict=True):
        assert torch.equal(after, plain.get_parameter(own)), name


def test_the_order_of_clients_in_a_pass_does_not_matter(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = with_method(tiny_folder, tmp_path, "sfed", 3, train=SGD)
    runs.train_in_groups(monkeypatch, [[(2, 0, 3, 1)]])
    mixed = with_method(tiny_folder, tmp_path / "mixed", "sfed", 3, train=SGD)
    assert runs.relative_difference(straight, mixed) <= 1e-6


def test_who_is_out_of_a_round_keeps_b_and_receives_the_new_a(
    tiny_folder: Path, tmp_path: Path
) -> None:
    federated = {"num_clients": 4, "num_rounds": 1, "clients_per_round": 2}
    one = settings(tiny_folder, tmp_path, "out", federated=federated)
    session.run_session(config_load.validate(one))
    adapters = runs.adapters(tmp_path / "out")
    [_, event] = runs.rounds(tmp_path / "out")
    out = {entry["client"] for entry in event["clients"] if entry["train_loss"] is None}
    assert len(out) == 2
    for client in range(4):
        tensors = adapters[f"client-{client:04d}"]
        moved = any(bool(t.any()) for t in runs.factors(tensors, "B").values())
        assert moved == (client not in out)
        for name, tensor in runs.factors(tensors, "A").items():
            assert torch.equal(tensor, adapters["client-0000"][name])


def test_splitting_a_step_into_micro_passes_changes_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The mean is over the tokens of the whole step, though rows have unequal lengths."""
    whole = with_method(tiny_folder, tmp_path, "sfed", 2, train=SGD)
    micro = {**SGD, "micro_batch_size": 3}
    parts = with_method(tiny_folder, tmp_path / "micro", "sfed", 2, train=micro)
    assert runs.relative_difference(whole, parts) <= 2e-6


def test_a_run_folder_holds_what_it_promises(tiny_folder: Path, tmp_path: Path) -> None:
    adapters = with_method(tiny_folder, tmp_path, "sfed", 2)
    folder = tmp_path / "sfed-2"
    assert list(adapters) == [*(f"client-{c:04d}" for c in range(4)), "global"]
    config = json.loads((folder / "config.json").read_text())
    assert config["resolved"]["gamma"] == pytest.approx(2.0 * (4 / 4) ** 0.5)
    assert config["resolved"]["num_clients"] == 4
    assert config["versions"]["torch"] == torch.__version__
    parts = json.loads((folder / "partition.json").read_text())["clients"]
    held = [i for part in parts for i in part["train"] + part["eval"]]
    assert sorted(held) == list(range(80)), "every example is held exactly once"
    events = runs.rounds(folder)
    assert [event["round"] for event in events] == [0, 1, 2]
    promised = (
        "train/loss eval/loss eval/perplexity adapter/grad_norm comm/uploaded_bytes "
        "time/round_seconds time/local_seconds time/aggregate_seconds time/tokens_per_second "
        "memory/peak_bytes clients"
    )
    for event in events[1:]:
        assert all(event[key] is not None for key in promised.split())
        for entry in event["clients"]:
            assert {"client", "train_loss", "eval_loss", "examples"} <= entry.keys()
    num_a = sum(t.numel() for t in runs.factors(adapters["global"], "A").values())
    assert events[1]["comm/uploaded_bytes"] == 4 * num_a
    weighted = [(entry["train_loss"], entry["examples"]) for entry in events[2]["clients"]]
    assert min(loss for loss, _ in weighted) <= events[2]["train/loss"]
    assert events[2]["eval/loss"] < events[0]["eval/loss"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["round"]) == ("round", 2), "programs read the result there"
    [last] = map(json.loads, (folder / "starts.jsonl").read_text().splitlines())
    assert last["event"] == "end"
    assert all(last[key] > 0 for key in ("time/checkpoint_seconds", "time/export_seconds"))


def test_the_reported_loss_is_that_of_stock_peft_on_the_held_out_rows(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """An outside computation of the last personal loss of a client, token by token."""
    with_method(tiny_folder, tmp_path, "sfed", 2)
    folder = tmp_path / "sfed-2"
    rows = [json.loads(line) for line in (tiny_folder / "rows.jsonl").read_text().splitlines()]
    part = json.loads((folder / "partition.json").read_text())["clients"][2]
    reported = runs.rounds(folder)[-1]["clients"][2]["personal_loss"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    model = PeftModel.from_pretrained(base, folder / "adapters" / "client-0002")
    total, count = 0.0, 0
    for index in part["eval"]:
        prompt = tokenizer(rows[index]["prompt"])["input_ids"]
        completion = tokenizer(rows[index]["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        losses = -torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
        for position in range(len(prompt), ids.shape[1]):
            total += float(losses[position - 1, ids[0, position]])
            count += 1
    assert reported == pytest.approx(total / count, rel=1e-5)


def opened(run_settings: dict) -> list[str]:
    """The files of rows that this process opened during a run."""
    seen: list[str] = []
    sys.addaudithook(lambda event, arguments: _note(seen, event, arguments))
    session.run_session(config_load.validate(run_settings))
    return sorted(set(seen))


def _note(seen: list[str], event: str, arguments: tuple) -> None:
    if event == "open" and str(arguments[0]).endswith(".jsonl") and "rows-" in str(arguments[0]):
        seen.append(Path(os.fspath(arguments[0])).name)


def opened_at_home(run_settings: dict, folder: Path) -> list[str]:
    """The same in a folder of this process's own, where it sees files that others do not."""
    os.chdir(folder / os.environ["RANK"])
    return opened(run_settings)


@pytest.mark.dist
def test_by_file_clients_that_read_whole_files_are_dealt_by_their_sizes(
    tiny_folder: Path, tmp_path: Path
) -> None:
    for client, count in enumerate((6, 40, 6, 6)):
        tiny.save_rows(tmp_path / f"rows-{client}.jsonl", count, seed=client)
    own = settings(
        tiny_folder,
        tmp_path,
        "sizes",
        data={"train_files": str(tmp_path / "rows-{client}.jsonl")},
        partition={"kind": "by_file"},
        train={"local_steps": None, "local_epochs": 1},
    )
    own["federated"]["num_rounds"] = 1
    assert on_processes(2, opened, own) == [
        ["rows-1.jsonl"],
        ["rows-0.jsonl", "rows-2.jsonl", "rows-3.jsonl"],
    ]
    # Files that lie on the machine of one process alone stay with it.
    for client in range(4):
        home = tmp_path / str(client // 2)
        home.mkdir(exist_ok=True)
        (tmp_path / f"rows-{client}.jsonl").rename(home / f"rows-{client}.jsonl")
    own["data"]["train_files"] = "rows-{client}.jsonl"
    own["output"]["name"] = "homes"
    assert on_processes(2, opened_at_home, own, tmp_path) == [
        ["rows-0.jsonl", "rows-1.jsonl"],
        ["rows-2.jsonl", "rows-3.jsonl"],
    ]


@pytest.mark.dist
def test_by_file_each_process_opens_the_files_of_its_own_clients_only(
    tiny_folder: Path, tmp_path: Path
) -> None:
    for client in range(4):
        tiny.save_rows(tmp_path / f"rows-{client}.jsonl", 12 + client, seed=client)
    own = settings(
        tiny_folder,
        tmp_path,
        "files",
        data={"train_files": str(tmp_path / "rows-{client}.jsonl")},
        partition={"kind": "by_file"},
    )
    assert on_processes(2, opened, own) == [
        ["rows-0.jsonl", "rows-1.jsonl"],
        ["rows-2.jsonl", "rows-3.jsonl"],
    ]
    parts = json.loads((tmp_path / "files" / "partition.json").read_text())["clients"]
    assert [len(part["train"]) + len(part["eval"]) for part in parts] == [12, 13, 14, 15]


def test_without_evaluation_nothing_held_out_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    own = settings(tiny_folder, tmp_path, "quiet", evaluation={"every_rounds": 0}, train=SGD)
    end = session.run_session(config_load.validate(own))
    events = runs.rounds(tmp_path / "quiet")
    assert end.is_finished
    assert len(events) == own["federated"]["num_rounds"] + 1
    assert all(event["eval/loss"] is None for event in events)
    assert all(event["comm/evaluation_bytes"] == 0 for event in events)
    assert events[-1]["train/loss"] > 0
    assert all(event["time/cpu_seconds"] > 0 for event in events)
    measured = settings(tiny_folder, tmp_path, "measured", train=SGD)
    session.run_session(config_load.validate(measured))
    assert runs.identical(*(runs.adapters(tmp_path / name) for name in ("quiet", "measured")))
    page = write_report([open_run(tmp_path / "quiet")], tmp_path / "page")
    assert page.is_file()


@pytest.mark.dist
def test_a_sample_is_evaluated_as_all_are_and_named_wherever_its_means_are(
    tiny_folder: Path, tmp_path: Path
) -> None:
    federated = settings(tiny_folder, tmp_path, "all")["federated"]
    for name, some in (("all", {}), ("few", {"clients": 2})):
        for rounds, num in ((1, 2), (3, 1)):
            part = {**federated, "num_rounds": rounds}
            own = settings(tiny_folder, tmp_path, name, train=SGD, federated=part, evaluation=some)
            runs.run(num, own)
    asked = sampling.evaluated(0, 4, 2)
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    assert config["resolved"]["evaluated_clients"] == list(asked)
    for sampled, every in zip(*(runs.rounds(tmp_path / n) for n in ("few", "all")), strict=True):
        assert sampled["evaluated_clients"] == list(asked) and sampled["eval/clients"] == 2
        assert "evaluated_clients" not in every and every["eval/clients"] == 4
        measured = {e["client"]: e["personal_loss"] for e in sampled["clients"]}
        assert {client for client, loss in measured.items() if loss is not None} == set(asked)
        theirs = [every["clients"][client]["personal_loss"] for client in asked]
        assert [measured[client] for client in asked] == pytest.approx(theirs, rel=1e-5)
        assert sampled["eval/personal_loss_unweighted"] == pytest.approx(sum(theirs) / 2, rel=1e-5)
    both = [runs.adapters(tmp_path / name) for name in ("few", "all")]
    assert runs.identical(*both), "who is evaluated changes no training"
    page = write_report([open_run(tmp_path / "few")], tmp_path / "page").read_text()
    assert "a sample of 2 of 4 clients" in page


def test_more_evaluated_clients_than_the_files_give_are_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    federated = {"num_clients": None, "num_rounds": 1}
    own = settings(tiny_folder, tmp_path, "x", federated=federated, evaluation={"clients": 2})
    with pytest.raises(UserError, match=r"evaluation\.clients = 2 is more than the 1 clients"):
        session.run_session(config_load.validate(own))


def test_the_loss_within_a_round_is_that_of_the_clients_that_made_the_step(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients make unequally many steps, and at the end of a round one of them is left."""
    shown: list[float] = []
    monkeypatch.setattr(
        Console, "step", lambda _self, _step, _last, read, _tokens: shown.append(read())
    )
    own = settings(
        tiny_folder,
        tmp_path,
        "run",
        partition={"kind": "dirichlet", "key": "kind", "concentration": 0.3},
        federated={"num_clients": 4, "num_rounds": 1},
        train={**SGD, "local_steps": None, "local_epochs": 1, "lr": 1e-6},
    )
    session.run_session(config_load.validate(own))
    event = runs.rounds(tmp_path / "run")[-1]
    steps = [client["steps"] for client in event["clients"]]
    assert min(steps) < max(steps) == len(shown)
    # Untrained, so every step has about the same loss; with zeros it would fall.
    assert min(shown) > 0.8 * shown[0]


def test_steps_are_counted_over_all_clients_of_a_process_that_train_one_after_another(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the time that is left follows from them."""
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Console, "step", lambda _self, step, last, _read, _tokens: shown.append((step, last))
    )
    federated = {"num_clients": 3, "num_rounds": 1, "clients_per_pass": 1}
    own = settings(tiny_folder, tmp_path, "run", federated=federated)
    session.run_session(config_load.validate(own))
    steps = 3 * own["train"]["local_steps"]
    assert shown == [(step, steps) for step in range(1, steps + 1)]


def test_each_step_of_a_client_has_a_dropout_seed_of_its_own(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its micro passes have the same, and so has a client that shares its passes."""
    given: list[tuple[tuple[int, ...], int]] = []
    with_keys = Batch.with_keys

    def noting(batch: Batch, seeds: tuple[int, ...], first: int = 0) -> Batch:
        given.append((seeds, first))
        return with_keys(batch, seeds, first)

    def seeds_of(seed: int, clients_per_pass: int) -> list[tuple[int, ...]]:
        """Of each round and step, those of the clients that make passes."""
        given.clear()
        name = f"{seed}-{clients_per_pass}"
        federated = {"num_clients": 2, "num_rounds": 2, "clients_per_pass": clients_per_pass}
        train = {**SGD, "local_steps": 2, "micro_batch_size": 2}
        sections: dict[str, object] = {"federated": federated, "train": train, "seed": seed}
        own = settings(tiny_folder, tmp_path, name, lora={"rank": 4, "dropout": 0.5}, **sections)
        session.run_session(config_load.validate(own))
        assert [first for _, first in given] == [0, 2] * (len(given) // 2)
        assert given[::2] == [(seeds, 0) for seeds, _ in given[1::2]]
        return [seeds for seeds, _ in given[::2]]

    monkeypatch.setattr(Batch, "with_keys", noting)
    (first, second), alone = (seeds_of(seed, 2) for seed in (0, 1)), seeds_of(0, 1)
    together = [one for seeds in first + second for one in seeds]
    assert len(set(together)) == len(together) == 2 * 2 * 2 * 2
    in_turns = [alone[place] for place in (0, 2, 1, 3, 4, 6, 5, 7)]  # by round, step, client
    assert [one for (one,) in in_turns] == together[:8]
