"""How alike the clients are before the mean, and how much their adapters put out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM

from sfed.clients.store import ClientStore
from sfed.config import load as config_load
from sfed.data import partition
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.federated import session
from sfed.lora.layout import Layout
from sfed.methods import aggregation
from tests.support import glue, runs, tiny
from tests.support.counting import counted_run, sizes
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes
from tests.support.reference import parts_of, tokenised

# Layers that are not square, and a head, which is not compared.
LAYOUT = Layout.of([("one", 5, 3), ("two", 2, 7)], lora_rank=2, head={"weight": (3, 4)})
A, B = LAYOUT.columns("A"), LAYOUT.columns("B")


def values_of(num_clients: int) -> torch.Tensor:
    """Rows with something in common, of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(LAYOUT.size, generator=generator)
    rows = common + torch.randn(num_clients, LAYOUT.size, generator=generator)
    return rows * torch.arange(1, num_clients + 1)[:, None]


def mean_cosine(rows: list[torch.Tensor]) -> float:
    """The mean over pairs, plainly."""
    cosines = [
        float(one.double() @ other.double() / one.double().norm() / other.double().norm())
        for one, other in itertools.combinations(rows, 2)
    ]
    return sum(cosines) / len(cosines)


Similarity = dict[str, float | None]


def similarities_of(some: list[torch.Tensor]) -> list[Similarity]:
    world = distributed.start(RUN_SECONDS)
    try:
        return [_similarity_of(world, values) for values in some]
    finally:
        distributed.stop(world)


def _similarity_of(world: World, values: torch.Tensor) -> Similarity:
    own = partition.place(len(values), world.size)[world.rank]
    num = len(own)
    clients = ClientStore(own, LAYOUT, torch.device("cpu"), clients_per_pass=num, moments=())
    for client in own:
        clients.set_own(client, {"a": values[client, A], "b": values[client, B]})
    before = clients.load_values(own).clone()
    found = aggregation.similarity(world, clients)
    torch.testing.assert_close(clients.load_values(own), before, rtol=0, atol=0, equal_nan=True)
    return found


def similarity_of(values: torch.Tensor) -> Similarity:
    return similarities_of([values])[0]


@pytest.mark.dist
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_similarity_is_the_mean_over_pairs_of_clients(num_processes):
    some = [values_of(num_clients) for num_clients in (3, 5)]
    of_processes = on_processes(num_processes, similarities_of, some)
    for values, found in zip(some, zip(*of_processes, strict=True), strict=True):
        expected = {"a": mean_cosine(list(values[:, A])), "b": mean_cosine(list(values[:, B]))}
        assert abs(expected["a"] - expected["b"]) > 0.01
        assert list(found) == [pytest.approx(expected, abs=1e-5)] * num_processes


def test_the_bounds_of_similarity():
    row = values_of(1)
    assert similarity_of(torch.cat([row, 3 * row])) == pytest.approx({"a": 1.0, "b": 1.0})
    assert similarity_of(torch.cat([row, -row])) == pytest.approx({"a": -1.0, "b": -1.0})


def test_one_client_is_like_nobody():
    assert similarity_of(values_of(1)) == {"a": None, "b": None}


def test_b_that_is_zero_everywhere_or_in_all_but_one_has_no_similarity():
    values = values_of(3)
    expected = mean_cosine(list(values[:, A]))
    values[:, B] = 0.0
    assert similarity_of(values) == {"a": pytest.approx(expected), "b": None}
    values[1, B] = 1.0
    assert similarity_of(values)["b"] is None


def test_who_has_nothing_to_compare_is_left_out():
    values = values_of(4)
    values[1, B] = 0.0
    values[2, A] = torch.nan
    expected = {
        "a": mean_cosine([values[i, A] for i in (0, 1, 3)]),
        "b": mean_cosine([values[i, B] for i in (0, 2, 3)]),
    }
    assert similarity_of(values) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("per_pass", [1, 4])
def test_clients_that_hold_the_common_a_count_one_by_one(per_pass: int) -> None:
    """Two took part, and two have the A that all received."""
    values = values_of(4)
    values[3, A] = values[2, A]
    clients = ClientStore(
        range(4), LAYOUT, torch.device("cpu"), clients_per_pass=per_pass, moments=()
    )
    clients.set_shared("A", values[2, A])
    for client in (0, 1):
        clients.set_own(client, {"a": values[client, A], "b": values[client, B]})
    world = distributed.start(RUN_SECONDS)
    try:
        found = aggregation.similarity(world, clients)
    finally:
        distributed.stop(world)
    expected = {"a": mean_cosine(list(values[:, A])), "b": mean_cosine(list(values[:2, B]))}
    assert found == pytest.approx(expected, abs=1e-5)


# --- in a run ------------------------------------------------------------------------------------


def run(folder: Path, out: Path, **sections: dict[str, Any]) -> Path:
    base: dict[str, dict[str, Any]] = {
        "federated": {"num_clients": 3, "num_rounds": 1, "method": "fedsa"},
        "train": {"optimizer": "adamw", "lr": 0.02, "local_steps": 3, "batch_size": 4},
        "output": {"dir": str(out), "name": "run"},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}
    settings = tiny.settings(folder, **merged)
    session.run_session(config_load.validate(settings))
    return out / "run"


def flat(tensors: runs.Tensors, factor: str) -> torch.Tensor:
    return torch.cat([t.flatten() for _, t in sorted(runs.factors(tensors, factor).items())])


@pytest.mark.parametrize("method", ["fedsa", "fedit"])
def test_a_round_compares_what_the_clients_learned_before_the_mean(tiny_folder, tmp_path, method):
    """Clients that share nothing end a first round with what the others bring to the mean."""
    alone = run(tiny_folder, tmp_path / "alone", federated={"method": "local"})
    shared = run(tiny_folder, tmp_path / "shared", federated={"method": method})
    tensors = [t for name, t in runs.adapters(alone).items() if name.startswith("client")]
    expected = {f: mean_cosine([flat(t, f) for t in tensors]) for f in "AB"}
    assert expected["A"] < 1 - 1e-4 and expected["B"] < 0.99
    for folder in (alone, shared):
        first, last = runs.rounds(folder)
        assert last["adapter/a_similarity"] == pytest.approx(expected["A"], abs=1e-5)
        assert last["adapter/b_similarity"] == pytest.approx(expected["B"], abs=1e-5)
        assert first["adapter/a_similarity"] is None and first["adapter/b_similarity"] is None


def test_similarity_is_asked_for_only_when_an_evaluation_is_due(tiny_folder, tmp_path):
    folder = run(tiny_folder, tmp_path, federated={"num_rounds": 3}, evaluation={"every_rounds": 2})
    found = [event["adapter/b_similarity"] is not None for event in runs.rounds(folder)]
    assert found == [False, False, True, True]


@pytest.mark.dist
@pytest.mark.parametrize("kinds", [["personal"], ["global"]], ids=" ".join)
def test_b_leaves_in_no_form_where_the_global_adapter_is_not_asked_for(
    tiny_folder, tmp_path, kinds
):
    own = tiny.settings(
        tiny_folder,
        output={"dir": str(tmp_path), "name": "run"},
        backbone={"sharding": "none"},
        federated={"num_clients": 3, "num_rounds": 2},
        evaluation={"adapters": kinds},
    )
    num_a, num_b = sizes(tiny_folder)
    for seen in on_processes(2, counted_run, own):
        large = sorted(n for _, _, n, _ in seen if n >= min(num_a, num_b) / 2)
        rounds = [num_a] * (1 + 2)  # the first mean, and one in each round
        if kinds == ["global"]:
            # Similarity in each round; the global adapter before and after it, and the export.
            rounds += [num_a + num_b + 2] * 2 + [num_b] * 4
        assert large == sorted(rounds), (num_a, num_b)
    last = runs.rounds(tmp_path / "run")[-1]
    for factor in "ab":
        assert (last[f"adapter/{factor}_similarity"] is None) == (kinds == ["personal"])
    sent = 4 * (num_a + num_b + num_b) if kinds == ["global"] else 0
    assert last["comm/evaluation_bytes"] == pytest.approx(sent, abs=16)


# --- the adapters' output ------------------------------------------------------------------------


class Outputs:
    """Mean squares of gamma B A x of stock PEFT's layers at the tokens that count."""

    def __init__(self, model: nn.Module) -> None:
        self.sum, self.count, self.places = 0.0, 0, slice(0)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.register_forward_hook(self.add)

    @torch.no_grad()
    def add(self, layer: Any, arguments: tuple[torch.Tensor, ...], _: Any) -> None:
        (x,) = arguments
        if x.dim() < 3:  # BERT's pooler sees no tokens
            return
        output = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        squares = output[0, self.places].double().square().mean(dim=-1)
        self.sum += float(squares.sum())
        self.count += len(squares)


@pytest.mark.parametrize("num_clients", [1, 3])
def test_output_rms_is_that_of_the_first_batch_of_each_client(tiny_folder, tmp_path, num_clients):
    federated = {"num_clients": num_clients}
    folder = run(tiny_folder, tmp_path, federated=federated, evaluation={"batch_size": 3})
    rows = tokenised(tiny_folder)
    total, count = 0.0, 0
    for client, part in enumerate(parts_of(folder)):
        base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
        model = PeftModel.from_pretrained(base, folder / "adapters" / f"client-{client:04d}")
        outputs = Outputs(model.eval())
        for ids, prompt_length in sorted((rows[i] for i in part["eval"]), key=lambda r: -len(r[0]))[
            :3
        ]:
            outputs.places = slice(prompt_length, len(ids))
            model(torch.tensor([ids]))
        total, count = total + outputs.sum, count + outputs.count
    before, after = runs.rounds(folder)
    assert before["adapter/output_rms"] == 0.0
    expected = (total / count) ** 0.5
    assert expected > 1e-4
    assert after["adapter/output_rms"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_output_rms_of_a_classifier_counts_all_tokens_of_its_texts(glue_folder, tmp_path, family):
    folder = glue.run(
        glue_folder,
        family,
        "mnli",
        tmp_path,
        federated={"num_clients": 1},
        partition={"kind": "iid"},
    )
    rows = glue.read(glue_folder / "mnli-eval.jsonl")
    encoder = glue.Encoder(glue_folder, family, "mnli")
    [part] = parts_of(folder)
    own = [rows[i] for i in part["eval"]]
    inputs = sorted((encoder.inputs([row]) for row in own), key=lambda i: -i["input_ids"].shape[1])
    model = glue.with_adapter(glue_folder, family, "mnli", folder / "adapters" / "client-0000")
    outputs = Outputs(model)
    outputs.places = slice(None)
    for one in inputs[:5]:
        model(**one)
    first, *_, last = runs.rounds(folder)
    assert first["adapter/output_rms"] == 0.0
    expected = (outputs.sum / outputs.count) ** 0.5
    assert expected > 1e-5
    assert last["adapter/output_rms"] == pytest.approx(expected, rel=1e-5)
