"""Classification: a head per client beside its adapter, against transformers, PEFT and torch.optim.

The reference is a second implementation from the formulas: a deep copy of transformers' classifier
per client, plain factors, its own loss by ``labels=``. From the trainer it takes only which random
numbers A and the head start from and which examples are read when.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from sfed.config import load as config_load
from sfed.data import tasks
from sfed.data.batches import Order, collate
from sfed.distributed import world as distributed
from sfed.federated import export as federated_export
from sfed.federated import local, session
from sfed.lora.head import StackedHead
from sfed.models import backbone
from sfed.utils.errors import UserError
from sfed.utils.rng import Stream, derive
from tests.support import glue, runs
from tests.support.counting import counted_run
from tests.support.deadlines import RUN_SECONDS
from tests.support.glue import ALPHA, BATCH, CLIP, HEADS, NAMES, RANK, ROUNDS, SGD, STEPS, N
from tests.support.processes import on_processes
from tests.support.reference import Lora, cohorts_of, effective_n, mean, parts_of, shares
from tests.support.selection import full, some_of

SEED = 0
FAMILIES = list(HEADS)
SHARING = ["sfed", "fedsa", "fedit"]
every_family = pytest.mark.parametrize("family", FAMILIES)
whose_head = pytest.mark.parametrize("share_head", [False, True], ids=["own head", "shared head"])


@pytest.fixture
def folder(glue_folder: Path) -> Path:
    return glue_folder


def heads(tensors: runs.Tensors) -> runs.Tensors:
    """What is neither A nor B."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}


def moved(one: runs.Tensors, other: runs.Tensors) -> set[str]:
    """Names of the tensors that are not the same bit for bit."""
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


# --- the stacked head ----------------------------------------------------------------------------


def stacked_head(family: str) -> tuple[nn.Module, torch.Tensor]:
    """A family's head, and what reaches it for three clients with four rows each."""
    torch.manual_seed(0)
    if family == "bert":
        return nn.Linear(6, 3), torch.randn(12, 6)
    if family == "llama":
        return nn.Linear(6, 3, bias=False), torch.randn(12, 5, 6)
    config = RobertaConfig(hidden_size=6, num_labels=3, hidden_dropout_prob=0.3)
    return RobertaClassificationHead(config), torch.randn(12, 5, 6)


@every_family
def test_a_pass_of_many_clients_gives_each_the_outputs_and_gradients_of_its_own_head(family):
    template, x = stacked_head(family)
    names = dict(template.named_parameters())
    alone = [copy.deepcopy(template).eval() for _ in range(3)]
    for number, head in enumerate(alone):
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.5 + number)
    layer = StackedHead(template)
    weights = {
        name: torch.stack([head.get_parameter(name).detach() for head in alone]).requires_grad_()
        for name in names
    }
    layer.bind(weights)
    x.requires_grad_()
    y = layer(x)
    direction = torch.randn_like(y)
    y.backward(direction)
    for number, head in enumerate(alone):
        rows = slice(4 * number, 4 * number + 4)
        own = x.detach()[rows].requires_grad_()
        expected = head(own)
        expected.backward(direction[rows])
        torch.testing.assert_close(y[rows], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad[rows], own.grad, rtol=1e-6, atol=1e-6)
        for name in names:
            ours = weights[name].grad[number]
            torch.testing.assert_close(ours, head.get_parameter(name).grad, rtol=2e-6, atol=2e-6)


@every_family
def test_a_head_computes_in_the_dtype_of_its_input_and_owns_nothing(family):
    template, x = stacked_head(family)
    layer = StackedHead(template)
    layer.bind({n: p.detach()[None].clone() for n, p in template.named_parameters()})
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert list(layer.parameters()) == [] and list(layer.children()) == []


# --- the reference -------------------------------------------------------------------------------

GAMMA = {
    "sfed": lambda n: ALPHA * math.sqrt(n / RANK),
    "fedsa": lambda n: ALPHA / RANK,
    "fedit": lambda n: ALPHA / RANK,
    "rolora": lambda n: ALPHA / RANK,
    "ffa": lambda n: ALPHA / RANK,
}
TRAINED = {"sfed": ("AB",), "fedsa": ("AB",), "fedit": ("AB",), "rolora": ("B", "A"), "ffa": ("B",)}
AVERAGED = {"sfed": ("A",), "fedsa": ("A",), "fedit": ("AB",), "rolora": ("B", "A"), "ffa": ("B",)}


def adapted_layers(model: nn.Module, family: str) -> dict[str, nn.Linear]:
    """All linear layers but those of the head, in sorted order of their names."""
    return {
        name: module
        for name, module in sorted(model.named_modules())
        if isinstance(module, nn.Linear) and not name.startswith(HEADS[family])
    }


def first_a(model: nn.Module, family: str, *words: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(derive(Stream.INIT_A, *words))
    return {
        name: torch.empty(RANK, layer.in_features).uniform_(
            -(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator
        )
        for name, layer in adapted_layers(model, family).items()
    }


def first_head(model: nn.Module, family: str) -> dict[str, torch.Tensor]:
    """The one draw that all heads start from: weights normal, biases 0, as transformers does."""
    generator = torch.Generator().manual_seed(derive(Stream.INIT_HEAD, SEED))
    std = model.config.initializer_range
    return {
        name: torch.zeros(p.shape)
        if p.dim() == 1
        else torch.empty(p.shape).normal_(0.0, std, generator=generator)
        for name, p in sorted(model.get_submodule(HEADS[family]).named_parameters())
    }


class Client:
    """One client of the reference: its own classifier, factors and place in its data."""

    def __init__(self, model: nn.Module, family: str, a: dict[str, torch.Tensor], gamma: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.head_name, self.head = HEADS[family], self.model.get_submodule(HEADS[family])
        self.head.load_state_dict(first_head(model, family))
        self.layers = {}
        for name, layer in adapted_layers(self.model, family).items():
            self.layers[name] = Lora(layer, a[name], gamma)
            self.model.set_submodule(name, self.layers[name])
        self.model.double()  # so that round-off is the trainer's alone
        self.position = 0

    def parameters(self, which: str) -> list[nn.Parameter]:
        """A and B of all layers, and H for the head."""
        found = [getattr(layer, f) for layer in self.layers.values() for f in which if f != "H"]
        return found + (list(self.head.parameters()) if "H" in which else [])

    def train_round(self, trained: str, encoder: glue.Encoder, rows: list, order: Order) -> None:
        for parameter in self.parameters("ABH"):
            parameter.requires_grad_(False)
        own = self.parameters(trained + "H")
        for parameter in own:
            parameter.requires_grad_(True)
        # For SGD without momentum, L2 and decoupled weight decay are one formula.
        optimizer = torch.optim.SGD(own, lr=SGD["lr"], weight_decay=SGD["weight_decay"])
        for _ in range(STEPS):
            batch = [rows[order.at(self.position + i)] for i in range(BATCH)]
            self.position += BATCH
            optimizer.zero_grad()
            encoder.loss(self.model, batch).backward()
            nn.utils.clip_grad_norm_(own, CLIP)
            optimizer.step()

    def tensors(self) -> runs.Tensors:
        factors = {
            f"base_model.model.{name}.lora_{factor}.weight": getattr(layer, factor).detach()
            for name, layer in self.layers.items()
            for factor in "AB"
        }
        head = {
            f"base_model.model.{self.head_name}.{name}": parameter.detach()
            for name, parameter in self.head.named_parameters()
        }
        return factors | head


def reference(
    folder: Path,
    family: str,
    name: str,
    run_folder: Path,
    *,
    method: str = "sfed",
    share_head: bool = False,
    by_examples: bool = False,
) -> dict[str, runs.Tensors]:
    """The adapters and heads that the formulas give for the same cohorts and data."""
    parts, cohorts = parts_of(run_folder), cohorts_of(run_folder)
    model, encoder = glue.load_model(folder, family, name), glue.Encoder(folder, family, name)
    rows = glue.read(folder / f"{name}-train.jsonl")
    p = shares(parts, list(range(N)), by_examples=by_examples)
    a = first_a(model, family, SEED)
    if method == "sfed":
        draws = [first_a(model, family, SEED, client) for client in range(N)]
        a = {layer: mean(p, [draw[layer] for draw in draws]) for layer in a}
    gamma = GAMMA[method](effective_n(p))
    clients = [Client(model, family, a, gamma) for _ in range(N)]
    own_rows = [[rows[i] for i in part["train"]] for part in parts]
    orders = [Order(SEED, c, len(own_rows[c])) for c in range(N)]
    for t, cohort in enumerate(cohorts):
        for c in cohort:
            which = TRAINED[method][t % len(TRAINED[method])]
            clients[c].train_round(which, encoder, own_rows[c], orders[c])
        p_t = shares(parts, cohort, by_examples=by_examples)
        which = AVERAGED[method][t % len(AVERAGED[method])] + ("H" if share_head else "")
        for same in zip(*(client.parameters(which) for client in clients), strict=True):
            new = mean(p_t, [same[c] for c in cohort])
            for parameter in same:
                parameter.data.copy_(new)
    adapters = {NAMES[c]: clients[c].tensors() for c in range(N)}
    overall = {k: mean(p, [adapters[c][k] for c in NAMES]) for k in adapters[NAMES[0]]}
    return {**adapters, "global": overall}


def assert_equals_the_reference(
    folder: Path, family: str, name: str, out: Path, method: str = "sfed", **federated: Any
) -> None:
    run_folder = glue.run(
        folder,
        family,
        name,
        out,
        federated={"method": method, **federated},
        evaluation={"every_rounds": ROUNDS, "max_examples": 1},
    )
    expected = reference(
        folder,
        family,
        name,
        run_folder,
        method=method,
        share_head=federated.get("share_head", False),
        by_examples=federated.get("weighting") == "examples",
    )
    ours = runs.adapters(run_folder)
    head = heads(ours[NAMES[0]])
    assert head and {key.split(".")[2] for key in head} == {HEADS[family]}
    # Where B is still small fp32's round-off shows: mostly 1e-6.
    assert runs.relative_difference(expected, ours) <= 8e-6


@whose_head
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("roberta", method) for method in SHARING),
        *(("bert", "sfed"), full("bert", "fedsa"), full("bert", "fedit")),
        *(full("llama", "sfed"), full("llama", "fedsa"), ("llama", "fedit")),
    ],
)
def test_a_whole_run_equals_the_reference(folder, tmp_path, family, method, share_head):
    assert_equals_the_reference(folder, family, "mnli", tmp_path, method, share_head=share_head)


@whose_head
@pytest.mark.parametrize("method", SHARING)
def test_a_run_weighted_by_examples_equals_the_reference(folder, tmp_path, method, share_head):
    federated = {"share_head": share_head, "weighting": "examples"}
    assert_equals_the_reference(folder, "roberta", "mnli", tmp_path, method, **federated)
    counts = {len(part["train"]) for part in parts_of(tmp_path / "run")}
    assert len(counts) > 1, "equal counts would show nothing"


@whose_head
@pytest.mark.parametrize("method", ["rolora", "ffa"])
def test_heads_train_in_every_round_whatever_factor_does(folder, tmp_path, method, share_head):
    assert_equals_the_reference(folder, "roberta", "rte", tmp_path, method, share_head=share_head)


@pytest.mark.parametrize(("family", "name"), [*((f, "stsb") for f in FAMILIES), ("bert", "sst2")])
def test_values_and_single_texts_equal_the_reference(folder, tmp_path, family, name):
    assert_equals_the_reference(folder, family, name, tmp_path, "fedsa")


@whose_head
@pytest.mark.parametrize("clients_per_pass", [1, 2])
def test_a_run_of_some_clients_on_few_passes_equals_the_reference(
    folder, tmp_path, clients_per_pass, share_head
):
    federated = {
        "clients_per_round": 2,
        "clients_per_pass": clients_per_pass,
        "share_head": share_head,
        "weighting": "examples",
        "num_rounds": 3,
    }
    assert_equals_the_reference(folder, "bert", "mnli", tmp_path, "sfed", **federated)


# --- whose head is whose -------------------------------------------------------------------------


@whose_head
def test_who_is_out_of_a_round_keeps_head_and_b_and_receives_what_is_shared(
    folder, tmp_path, share_head
):
    federated = {"clients_per_round": 2, "share_head": share_head}
    for rounds in (1, 2, 3):
        out = tmp_path / str(rounds)
        own = {**federated, "num_rounds": rounds}
        glue.run(folder, "roberta", "mnli", out, federated=own)
    for before, after in ((1, 2), (2, 3)):
        old = runs.adapters(tmp_path / str(before) / "run")
        new = runs.adapters(tmp_path / str(after) / "run")
        cohort = cohorts_of(tmp_path / str(after) / "run")[-1]
        assert len(cohort) == 2
        for client, name in enumerate(NAMES):
            for key, tensor in new[name].items():
                is_shared = ".lora_A." in key or (share_head and ".lora_" not in key)
                same = torch.equal(tensor, old[name][key])
                assert same == (client not in cohort and not is_shared), (name, key)
                if is_shared:
                    assert torch.equal(tensor, new[NAMES[0]][key])


def test_heads_start_equal_and_none_learns_from_another_client(folder, tmp_path):
    """Client 0's data differ between two runs: the heads of the others do not, bit for bit."""
    found = []
    for number, seeds in enumerate(([1, 2, 3], [7, 2, 3])):
        own = tmp_path / str(number)
        own.mkdir()
        for client, seed in enumerate(seeds):
            # Lengths, and so the padding of a pass, are the same for every seed.
            rows = [
                {"premise": f"{seed} {'abc'[i % 3]}", "hypothesis": "x" * (i % 4), "label": i % 3}
                for i in range(8)
            ]
            glue.save(own / f"rows-{client}.jsonl", rows)
        sections = {
            "data": {"train_files": str(own / "rows-{client}.jsonl"), "eval_files": None},
            "partition": {"kind": "by_file"},
            "federated": {"num_rounds": 1},
        }
        found.append(runs.adapters(glue.run(folder, "roberta", "mnli", own, **sections)))
    one, other = found
    assert set(heads(one[NAMES[0]])) <= moved(one[NAMES[0]], other[NAMES[0]])
    for name in NAMES[1:]:
        assert not moved(heads(one[name]), other[name])
        assert set(heads(one[name])) <= moved(one[name], one[NAMES[0]])


@pytest.mark.parametrize("method", ["sfed", "local"])
def test_the_first_head_is_the_same_on_all_clients_whatever_the_method(
    folder, tmp_path, monkeypatch, method
):
    """Independent draws are A's alone."""
    firsts = []
    original = local.train

    def train(run: Any, *arguments: Any) -> Any:
        columns = run.clients.layout.columns("head")
        firsts.append(run.clients.load_values(run.clients.own)[:, columns].clone())
        return original(run, *arguments)

    monkeypatch.setattr(local, "train", train)
    glue.run(folder, "roberta", "mnli", tmp_path, federated={"method": method})
    expected = first_head(glue.load_model(folder, "roberta", "mnli"), "roberta")
    flat = torch.cat([expected[name].flatten() for name in sorted(expected)])
    for client in range(N):
        assert torch.equal(firsts[0][client], flat)
    assert not torch.equal(firsts[1][0], firsts[1][1])


def test_the_order_of_clients_in_a_pass_does_not_matter(folder, tmp_path, monkeypatch):
    straight = runs.adapters(glue.run(folder, "bert", "mnli", tmp_path / "straight"))
    runs.train_in_groups(monkeypatch, [[(2, 0, 1)]])
    mixed = runs.adapters(glue.run(folder, "bert", "mnli", tmp_path / "mixed"))
    assert runs.relative_difference(straight, mixed) <= 3e-6


def test_splitting_a_step_into_micro_passes_changes_nothing(folder, tmp_path):
    whole = runs.adapters(glue.run(folder, "bert", "mnli", tmp_path / "whole"))
    train = {"micro_batch_size": 3}
    split = runs.adapters(glue.run(folder, "bert", "mnli", tmp_path / "split", train=train))
    assert runs.relative_difference(whole, split) <= 3e-6


@pytest.mark.dist
@pytest.mark.parametrize("family", some_of(FAMILIES, "roberta"))
def test_placement_changes_neither_adapters_heads_nor_scores(folder, tmp_path, family):
    """Three processes, one process, one client per pass; and a backbone stored once over two."""
    places: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {"backbone": {"sharding": "none"}}),
        "paged": (1, {"federated": {"clients_per_pass": 1}}),
        "three": (3, {"backbone": {"sharding": "none"}}),
        "zero3": (
            2,
            {
                "backbone": {
                    "sharding": "zero3",
                    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
                }
            },
        ),
    }
    found, events = {}, {}
    for place, (num, sections) in places.items():
        merged = {"federated": {"weighting": "examples", **sections.pop("federated", {})}}
        own = glue.settings(folder, family, "mnli", tmp_path / place, **sections, **merged)
        run_folder = runs.run(num, own)
        found[place], events[place] = runs.adapters(run_folder), runs.rounds(run_folder)[-1]
    for place in ("paged", "three", "zero3"):
        assert runs.relative_difference(found["one"], found[place]) <= 5e-6, place
        for key, value in events["one"].items():
            if key.startswith("eval/"):
                same = pytest.approx(value, rel=1e-5) if value is not None else None
                assert events[place][key] == same, (place, key)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_ends_with_the_heads_of_the_undisturbed_one(folder, tmp_path, optimizer):
    train = {"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.1}
    federated = {"clients_per_round": 2, "num_rounds": 3}
    sections = {"train": train, "federated": federated}
    whole = glue.run(folder, "roberta", "mnli", tmp_path / "whole", **sections)
    first = {**sections, "federated": {**federated, "num_rounds": 1}}
    glue.run(folder, "roberta", "mnli", tmp_path / "parts", **first)
    parts = glue.run(folder, "roberta", "mnli", tmp_path / "parts", **sections)
    assert runs.identical(runs.adapters(whole), runs.adapters(parts))
    assert [e["eval/loss"] for e in runs.rounds(whole)] == [
        e["eval/loss"] for e in runs.rounds(parts)
    ]


def test_a_run_leaves_the_backbone_bit_identical(folder, tmp_path, monkeypatch):
    loaded = []
    original = backbone.load

    def load(*arguments: Any) -> backbone.Backbone:
        loaded.append(original(*arguments))
        return loaded[-1]

    monkeypatch.setattr(backbone, "load", load)
    glue.run(folder, "bert", "mnli", tmp_path)
    [frozen] = loaded
    plain = dict(glue.load_model(folder, "bert", "mnli").named_parameters())
    weights = {n.replace(".base_layer", ""): p for n, p in frozen.model.named_parameters()}
    assert plain.keys() - weights.keys() == {"classifier.weight", "classifier.bias"}
    for name, weight in weights.items():
        assert torch.equal(weight, plain[name]), name
        assert not weight.requires_grad and weight.grad is None


# --- the exported folder -------------------------------------------------------------------------

TARGETS = {
    "roberta": ["query", "value"],
    "bert": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
}


def run_and_logits(
    monkeypatch: pytest.MonkeyPatch, folder: Path, family: str, name: str, out: Path, **over: Any
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run, and the outputs of the trainer itself for some rows by each adapter that it wrote."""
    rows = glue.read(folder / f"{name}-eval.jsonl")[:5]
    found: dict[str, torch.Tensor] = {}
    original = federated_export.export_adapters

    @torch.no_grad()
    def export(parts: Any, run_folder: Path) -> None:
        original(parts, run_folder)
        pairs = [tasks.checked_pair(parts.task, row, "") for row in rows]
        path = glue.save(out / "some.jsonl", rows)
        assert len(pairs) == len(rows)
        from sfed.data import tokenize

        table = tokenize.tokenise(parts.config, parts.tokenizer, "eval", (str(path),))
        examples = tokenize.Examples(table, np.arange(len(rows)))
        batch = collate([[examples.row(i) for i in range(len(rows))]], 5)
        shared = parts.clients.load_values(parts.clients.own).clone()
        columns = {f: parts.clients.layout.columns(f) for f in ("B", "head")}
        everyone = shared[0].clone()
        for some in columns.values():
            everyone[some] = shared[:, some].mean(dim=0)
        for adapter, row in zip([*NAMES, "global"], [*shared, everyone], strict=True):
            parts.adapters.bind(row[None])
            found[adapter] = parts.backbone.outputs(
                batch.input_ids, batch.is_token, batch.is_second
            )

    monkeypatch.setattr(session, "export_adapters", export)
    return glue.run(folder, family, name, out, **over), found


def assert_same_layers(stock: Any, exported: Path, saved: Path) -> None:
    """What stock PEFT has made of a folder it writes back, number for number."""
    stock.save_pretrained(saved)
    one, other = (load_file(path / "adapter_model.safetensors") for path in (exported, saved))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    layers = {name for name, module in stock.named_modules() if isinstance(module, LoraLayer)}
    assert layers == {name.partition(".lora_A")[0] for name in one if ".lora_A" in name}


@pytest.mark.parametrize("all_linear", [False, True], ids=["two targets", "all linear"])
@every_family
def test_stock_peft_gives_the_logits_of_the_trainer_from_an_exported_folder(
    folder, tmp_path, monkeypatch, family, all_linear
):
    train = {"optimizer": "adamw", "lr": 0.03, "local_steps": 4}
    lora = {"target_modules": "all-linear" if all_linear else TARGETS[family]}
    run_folder, ours = run_and_logits(
        monkeypatch, folder, family, "mnli", tmp_path, train=train, lora=lora
    )
    encoder = glue.Encoder(folder, family, "mnli")
    rows = glue.read(tmp_path / "some.jsonl")
    for name in [*NAMES, "global"]:
        stock = glue.with_adapter(folder, family, "mnli", run_folder / "adapters" / name)
        assert_same_layers(stock, run_folder / "adapters" / name, tmp_path / "saved")
        torch.testing.assert_close(encoder.logits(stock, rows), ours[name], rtol=2e-5, atol=2e-5)
        if name == NAMES[1]:
            merged = stock.merge_and_unload()
            logits = encoder.logits(merged, rows)
            torch.testing.assert_close(logits, ours[name], rtol=1e-4, atol=1e-4)
    assert float((ours[NAMES[0]] - ours[NAMES[1]]).abs().max()) > 1e-2


def test_a_target_that_is_also_a_layer_of_the_head_leaves_the_head_alone(
    folder, tmp_path, monkeypatch
):
    """RoBERTa's head has a layer "dense" too."""
    run_folder, ours = run_and_logits(
        monkeypatch,
        folder,
        "roberta",
        "rte",
        tmp_path,
        lora={"target_modules": ["dense"]},
        train={"optimizer": "adamw", "lr": 0.03},
    )
    names = runs.adapters(run_folder)[NAMES[0]]
    assert not any("classifier" in name and "lora" in name for name in names)
    stock = glue.with_adapter(folder, "roberta", "rte", run_folder / "adapters" / NAMES[0])
    assert_same_layers(stock, run_folder / "adapters" / NAMES[0], tmp_path / "saved")
    rows = glue.read(tmp_path / "some.jsonl")
    logits = glue.Encoder(folder, "roberta", "rte").logits(stock, rows)
    torch.testing.assert_close(logits, ours[NAMES[0]], rtol=2e-5, atol=2e-5)


@every_family
def test_the_config_of_an_exported_folder_names_the_head(folder, tmp_path, family):
    run_folder = glue.run(folder, family, "rte", tmp_path, federated={"num_rounds": 1})
    for name in [*NAMES, "global"]:
        text = (run_folder / "adapters" / name / "adapter_config.json").read_text()
        found = json.loads(text)
        assert found["task_type"] == "SEQ_CLS"
        assert found["modules_to_save"] == [HEADS[family]]


# --- the head that a checkpoint comes with -------------------------------------------------------


def trained_classifier(folder: Path, family: str, out: Path, num_labels: int) -> nn.Module:
    """Write a classifier whose head is not new, with its tokenizer."""
    kinds = {
        "roberta": RobertaForSequenceClassification,
        "bert": BertForSequenceClassification,
        "llama": LlamaForSequenceClassification,
    }
    torch.manual_seed(5)
    model = kinds[family].from_pretrained(folder / family, num_labels=num_labels)
    for parameter in model.get_submodule(HEADS[family]).parameters():
        nn.init.normal_(parameter, std=0.7)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder / family).save_pretrained(out)
    return model


def loaded(settings: dict[str, Any]) -> backbone.Backbone:
    config = config_load.validate(settings)
    world = distributed.start(RUN_SECONDS)
    try:
        return backbone.load(config, config.model.name, world)
    finally:
        distributed.stop(world)


@every_family
def test_a_head_of_the_right_size_is_where_all_clients_start(folder, tmp_path, family):
    model = trained_classifier(folder, family, tmp_path / "model", 3)
    own = glue.settings(folder, family, "mnli", tmp_path, model={"name": str(tmp_path / "model")})
    expected = dict(model.get_submodule(HEADS[family]).named_parameters())
    head = loaded(own).head
    assert head is not None and head.name == HEADS[family]
    assert head.initial.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(head.initial[name], weight), name


@every_family
def test_a_head_of_another_number_of_classes_makes_way_for_a_new_one(folder, tmp_path, family):
    trained_classifier(folder, family, tmp_path / "model", 5)
    own = glue.settings(folder, family, "mnli", tmp_path, model={"name": str(tmp_path / "model")})
    head = loaded(own).head
    expected = first_head(glue.load_model(folder, family, "mnli"), family)
    assert head is not None and head.initial.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(head.initial[name], weight), name


def zero3_heads(own: dict[str, Any]) -> dict[str, torch.Tensor]:
    head = loaded(own).head
    assert head is not None
    return dict(head.initial)


@pytest.mark.dist
@pytest.mark.parametrize("num_labels", [3, full(5)], ids=["kept", "new"])
def test_a_head_that_was_loaded_into_shards_is_whole(folder, tmp_path, num_labels):
    trained_classifier(folder, "roberta", tmp_path / "model", num_labels)
    model = {"name": str(tmp_path / "model")}
    own = glue.settings(folder, "roberta", "mnli", tmp_path, model=model)
    plain = zero3_heads(own)
    own["backbone"] = {"sharding": "zero3"}
    for found in on_processes(2, zero3_heads, own):
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], weight) for name, weight in plain.items())


@every_family
def test_any_other_weight_that_is_missing_is_refused_by_name(folder, tmp_path, family):
    model = trained_classifier(folder, family, tmp_path / "model", 3)
    name = next(n for n, _ in model.named_parameters() if "layers.1." in n or "layer.1." in n)
    state = {key: value for key, value in model.state_dict().items() if key != name}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    own = glue.settings(folder, family, "mnli", tmp_path, model={"name": str(tmp_path / "model")})
    with pytest.raises(UserError) as mistake:
        loaded(own)
    assert name in str(mistake.value) and "lack 1 weights" in str(mistake.value)


def test_a_weight_of_another_shape_is_refused_by_name(folder, tmp_path):
    trained_classifier(folder, "bert", tmp_path / "model", 3)
    path = tmp_path / "model" / "config.json"
    changed = {**json.loads(path.read_text()), "intermediate_size": 80}
    path.write_text(json.dumps(changed))
    own = glue.settings(folder, "bert", "mnli", tmp_path, model={"name": str(tmp_path / "model")})
    with pytest.raises(UserError, match=r"intermediate\.dense"):
        loaded(own)


# --- what a round sends --------------------------------------------------------------------------


def sizes(tensors: runs.Tensors) -> tuple[int, int, int]:
    """Numbers of A, of B and of the head."""
    a, b = (sum(t.numel() for t in runs.factors(tensors, f).values()) for f in "AB")
    return a, b, sum(t.numel() for t in heads(tensors).values())


@pytest.mark.dist
@whose_head
@pytest.mark.parametrize("kinds", [["personal"], ["personal", "global"]], ids=" ".join)
def test_a_round_sends_a_and_the_head_only_where_it_is_shared(folder, tmp_path, share_head, kinds):
    own = glue.settings(
        folder,
        "roberta",
        "mnli",
        tmp_path,
        federated={"share_head": share_head},
        evaluation={"adapters": kinds, "every_rounds": ROUNDS},
    )
    counted = on_processes(2, counted_run, own)
    run_folder = tmp_path / "run"
    a, b, head = sizes(runs.adapters(run_folder)[NAMES[0]])
    message = a + (head if share_head else 0)
    for event in runs.rounds(run_folder)[1:]:
        assert event["comm/uploaded_bytes"] == 4 * message
    for seen in counted:
        reductions = [(p, n) for p, kind, n, _ in seen if "reduce" in kind]
        assert [n for p, n in reductions if p == "average"] == [message] * ROUNDS
        assert [n for p, n in reductions if p == "prepare"] == [a]
        assert [p for p, kind, *_ in seen if p == "local"] == []
        rest = sorted(n for p, n in reductions if p not in ("average", "prepare"))
        apart = b + (0 if share_head else head)  # what clients hold of their own
        if "global" in kinds:
            # Mean B, and head where it differs: evaluation, export; then the similarity (counts).
            assert rest == sorted([apart, apart, a + b + 2])
        else:
            assert rest == []
    last = runs.rounds(run_folder)[-1]
    expected = 4 * (apart + a + b) if "global" in kinds else 0
    assert last["comm/evaluation_bytes"] == pytest.approx(expected, abs=16)
