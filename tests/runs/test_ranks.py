"""Clients of different LoRA ranks in one pass, each with its own settings, as the formulas say.

The reference has a model of its own for each client, with factors of its own rank and no padding
anywhere: ``torch.optim``, and a mean row by row over those that hold the row.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from sfed.config import load as config_load
from sfed.data.batches import Order
from sfed.federated import session
from sfed.utils.rng import Stream, derive
from tests.support import glue, runs, tiny
from tests.support.reference import Lora, cohorts_of, parts_of, shares, tokenised

pytestmark = pytest.mark.slow

ALPHA, ROUNDS, CLIP, SEED = 2.0, 3, 0.5, 0
NAMES = [f"client-{client:04d}" for client in range(3)]
RANKS = [2, 3, 8]
# What each client trains with: learning rate, batch size, steps.
SETTINGS = [(0.05, 3, 2), (0.02, 2, 3), (0.08, 4, 1)]
CLIENTS = {
    str(client): {"rank": rank, "lr": lr, "batch_size": batch, "local_steps": steps}
    for client, (rank, (lr, batch, steps)) in enumerate(zip(RANKS, SETTINGS, strict=True))
}
Tensors = dict[str, torch.Tensor]


def run(folder: Path, out: Path, name: str, num_processes: int = 0, **sections: Any) -> Path:
    """Train, in this process or on several, and return the run folder."""
    base: dict[str, dict[str, Any]] = {
        "lora": {"alpha": ALPHA},
        "federated": {"num_clients": 3, "num_rounds": ROUNDS, "clients_per_pass": None},
        "train": {"max_grad_norm": CLIP, "optimizer": "sgd", "weight_decay": 0.1},
        "output": {"dir": str(out), "name": name},
    }
    merged = {
        key: {**base.get(key, {}), **sections.get(key, {})}
        for key in dict.fromkeys([*base, *sections])
    }
    settings = tiny.settings(folder, **merged)
    if num_processes:
        return runs.run(num_processes, settings)
    session.run_session(config_load.validate(settings))
    return out / name


def adapted(model: nn.Module) -> dict[str, nn.Linear]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    return dict(sorted(found.items()))


def drawn(model: nn.Module, rank: int, *words: int) -> Tensors:
    """A of these seed words in a run of this rank: uniform in +-1/sqrt(in), layer after layer."""
    generator = torch.Generator().manual_seed(derive(Stream.INIT_A, *words))
    return {
        name: torch.empty(rank, layer.in_features).uniform_(
            -(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator
        )
        for name, layer in adapted(model).items()
    }


def over_holders(p: Sequence[float], rows: Sequence[torch.Tensor], before: torch.Tensor):
    """The mean of each row over those that have it; a row that nobody has stays."""
    new = before.clone()
    for row in range(len(before)):
        held = [(weight, one[row]) for weight, one in zip(p, rows, strict=True) if row < len(one)]
        if held:
            total = sum(weight for weight, _ in held)
            new[row] = sum(weight / total * one.double() for weight, one in held).float()
    return new


def gammas_of(p: Sequence[float], exponents: str) -> list[float]:
    """sfed: alpha / sqrt(sum over own rows of sum_i q_i^2); others alpha / r_i."""
    if exponents == "lora":
        return [ALPHA / rank for rank in RANKS]
    variance = []
    for row in range(max(RANKS)):
        held = [weight for weight, rank in zip(p, RANKS, strict=True) if rank > row]
        variance.append(sum((weight / sum(held)) ** 2 for weight in held))
    return [ALPHA / math.sqrt(sum(variance[:rank])) for rank in RANKS]


class Client:
    """A client of the reference."""

    def __init__(self, model: nn.Module, a: Tensors, gamma: float, number: int) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.layers: dict[str, Lora] = {}
        for name, layer in adapted(self.model).items():
            self.layers[name] = Lora(layer, a[name][: RANKS[number]], gamma)
            self.model.set_submodule(name, self.layers[name])
        self.lr, self.batch, self.steps = SETTINGS[number]
        self.position = 0

    def train_round(self, rows: list[tuple[list[int], int]], order: Order) -> None:
        factors = [getattr(layer, f) for layer in self.layers.values() for f in "AB"]
        optimizer = torch.optim.SGD(factors, lr=self.lr, weight_decay=0.0)
        for _ in range(self.steps):
            batch = [rows[order.at(self.position + i)] for i in range(self.batch)]
            self.position += self.batch
            optimizer.zero_grad()
            mean_loss(self.model, batch).backward()
            nn.utils.clip_grad_norm_(factors, CLIP)
            for factor in factors:  # decoupled weight decay
                factor.data.mul_(1 - self.lr * 0.1)
            optimizer.step()


def mean_loss(model: nn.Module, batch: list[tuple[list[int], int]]) -> torch.Tensor:
    width = max(len(ids) for ids, _ in batch)
    input_ids = torch.tensor([ids + [1] * (width - len(ids)) for ids, _ in batch])
    labels = torch.full_like(input_ids, -100)
    for i, (ids, prompt_length) in enumerate(batch):
        labels[i, prompt_length : len(ids)] = input_ids[i, prompt_length : len(ids)]
    return model(input_ids=input_ids, labels=labels).loss


def reference(folder: Path, run_folder: Path, method: str, *, by_examples: bool) -> list[Client]:
    """The clients after the rounds of a run, by the formulas."""
    model, rows, parts = load(folder), tokenised(folder), parts_of(run_folder)
    p = shares(parts, [0, 1, 2], by_examples=by_examples)
    common = drawn(model, max(RANKS), SEED)
    if method == "sfed":
        draws = [drawn(model, rank, SEED, client) for client, rank in enumerate(RANKS)]
        common = {n: over_holders(p, [draw[n] for draw in draws], common[n]) for n in common}
    gammas = gammas_of(p, "sfed" if method == "sfed" else "lora")
    clients = [Client(model, common, gamma, number) for number, gamma in enumerate(gammas)]
    common_b = {
        n: torch.zeros(max(RANKS), layer.base.out_features)
        for n, layer in clients[0].layers.items()
    }
    own = [[rows[i] for i in part["train"]] for part in parts]
    orders = [Order(SEED, client, len(own[client])) for client in range(3)]
    for cohort in cohorts_of(run_folder):
        for client in cohort:
            clients[client].train_round(own[client], orders[client])
        weights = shares(parts, cohort, by_examples=by_examples)
        for name in common:
            held = [clients[client].layers[name] for client in cohort]
            common[name] = over_holders(weights, [one.A.data for one in held], common[name])
            if method == "fedit":
                columns = [one.B.data.T for one in held]
                common_b[name] = over_holders(weights, columns, common_b[name])
            for client, rank in zip(clients, RANKS, strict=True):
                client.layers[name].A.data.copy_(common[name][:rank])
                if method == "fedit":
                    client.layers[name].B.data.copy_(common_b[name][:rank].T)
    return clients


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "model").requires_grad_(False)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max()) / max(float(other.abs().max()), 1e-12)


@torch.no_grad()
def loss_of(folder: Path, adapter: Path, rows: list[tuple[list[int], int]]) -> float:
    """The loss that stock PEFT has with an exported adapter."""
    return float(mean_loss(PeftModel.from_pretrained(load(folder), adapter), rows))


@pytest.mark.parametrize(
    ("method", "federated"),
    [
        ("sfed", {}),
        ("sfed", {"clients_per_round": 2, "weighting": "examples"}),
        ("fedit", {"clients_per_round": 2, "clients_per_pass": 1}),
    ],
    ids=["sfed", "sfed, two of three by examples", "fedit, two of three, paged"],
)
def test_a_run_of_mixed_ranks_equals_the_reference_and_stock_peft(
    tiny_folder: Path, tmp_path: Path, method: str, federated: dict[str, Any]
) -> None:
    by_examples = "weighting" in federated
    partition = {"kind": "dirichlet", "key": "kind", "concentration": 1.0} if by_examples else {}
    folder = run(
        tiny_folder,
        tmp_path,
        "run",
        clients=CLIENTS,
        federated={"method": method, **federated},
        partition=partition,
    )
    clients = reference(tiny_folder, folder, method, by_examples=by_examples)
    ours, parts, rows = runs.adapters(folder), parts_of(folder), tokenised(tiny_folder)
    p = shares(parts, [0, 1, 2], by_examples=by_examples)
    last = runs.rounds(folder)[-1]
    for number, client in enumerate(clients):
        path = folder / "adapters" / NAMES[number]
        facts = json.loads((path / "adapter_config.json").read_text())
        gamma = next(iter(client.layers.values())).gamma
        assert facts["r"] == RANKS[number]
        assert facts["lora_alpha"] / facts["r"] == pytest.approx(gamma, rel=1e-12)
        for name, layer in client.layers.items():
            for factor in "AB":
                found = ours[NAMES[number]][f"base_model.model.{name}.lora_{factor}.weight"]
                assert difference(found, getattr(layer, factor).data) < 1e-5
        loss = loss_of(tiny_folder, path, [rows[i] for i in parts[number]["eval"]])
        assert last["clients"][number]["personal_loss"] == pytest.approx(loss, rel=1e-5)
    widths = sum(layer.base.in_features for layer in clients[0].layers.values())
    if method == "sfed":
        assert last["comm/uploaded_bytes"] == 4 * max(RANKS) * widths
    # The global adapter is the exact mean of the personal models.
    facts = json.loads((folder / "adapters" / "global" / "adapter_config.json").read_text())
    assert (facts["r"], facts["lora_alpha"]) == (max(RANKS), max(RANKS))
    for name in clients[0].layers:
        held = [client.layers[name] for client in clients]
        mean = sum(w * one.gamma * one.B.data @ one.A.data for w, one in zip(p, held, strict=True))
        a, b = (ours["global"][f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
        assert difference(b @ a, mean) < 1e-5
    held_out = [rows[i] for i in parts[1]["eval"]]
    loss = loss_of(tiny_folder, folder / "adapters" / "global", held_out)
    assert last["clients"][1]["global_loss"] == pytest.approx(loss, rel=1e-5)
    assert json.loads((folder / "config.json").read_text())["resolved"]["ranks"] == RANKS


def test_mixed_ranks_in_one_pass_are_the_separate_runs_of_each_rank(
    tiny_folder: Path, tmp_path: Path
) -> None:
    ranks = [4, 8, 64]
    sections = {"federated": {"method": "local"}, "train": {"optimizer": "adamw", "lr": 1e-3}}
    own = {"alpha": 16.0, "init": "independent"}
    together = runs.adapters(
        run(tiny_folder, tmp_path, "mixed", lora={**own, "rank": ranks}, **sections)
    )
    for client, rank in enumerate(ranks):
        alone = run(tiny_folder, tmp_path, f"r{rank}", lora={**own, "rank": rank}, **sections)
        for name, tensor in runs.adapters(alone)[NAMES[client]].items():
            assert tensor.abs().max() > 0
            # Sums over padded factors are added up in another order, and Adam goes by signs.
            assert difference(together[NAMES[client]][name], tensor) < 5e-4


@pytest.mark.dist
def test_mixed_ranks_depend_on_no_placement_and_no_resume(
    tiny_folder: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"clients": CLIENTS, "evaluation": {"every_rounds": 0}}
    two_of_three = {"clients_per_round": 2}
    whole = runs.adapters(run(tiny_folder, tmp_path, "whole", federated=two_of_three, **sections))
    rests = {**two_of_three, "clients_per_pass": 1}
    run(tiny_folder, tmp_path, "rests", federated={**rests, "num_rounds": 1}, **sections)
    resumed = run(tiny_folder, tmp_path, "rests", federated=rests, **sections)
    paged = run(tiny_folder, tmp_path, "paged", federated=rests, **sections)
    assert runs.identical(runs.adapters(resumed), runs.adapters(paged))
    assert runs.relative_difference(runs.adapters(paged), whole) < 1e-5
    run(tiny_folder, tmp_path, "two", 2, federated={**two_of_three, "num_rounds": 2}, **sections)
    two = run(tiny_folder, tmp_path, "two", 2, federated=two_of_three, **sections)
    assert runs.relative_difference(runs.adapters(two), whole) < 1e-5


@pytest.mark.dist
@pytest.mark.full
def test_mixed_ranks_batches_and_steps_keep_step_under_zero3(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Micro passes of the largest batch on every process, whatever its own clients have."""
    sections: dict[str, Any] = {"clients": CLIENTS, "train": {"micro_batch_size": 2}}
    whole = run(tiny_folder, tmp_path, "none", **sections)
    sharded = run(tiny_folder, tmp_path, "zero3", 2, backbone={"sharding": "zero3"}, **sections)
    assert runs.relative_difference(runs.adapters(sharded), runs.adapters(whole)) < 1e-4


def test_a_classifier_has_a_head_beside_factors_of_its_own_rank(
    glue_folder: Path, tmp_path: Path
) -> None:
    files = glue.save_rows(tmp_path / "rows.jsonl", "rte", 24)
    folder = run(
        tmp_path,
        tmp_path,
        "run",
        model={"name": str(glue_folder / "roberta")},
        data={"task": "glue", "name": "rte", "train_files": str(files)},
        lora={"rank": RANKS, "target_modules": ["query", "value"]},
        federated={"share_head": True, "clients_per_pass": 2, "num_rounds": 1},
    )
    found = runs.adapters(folder)
    for name, rank in zip([*NAMES, "global"], [*RANKS, max(RANKS)], strict=True):
        for key, tensor in found[name].items():
            if "lora_" in key:
                assert rank == tensor.shape["lora_B" in key]
            else:
                assert torch.equal(tensor, found["global"][key]) and tensor.any()
