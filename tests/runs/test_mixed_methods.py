"""Clients of different LoRA ranks beside what else a run may have: methods, resumes and exports.

Methods on the product are compared with dense matrices, as ``test_product_methods`` does with one
rank: each client of the reference has factors of its own rank and gamma, and no padding.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfed.data.batches import Order
from sfed.eval import __main__ as evaluation
from sfed.lora.layout import Layout
from sfed.utils.errors import UserError
from sfed.utils.rng import Stream, derive
from tests.runs.test_product_methods import Weights, apart, exported_weights
from tests.runs.test_ranks import (
    CLIENTS,
    NAMES,
    RANKS,
    SEED,
    Client,
    Tensors,
    adapted,
    drawn,
    gammas_of,
    load,
    run,
)
from tests.support import runs, tiny, used
from tests.support.deadlines import scaled
from tests.support.disturbed import Moment, train_with_signal
from tests.support.processes import ends_of
from tests.support.reference import cohorts_of, parts_of, shares, tokenised
from tests.support.selection import full

pytestmark = pytest.mark.slow

LARGEST = max(RANKS)
BY_EXAMPLES: dict[str, Any] = {
    "partition": {"kind": "dirichlet", "key": "kind", "concentration": 1.0},
    "federated": {"clients_per_round": 2, "weighting": "examples"},
}


# --- the reference ---------------------------------------------------------------------------


def product_of(client: Client, name: str) -> torch.Tensor:
    """gamma_i B_i A_i, fp64."""
    layer = client.layers[name]
    return layer.gamma * (layer.B.detach().double() @ layer.A.detach().double())


def fresh_a(model: torch.nn.Module, round_index: int) -> Tensors:
    """The new A of FLoRA, of the largest rank."""
    layers = adapted(model)
    shapes = [(name, one.in_features, one.out_features) for name, one in layers.items()]
    order = [piece.layer for piece in Layout.of(shapes, LARGEST).pieces]
    found = {}
    for name, width, _ in shapes:
        seed = derive(Stream.SERVER_STEP, SEED, round_index)
        seed = derive(Stream.SERVER_STEP, seed, order.index(name))
        draw = torch.Generator().manual_seed(seed)
        a = torch.empty(LARGEST, width).uniform_(-(width**-0.5), width**-0.5, generator=draw)
        found[name] = a
    return found


def hetlora_weights(sent: list[Client]) -> list[float]:
    """In proportion to |B A|, without gamma."""
    norms = [
        sum(
            float((layer.B.detach().double() @ layer.A.detach().double()).square().sum())
            for layer in client.layers.values()
        )
        ** 0.5
        for client in sent
    ]
    return [norm / sum(norms) for norm in norms]


def zero_padded(p: list[float], rows: list[torch.Tensor], before: torch.Tensor) -> torch.Tensor:
    """sum_i p_i x_i with zeros for missing rows; a row that nobody has stays."""
    new = before.clone()
    for row in range(len(before)):
        held = [w * one[row].double() for w, one in zip(p, rows, strict=True) if row < len(one)]
        if held:
            new[row] = sum(held).float()
    return new


class Reference:
    """All clients of a run, by the formulas."""

    def __init__(self, folder: Path, method: str) -> None:
        self.method, model = method, load(folder)
        self.model, self.a = model, drawn(model, LARGEST, SEED)
        gammas = gammas_of([1 / 3] * 3, "lora")
        self.clients = [Client(model, self.a, gamma, i) for i, gamma in enumerate(gammas)]
        self.b = {
            name: torch.zeros(LARGEST, one.out_features) for name, one in adapted(model).items()
        }
        self.changes: Weights = {
            name: torch.zeros(one.weight.shape).double() for name, one in adapted(model).items()
        }

    def server_step(self, cohort: list[int], p: list[float], round_index: int) -> None:
        sent = [self.clients[client] for client in cohort]
        if self.method == "hetlora":
            p = hetlora_weights(sent)
        fresh = fresh_a(self.model, round_index)
        for name in self.a:
            delta = sum(w * product_of(one, name) for w, one in zip(p, sent, strict=True))
            if self.method == "flexlora":
                self._flexlora(name, delta)
            elif self.method == "flora":
                self.changes[name] += delta
                self.a[name] = fresh[name]
                self._give(name, [torch.zeros_like(one.layers[name].B) for one in self.clients])
            else:
                held = [one.layers[name] for one in sent]
                self.a[name] = zero_padded(p, [one.A.data for one in held], self.a[name])
                self.b[name] = zero_padded(p, [one.B.data.T for one in held], self.b[name])
                self._give(name, [self.b[name][:rank].T for rank in RANKS])

    def _flexlora(self, name: str, delta: torch.Tensor) -> None:
        """A = V_r^T, B = U_r S_r / gamma_i; where Delta has fewer values, rows of A stay."""
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        values = int((s > 1e-9 * s[0]).sum())
        rows = min(values, LARGEST)
        self.a[name][:rows] = vt[:rows].float()
        u, s = u[:, :LARGEST], torch.where(torch.arange(len(s)) < rows, s, 0.0)[:LARGEST]
        of_clients = [
            (u * s)[:, :rank] / client.layers[name].gamma
            for rank, client in zip(RANKS, self.clients, strict=True)
        ]
        self._give(name, of_clients)

    def _give(self, name: str, bs: list[torch.Tensor]) -> None:
        for client, rank, b in zip(self.clients, RANKS, bs, strict=True):
            client.layers[name].A.data.copy_(self.a[name][:rank])
            client.layers[name].B.data.copy_(b)
            original = adapted(self.model)[name].weight
            client.layers[name].base.weight.data.copy_(original + self.changes[name])

    def weights(self, client: int) -> Weights:
        """By how much the weight of each layer is another one for a client."""
        return {
            name: self.changes[name] + product_of(self.clients[client], name) for name in self.a
        }


def expected(folder: Path, run_folder: Path, method: str, *, by_examples: bool) -> Reference:
    rows, parts = tokenised(folder), parts_of(run_folder)
    reference = Reference(folder, method)
    own = [[rows[i] for i in part["train"]] for part in parts]
    orders = [Order(SEED, client, len(own[client])) for client in range(3)]
    for t, cohort in enumerate(cohorts_of(run_folder)):
        for client in cohort:
            reference.clients[client].train_round(own[client], orders[client])
        reference.server_step(cohort, shares(parts, cohort, by_examples=by_examples), t)
    return reference


CASES = [
    *((method, 0, "none") for method in ("flexlora", "flora", "hetlora")),
    full("flexlora", 2, "none"),
    full("flora", 2, "zero3"),
    full("hetlora", 2, "zero3"),
    full("flexlora", 3, "zero3"),
]


@pytest.mark.dist
@pytest.mark.parametrize(("method", "num", "sharding"), CASES)
def test_methods_on_the_product_equal_the_dense_reference(
    tiny_folder: Path, tmp_path: Path, method: str, num: int, sharding: str
) -> None:
    """Two of three clients in a round, with unequal weights where the method leaves them open."""
    by_examples = method != "hetlora"
    sections = BY_EXAMPLES if by_examples else {"federated": {"clients_per_round": 2}}
    federated = {**sections["federated"], "method": method, "clients_per_pass": 1}
    sections = {**sections, "federated": federated, "backbone": {"sharding": sharding}}
    folder = run(tiny_folder, tmp_path, "run", num, clients=CLIENTS, **sections)
    reference = expected(tiny_folder, folder, method, by_examples=by_examples)
    paths, weights = runs.adapter_paths(folder), []
    for client, name in enumerate(NAMES):
        weights.append(reference.weights(client))
        assert apart(exported_weights(paths[name]), weights[client]) < 2e-5
    p = shares(parts_of(folder), [0, 1, 2], by_examples=by_examples)
    mean = {n: sum(w * one[n] for w, one in zip(p, weights, strict=True)) for n in weights[0]}
    assert apart(exported_weights(paths["global"]), mean) < 2e-5


# --- what else a run may have ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["sfed", "flexlora"])
def test_a_checkpoint_is_exported_as_the_run_itself_wrote_it(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    """Each adapter at its own rank and with its own gamma, also in the model card."""
    federated = {**BY_EXAMPLES["federated"], "method": method}
    sections = {**BY_EXAMPLES, "federated": federated}
    folder = run(tiny_folder, tmp_path, "run", clients=CLIENTS, **sections)
    out = used.exported(folder, tmp_path / "out")
    own = runs.adapters(folder)
    found = {name: load_file(out / name / "adapter_model.safetensors") for name in own}
    for client, name in enumerate(NAMES):
        assert runs.identical({name: found[name]}, {name: own[name]})
        texts = [
            (parent / name / "adapter_config.json").read_text()
            for parent in (out, folder / "adapters")
        ]
        facts = json.loads(texts[0])
        assert texts[0] == texts[1] and facts["r"] == RANKS[client]
        for parent in (out, folder / "adapters"):
            card = (parent / name / "README.md").read_text()
            assert f"| LoRA rank (r) | {RANKS[client]} |" in card
            assert f"| {facts['lora_alpha'] / facts['r']:.6g} |" in card
    for key, tensor in found["global"].items():
        torch.testing.assert_close(tensor, own["global"][key], rtol=1e-6, atol=1e-9)


def test_a_server_optimizer_goes_on_over_a_resume_and_from_fedprox(
    tiny_folder: Path, tmp_path: Path
) -> None:
    more = {"server_optimizer": "fedadam", "prox_mu": 0.5, "clients_per_round": 2}
    sections: dict[str, Any] = {"clients": CLIENTS, "evaluation": {"every_rounds": 0}}
    whole = run(tiny_folder, tmp_path, "whole", federated=more, **sections)
    for num_rounds in (1, 3):
        federated = {**more, "num_rounds": num_rounds}
        parts = run(tiny_folder, tmp_path, "parts", federated=federated, **sections)
    assert runs.identical(runs.adapters(parts), runs.adapters(whole))
    plain = run(tiny_folder, tmp_path, "plain", federated={"clients_per_round": 2}, **sections)
    assert runs.relative_difference(runs.adapters(plain), runs.adapters(whole)) > 1e-3


@pytest.mark.dist
def test_a_run_that_is_killed_within_a_round_ends_as_an_undisturbed_one(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Partial participation, unequal weights and ranks; dropout too."""
    sections = {
        **BY_EXAMPLES,
        "clients": CLIENTS,
        "lora": {"alpha": 2.0, "dropout": 0.1},
        "train": {"optimizer": "adamw", "lr": 0.01},
        "output": {"dir": str(tmp_path), "name": "run"},
    }
    federated = {"num_clients": 3, "num_rounds": 3, "deadline_seconds": scaled(10.0)}
    sections["federated"] = {**BY_EXAMPLES["federated"], **federated}
    own = tiny.settings(tiny_folder, **sections)
    moment = Moment(1, 2, 1)
    ends = ends_of(2, train_with_signal, own, moment, signal.SIGKILL)
    assert ends[moment.process].code == -signal.SIGKILL, ends
    assert not (tmp_path / "run" / "adapters").exists()
    again = ends_of(2, runs.train_settings, own)
    assert [end.code for end in again] == [0, 0], again
    calm = {**own, "output": {"dir": str(tmp_path), "name": "calm"}}
    assert runs.identical(runs.adapters(tmp_path / "run"), runs.adapters(runs.run(2, calm)))


def test_who_joins_or_starts_from_a_run_of_different_ranks(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """One of its adapters is an adapter as any other; all of them, or its A alone, are refused."""
    folder = run(tiny_folder, tmp_path, "run", clients=CLIENTS, federated={"num_rounds": 1})
    one = folder / "adapters" / NAMES[0]
    again = run(
        tiny_folder,
        tmp_path,
        "again",
        lora={"alpha": None, "rank": RANKS[0], "start_from": str(one)},
        federated={"num_rounds": 1},
    )
    facts, before = (
        json.loads((one / "adapter_config.json").read_text())
        for one in (again / "adapters" / NAMES[1], one)
    )
    assert (facts["r"], facts["lora_alpha"]) == (before["r"], before["lora_alpha"])
    start_from = str(folder / "adapters")
    with pytest.raises(UserError, match=r"differ in r, \d and \d"):
        run(tiny_folder, tmp_path, "all", lora={"alpha": None, "start_from": start_from})
    with pytest.raises(UserError, match="its clients have different LoRA ranks"):
        run(tiny_folder, tmp_path, "joins", lora={"alpha": None}, federated={"join": str(folder)})


def test_adapters_of_different_ranks_are_scored_one_at_a_time(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows, files = tiny.save_rows(tmp_path / "new.jsonl", 9, seed=9), tmp_path / "train"
    files.mkdir()
    for number, name in enumerate("abc"):
        tiny.save_rows(files / f"{name}.jsonl", 12, seed=number)
    folder = run(
        tiny_folder,
        tmp_path,
        "run",
        clients=CLIENTS,
        data={"task": "text", "train_files": str(files), "eval_files": str(rows)},
        partition={"kind": "by_file"},
        federated={"num_clients": None, "num_rounds": 1},
        evaluation={"max_examples": None},
    )
    last = runs.rounds(folder)[-1]
    words = [str(folder), f"data.eval_files={rows}", "--json", str(tmp_path / "scores.json")]
    expected = {one["name"]: one["personal_loss"] for one in last["clients"]}
    for name, loss in {**expected, "global": last["eval/global_loss"]}.items():
        evaluation.main([*words, "--client", name])
        _, entry = json.loads((tmp_path / "scores.json").read_text())["adapters"]
        assert entry["loss"] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(UserError, match=r"differ in lora_rank, .* name them one at a time"):
        evaluation.main(words)
