"""Every method against a second implementation of it, and one test per known bug of others' code.

The reference below is written from the formulas alone: a deep copy of the model per client, plain
``nn.Parameter`` factors, ``torch.optim``, a mean. From the trainer it takes only which random
numbers A starts from and which examples are read when, which is not what is tested here.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
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
from sfed.methods import method as methods
from sfed.observability.console import Console
from sfed.utils.rng import Stream, derive
from tests.support import runs, tiny
from tests.support.reference import (
    Lora,
    cohorts_of,
    effective_n,
    mean,
    parts_of,
    read_rows,
    shares,
    tokenised,
)
from tests.support.selection import full, some_of

N, RANK, ALPHA, ROUNDS, STEPS, BATCH, CLIP = 3, 4, 2.0, 4, 2, 3, 0.5
SEED = 0  # of tiny.settings
NAMES = [f"client-{client:04d}" for client in range(N)]

# The table of the methods: what trains and what is averaged, one entry per round in turn; gamma;
# whether each client draws its own A (and all N are averaged before the first step).
Gamma = Callable[[float, float, float], float]
Adapters = dict[str, dict[str, torch.Tensor]]
TABLE: dict[str, tuple[tuple[str, ...], tuple[str, ...], Gamma, bool]] = {
    "sfed": (("AB",), ("A",), lambda alpha, n, r: alpha * math.sqrt(n / r), True),
    "fedsa": (("AB",), ("A",), lambda alpha, n, r: alpha / r, False),
    "fedsa-rslora": (("AB",), ("A",), lambda alpha, n, r: alpha / math.sqrt(r), False),
    "rolora": (("B", "A"), ("B", "A"), lambda alpha, n, r: alpha / r, False),
    "ffa": (("B",), ("B",), lambda alpha, n, r: alpha / r, False),
    "fedit": (("AB",), ("AB",), lambda alpha, n, r: alpha / r, False),
    "local": (("AB",), ("",), lambda alpha, n, r: alpha / r, False),
}
SHARING = [name for name in TABLE if name != "local"]
# Settings, largest difference relative to the largest number of a tensor, and the share of all
# numbers that must be as close. AdamW's first steps go by the sign of the gradient, even of one
# that is rounding alone (the reference in fp64 is then as far from itself in fp32).
OPTIMIZERS: dict[str, tuple[dict[str, Any], float, float]] = {
    "sgd": ({"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1}, 4e-6, 1.0),
    "adamw": ({"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}, 5e-4, 0.999),
}
DIRICHLET = {"kind": "dirichlet", "key": "kind", "concentration": 1.0}
SCENARIOS: dict[str, dict[str, dict[str, Any]]] = {
    "uniform": {"partition": DIRICHLET},
    "by-examples": {"partition": DIRICHLET, "federated": {"weighting": "examples"}},
    "two-of-three": {"federated": {"clients_per_round": 2}},
    "two-of-three-by-examples": {
        "partition": {"kind": "by_key", "key": "kind"},
        "federated": {"clients_per_round": 2, "weighting": "examples"},
    },
    "one-per-pass": {"federated": {"clients_per_pass": 1}},
}


def run(folder: Path, out: Path, method: str, **sections: dict[str, Any]) -> Path:
    """Train in this process and return the run folder; ``sections`` go over the settings here."""
    base: dict[str, dict[str, Any]] = {
        "lora": {"rank": RANK, "alpha": ALPHA},
        "federated": {"num_clients": N, "num_rounds": ROUNDS, "method": method},
        "train": {"local_steps": STEPS, "batch_size": BATCH, "max_grad_norm": CLIP},
        "output": {"dir": str(out), "name": "run", "checkpoint_every_rounds": ROUNDS},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}
    settings = tiny.settings(folder, **merged)
    session.run_session(config_load.validate(settings))
    return Path(settings["output"]["dir"]) / settings["output"]["name"]


def adapted_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers but the head, in sorted order of their names."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    return dict(sorted(found.items()))


def first_a(model: nn.Module, *words: int) -> dict[str, torch.Tensor]:
    """The draw of these seed words: uniform in +-1/sqrt(in), layer after layer."""
    generator = torch.Generator().manual_seed(derive(Stream.INIT_A, *words))
    return {
        name: torch.empty(RANK, layer.in_features).uniform_(
            -(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator
        )
        for name, layer in adapted_layers(model).items()
    }


class Client:
    """One client of the reference: its own model, factors, optimizer and place in its data."""

    def __init__(
        self, model: nn.Module, a: dict[str, torch.Tensor], gamma: float, train: dict[str, Any]
    ) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.layers: dict[str, Lora] = {}
        for name, layer in adapted_layers(self.model).items():
            self.layers[name] = Lora(layer, a[name], gamma)
            self.model.set_submodule(name, self.layers[name])
        self.settings, self.position = train, 0
        self.forget()

    def forget(self) -> None:
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.settings["optimizer"]]
        # For SGD without momentum, L2 and decoupled weight decay are one formula.
        lr, decay = self.settings["lr"], self.settings["weight_decay"]
        self.optimizer = kind(self.factors("AB"), lr=lr, weight_decay=decay)

    def factors(self, which: str) -> list[nn.Parameter]:
        return [getattr(layer, factor) for layer in self.layers.values() for factor in which]

    def train_round(self, trained: str, rows: list[tuple[list[int], int]], order: Order) -> None:
        for parameter in self.factors("AB"):
            parameter.requires_grad_(False)
        for parameter in self.factors(trained):
            parameter.requires_grad_(True)
        for _ in range(STEPS):
            batch = [rows[order.at(self.position + i)] for i in range(BATCH)]
            self.position += BATCH
            self.optimizer.zero_grad(set_to_none=True)  # torch.optim skips what has no gradient
            mean_loss(self.model, batch).backward()
            nn.utils.clip_grad_norm_(self.factors(trained), CLIP)
            self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"base_model.model.{name}.lora_{factor}.weight": getattr(layer, factor).detach()
            for name, layer in self.layers.items()
            for factor in "AB"
        }


def mean_loss(model: nn.Module, batch: list[tuple[list[int], int]]) -> torch.Tensor:
    """Transformers' own loss: the mean over all supervised tokens of the batch."""
    width = max(len(ids) for ids, _ in batch)
    input_ids = torch.tensor([ids + [1] * (width - len(ids)) for ids, _ in batch])
    labels = torch.full_like(input_ids, -100)
    for i, (ids, prompt_length) in enumerate(batch):
        labels[i, prompt_length : len(ids)] = input_ids[i, prompt_length : len(ids)]
    return model(input_ids=input_ids, labels=labels).loss


def load_model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "model").requires_grad_(False)


def start(model: nn.Module, p: list[float], *, independent: bool) -> dict[str, torch.Tensor]:
    """The first A, the same for all: one draw, or the mean of one draw per client."""
    if not independent:
        return first_a(model, SEED)
    draws = [first_a(model, SEED, client) for client in range(N)]
    return {name: mean(p, [draw[name] for draw in draws]) for name in draws[0]}


def mean_of_all(p: list[float], adapters: Adapters) -> dict[str, torch.Tensor]:
    """(A, mean B): A is the same on all clients."""
    return {k: mean(p, [adapters[name][k] for name in NAMES]) for k in adapters[NAMES[0]]}


def reference(
    folder: Path,
    method: str,
    parts: list[dict[str, Any]],
    cohorts: list[list[int]],
    train: dict[str, Any],
    *,
    by_examples: bool,
    reset: bool,
) -> Adapters:
    """The adapters that the formulas give, under the names of the exported ones."""
    trained, averaged, gamma_of, independent = TABLE[method]
    model, rows = load_model(folder), tokenised(folder)
    everyone = list(range(N))
    p = shares(parts, everyone, by_examples=by_examples)
    gamma = gamma_of(ALPHA, effective_n(p), RANK)
    a = start(model, p, independent=independent)
    clients = [Client(model, a, gamma, train) for _ in everyone]
    own_rows = [[rows[i] for i in part["train"]] for part in parts]
    orders = [Order(SEED, c, len(own_rows[c])) for c in everyone]

    for t, cohort in enumerate(cohorts):
        for c in cohort:
            clients[c].train_round(trained[t % len(trained)], own_rows[c], orders[c])
        p_t = shares(parts, cohort, by_examples=by_examples)
        which = averaged[t % len(averaged)]
        for same in zip(*(client.factors(which) for client in clients), strict=True):
            new = mean(p_t, [same[c] for c in cohort])
            for parameter in same:  # of all clients, also of those that are out
                parameter.data.copy_(new)
        if reset:
            for client in clients:
                client.forget()

    adapters = {NAMES[c]: clients[c].tensors() for c in everyone}
    return adapters if method == "local" else {**adapters, "global": mean_of_all(p, adapters)}


def test_every_method_has_a_reference() -> None:
    """Those that work on products have theirs in test_product_methods."""
    of_products = {"flexlora", "fedex", "flora", "hetlora"}
    assert TABLE.keys() | of_products == methods.METHODS.keys()


def difference(expected: Adapters, ours: Adapters, share: float) -> float:
    """The relative difference that this share of each client's numbers stays within."""
    assert expected.keys() == ours.keys()
    worst = 0.0
    for name, tensors in expected.items():
        assert tensors.keys() == ours[name].keys()
        scales = {key: max(float(t.abs().max()), 1e-12) for key, t in tensors.items()}
        apart = [((t - ours[name][k]).abs() / scales[k]).flatten() for k, t in tensors.items()]
        worst = max(worst, float(torch.cat(apart).quantile(share)))
    return worst


def trained_and_expected(
    folder: Path, out: Path, method: str, train: dict[str, Any], **over: dict[str, Any]
) -> tuple[Adapters, Adapters]:
    """The adapters of a run, and those that the reference gives for the same cohorts and data."""
    quick = {"every_rounds": ROUNDS, "max_examples": 1}
    run_folder = run(folder, out, method, **over, train=train, evaluation=quick)
    parts, cohorts = parts_of(run_folder), cohorts_of(run_folder)
    federated = over.get("federated", {})
    assert [len(c) for c in cohorts] == [federated.get("clients_per_round", N)] * ROUNDS
    expected = reference(
        folder,
        method,
        parts,
        cohorts,
        train,
        by_examples=federated.get("weighting") == "examples",
        reset=federated.get("optimizer_state") == "reset",
    )
    return runs.adapters(run_folder), expected


def cases() -> Iterator[Any]:
    """Methods x scenarios x optimizers.

    The test command has every method with both optimizers, and weighted with some clients out; and
    every scenario for a method that shares A alone and for one that shares A and B.
    """
    for case in itertools.product(TABLE, SCENARIOS, OPTIMIZERS):
        method, scenario, optimizer = case
        is_simple = scenario == "uniform"
        is_whole = optimizer == "sgd" and scenario == "two-of-three-by-examples"
        is_of_a_kind = optimizer == "sgd" and method in ("sfed", "fedit")
        yield case if is_simple or is_whole or is_of_a_kind else full(*case)


@pytest.mark.parametrize(("method", "scenario", "optimizer"), cases())
def test_a_whole_run_equals_the_reference(
    tiny_folder: Path, tmp_path: Path, method: str, scenario: str, optimizer: str
) -> None:
    train, tolerance, share = OPTIMIZERS[optimizer]
    ours, expected = trained_and_expected(
        tiny_folder, tmp_path, method, train, **SCENARIOS[scenario]
    )
    assert difference(expected, ours, share) <= tolerance


@pytest.mark.parametrize("method", TABLE)
def test_a_run_with_a_fresh_optimizer_each_round_equals_the_reference(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    federated = {"optimizer_state": "reset"}
    train, tolerance, _ = OPTIMIZERS["adamw"]
    ours, expected = trained_and_expected(tiny_folder, tmp_path, method, train, federated=federated)
    # A fresh Adam steps by the sign of a gradient: round-off matters where that is nearly 0.
    assert difference(expected, ours, share=0.99) <= 2 * tolerance


# --- bugs of public reference code, one test each ----------------------------------------------


def files_per_client(folder: Path, seeds: list[int], counts: list[int]) -> dict[str, Any]:
    """Sections for one training and one held-out file per client; lengths depend on no seed."""
    folder.mkdir()
    for client, (seed, count) in enumerate(zip(seeds, counts, strict=True)):
        tiny.save_rows(folder / f"rows-{client}.jsonl", count, seed=seed)
        tiny.save_rows(folder / f"held-{client}.jsonl", 4, seed=seed)
    patterns = {
        "train_files": str(folder / "rows-{client}.jsonl"),
        "eval_files": str(folder / "held-{client}.jsonl"),
    }
    return {"data": patterns, "partition": {"kind": "by_file"}}


@pytest.mark.parametrize("clients_per_pass", [1, 3])
@pytest.mark.parametrize(("method", "rounds"), [("sfed", 1), ("fedsa", 1), ("local", 3)])
def test_bug_b_leaks_from_one_client_to_the_next(
    tiny_folder: Path, tmp_path: Path, method: str, rounds: int, clients_per_pass: int
) -> None:
    """Nothing of B depends on another client's data before a shared factor has carried it over."""
    federated = {"num_rounds": rounds, "clients_per_pass": clients_per_pass}
    found = []
    for name, seeds in (("one", [1, 2, 3]), ("two", [7, 2, 3])):
        sections = files_per_client(tmp_path / name, seeds, [9, 12, 15])
        folder = run(tiny_folder, tmp_path / name, method, **sections, federated=federated)
        found.append(runs.adapters(folder))
    for client, same in zip(NAMES, (False, True, True), strict=True):
        for key, b in runs.factors(found[0][client], "B").items():
            assert torch.equal(b, found[1][client][key]) == same


def test_bug_who_is_out_loses_b_or_misses_the_new_a(tiny_folder: Path, tmp_path: Path) -> None:
    """Each round leaves B of who is out as it was, bit for bit, and all have the same new A."""
    federated = {"clients_per_round": 2}
    folders = [
        run(
            tiny_folder,
            tmp_path / str(rounds),
            "sfed",
            federated={**federated, "num_rounds": rounds},
        )
        for rounds in range(1, ROUNDS + 1)
    ]
    for before, after in itertools.pairwise(folders):
        old, new, inside = runs.adapters(before), runs.adapters(after), cohorts_of(after)[-1]
        for client, name in enumerate(NAMES):
            for key, b in runs.factors(old[name], "B").items():
                assert torch.equal(b, new[name][key]) == (client not in inside)
            for key, a in runs.factors(new[NAMES[0]], "A").items():
                assert torch.equal(a, new[name][key])
                assert not torch.equal(a, old[name][key])


@pytest.mark.parametrize("method", some_of(TABLE, "sfed", "rolora", "fedit"))
def test_bug_results_depend_on_the_order_of_the_clients(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    """Full batches, so that only the numbering differs: the results are renumbered, no more."""
    # Independent draws of A belong to the numbers: only their uniform mean is the same.
    weighting = "uniform" if TABLE[method][3] else "examples"
    seeds, counts = [1, 2, 3], [9, 12, 15]
    train = {**OPTIMIZERS["sgd"][0], "local_steps": None, "local_epochs": 1, "batch_size": 16}
    found = []
    for name, order in (("straight", [0, 1, 2]), ("turned", [2, 0, 1])):
        sections = files_per_client(
            tmp_path / name, [seeds[i] for i in order], [counts[i] for i in order]
        )
        federated = {"weighting": weighting, "clients_per_pass": 2}
        folder = run(
            tiny_folder, tmp_path / name, method, **sections, train=train, federated=federated
        )
        adapters = runs.adapters(folder)
        renumbered = {NAMES[i]: adapters[NAMES[place]] for place, i in enumerate(order)}
        found.append({**adapters, **renumbered})
    assert runs.relative_difference(*found) <= 2e-6


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("method", ["fedsa", "fedit"])
def test_bug_only_client_0_survives_the_mean(
    tiny_folder: Path, tmp_path: Path, method: str, weighting: str
) -> None:
    """Training that shares nothing gives the summands of the first mean: no client is missing."""
    sections = {"partition": {"kind": "by_key", "key": "kind"}, "train": OPTIMIZERS["sgd"][0]}
    federated = {"num_rounds": 1, "weighting": weighting}
    ours = run(tiny_folder, tmp_path / "shared", method, **sections, federated=federated)
    alone = run(tiny_folder, tmp_path / "alone", "local", **sections, federated=federated)
    p = shares(parts_of(ours), list(range(N)), by_examples=weighting == "examples")
    assert (len(set(p)) > 1) == (weighting == "examples")
    adapters, summands = runs.adapters(ours), runs.adapters(alone)
    for factor in TABLE[method][1][0]:
        for key in runs.factors(adapters[NAMES[0]], factor):
            expected = mean(p, [summands[name][key] for name in NAMES])
            bound = 2e-6 * float(expected.abs().max())
            for name in NAMES:
                torch.testing.assert_close(adapters[name][key], expected, rtol=0.0, atol=bound)


def merged(model: nn.Module, tensors: dict[str, torch.Tensor], gamma: float) -> nn.Module:
    """W0 + gamma B A in every adapted layer of a copy."""
    model = copy.deepcopy(model)
    for name, layer in adapted_layers(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
        layer.weight.data += gamma * b @ a
    return model


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: list[tuple[list[int], int]]) -> tuple[float, int]:
    """(summed loss, supervised tokens)."""
    tokens = sum(len(ids) - prompt_length for ids, prompt_length in rows)
    return float(mean_loss(model, rows)) * tokens, tokens


@pytest.mark.parametrize("method", TABLE)
def test_bug_alpha_over_r_is_missing(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    """Losses and exported factors are those of W0 + gamma B A, gamma by the method's formula."""
    folder = run(tiny_folder, tmp_path, method)
    adapters, parts, last = runs.adapters(folder), parts_of(folder), runs.rounds(folder)[-1]
    gamma = TABLE[method][2](ALPHA, N, RANK)
    model, rows = load_model(tiny_folder), tokenised(tiny_folder)
    held = [[rows[i] for i in part["eval"]] for part in parts]
    for client, name in enumerate(NAMES):
        loss, tokens = held_out_loss(merged(model, adapters[name], gamma), held[client])
        assert last["clients"][client]["personal_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    for name in adapters:
        config = json.loads((runs.adapter_paths(folder)[name] / "adapter_config.json").read_text())
        assert config["use_rslora"] is False and config["r"] == RANK
        assert config["lora_alpha"] / config["r"] == pytest.approx(gamma, rel=1e-12)
    if "global" in adapters:
        everyone = merged(model, adapters["global"], gamma)
        sums = [held_out_loss(everyone, some) for some in held]
        loss = sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)
        assert last["eval/global_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("clients_per_pass", [1, 2, 3])
def test_bug_a_client_is_evaluated_with_the_b_of_another(
    tiny_folder: Path, tmp_path: Path, clients_per_pass: int
) -> None:
    federated = {"clients_per_pass": clients_per_pass, "clients_per_round": 2}
    train = {"optimizer": "adamw", "lr": 0.02}
    sections = {"partition": {"kind": "by_key", "key": "kind"}, "train": train}
    folder = run(tiny_folder, tmp_path, "sfed", **sections, federated=federated)
    adapters, parts, last = runs.adapters(folder), parts_of(folder), runs.rounds(folder)[-1]
    model, rows = load_model(tiny_folder), tokenised(tiny_folder)
    gamma = ALPHA * math.sqrt(N / RANK)
    models = [merged(model, adapters[name], gamma) for name in NAMES]
    for client, part in enumerate(parts):
        sums = [held_out_loss(one, [rows[i] for i in part["eval"]]) for one in models]
        reported = last["clients"][client]["personal_loss"]
        for other, (loss, tokens) in enumerate(sums):
            own = abs(reported - loss / tokens) <= 1e-5 * reported
            assert own == (other == client), "evaluated with another client's adapter"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bug_the_first_rolora_round_is_a_no_op(
    tiny_folder: Path, tmp_path: Path, optimizer: str
) -> None:
    folder = run(
        tiny_folder,
        tmp_path,
        "rolora",
        train=OPTIMIZERS[optimizer][0],
        federated={"num_rounds": 1},
    )
    for tensors in runs.adapters(folder).values():
        assert all(bool(b.any()) for b in runs.factors(tensors, "B").values())
    before, after = runs.rounds(folder)
    assert after["adapter/first_grad_norm"] > 0
    assert after["eval/loss"] != before["eval/loss"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["rolora", "ffa"])
def test_bug_weight_decay_moves_a_frozen_factor(
    tiny_folder: Path, tmp_path: Path, method: str, optimizer: str
) -> None:
    """What does not train in a round has the same bits before and after it."""
    train = {**OPTIMIZERS[optimizer][0], "weight_decay": 0.5}
    draw = first_a(load_model(tiny_folder), SEED)
    before = {
        name: {f"base_model.model.{layer}.lora_A.weight": a for layer, a in draw.items()}
        for name in [*NAMES, "global"]
    }
    for t in range(3):
        federated = {"num_rounds": t + 1}
        folder = run(tiny_folder, tmp_path / str(t), method, train=train, federated=federated)
        after = runs.adapters(folder)
        trained = TABLE[method][0][t % len(TABLE[method][0])]
        for name in NAMES:
            for key, tensor in before[name].items():
                moved = f".lora_{trained}." in key
                assert torch.equal(tensor, after[name][key]) != moved, (t, key)
        before = after


@pytest.mark.parametrize("init", ["shared", "independent"])
def test_bug_a_of_ffa_differs_between_clients(tiny_folder: Path, tmp_path: Path, init: str) -> None:
    lora = {"rank": RANK, "alpha": ALPHA, "init": init}
    federated = {"clients_per_pass": 1}
    adapters = runs.adapters(run(tiny_folder, tmp_path, "ffa", lora=lora, federated=federated))
    for key, a in runs.factors(adapters[NAMES[0]], "A").items():
        assert all(torch.equal(a, adapters[name][key]) for name in NAMES)
    draws = [
        first_a(load_model(tiny_folder), SEED, *([c] if init != "shared" else [])) for c in range(N)
    ]
    for layer in draws[0]:
        first = mean([1 / N] * N, [draw[layer] for draw in draws])
        ours = adapters[NAMES[0]][f"base_model.model.{layer}.lora_A.weight"]
        torch.testing.assert_close(ours, first, rtol=0.0, atol=1e-7)


def by_kind(rows: list[dict[str, str]], indices: list[int]) -> Counter[str]:
    return Counter(rows[i]["kind"] for i in indices)


@pytest.mark.parametrize("held_out", ["own file", "part of the training data"])
def test_bug_held_out_data_is_unrelated_to_the_training_data(
    tiny_folder: Path, tmp_path: Path, held_out: str
) -> None:
    """Under a label skew each client's held-out labels follow its own training labels."""
    tiny.save_rows(tmp_path / "train.jsonl", 1200, kinds=4)
    tiny.save_rows(tmp_path / "held.jsonl", 400, seed=5, kinds=4)
    data: dict[str, Any] = {"train_files": str(tmp_path / "train.jsonl"), "max_tokens": 64}
    if held_out == "own file":
        data["eval_files"] = str(tmp_path / "held.jsonl")
    sections = {"data": data, "partition": {**DIRICHLET, "concentration": 0.5}}
    federated = {"num_rounds": 1}
    parts = parts_of(run(tiny_folder, tmp_path, "local", **sections, federated=federated))
    train_rows = read_rows(tmp_path, "train.jsonl")
    held_rows = read_rows(tmp_path, "held.jsonl") if held_out == "own file" else train_rows
    train = [by_kind(train_rows, part["train"]) for part in parts]
    held = [by_kind(held_rows, part["eval"]) for part in parts]
    for client, part in enumerate(parts):
        assert part["labels"] is not None
        if held_out != "own file":
            assert not set(part["train"]) & set(part["eval"])
        distances = [
            sum(
                abs(held[client][kind] / held[client].total() - other[kind] / other.total())
                for kind in other | held[client]
            )
            / 2
            for other in train
        ]
        assert distances[client] <= 0.1, "total variation distance to the own training data"
        assert distances[client] == min(distances)
        assert sorted(distances)[1] > 2 * distances[client]


def test_bug_the_best_round_is_reported_instead_of_the_last(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[dict[str, Any], dict[str, Any]]] = []
    monkeypatch.setattr(
        Console, "closing_table", lambda _self, before, after, _names: shown.append((before, after))
    )
    train = {"optimizer": "adamw", "lr": 0.2}
    events = runs.rounds(run(tiny_folder, tmp_path, "fedsa", train=train))
    best = min(events, key=lambda event: event["eval/loss"])
    assert best["eval/loss"] < events[-1]["eval/loss"], "this run should get worse"
    assert shown == [(events[0], events[-1])]
    assert events[-1]["round"] == ROUNDS


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("method", SHARING)
def test_the_global_adapter_is_the_mean_of_the_clients_by_stock_peft(
    tiny_folder: Path, tmp_path: Path, method: str, weighting: str
) -> None:
    """An outside oracle: PEFT's "cat" is sum_i p_i gamma B_i A_i, whatever the A_i are."""
    partition = {"kind": "by_key", "key": "kind"}
    federated = {"weighting": weighting}
    folder = run(tiny_folder, tmp_path, method, partition=partition, federated=federated)
    p = shares(parts_of(folder), list(range(N)), by_examples=weighting == "examples")
    gamma = TABLE[method][2](ALPHA, effective_n(p), RANK)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    stock = PeftModel.from_pretrained(base, folder / "adapters" / "global", adapter_name="ours")
    for name in NAMES:
        stock.load_adapter(runs.adapter_paths(folder)[name], adapter_name=name)
    stock.add_weighted_adapter(NAMES, p, "sum", combination_type="cat")
    layers = [m for m in stock.modules() if hasattr(m, "get_delta_weight")]
    assert len(layers) == 14
    for layer in layers:
        expected = layer.get_delta_weight("sum")
        bound = 2e-6 * float(expected.abs().max())
        assert layer.scaling["ours"] == pytest.approx(gamma, rel=1e-12)
        ours = layer.get_delta_weight("ours")
        torch.testing.assert_close(ours, expected, rtol=0.0, atol=bound)
