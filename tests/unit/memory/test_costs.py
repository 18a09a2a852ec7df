"""What is predicted of memory is what is measured, and as many clients share a pass as fit."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfed.bench import workload
from sfed.bench.measure import SavedBytes
from sfed.bench.steps import Sfed
from sfed.config import load as config_load
from sfed.data import batches
from sfed.data.packing import Packing
from sfed.data.tokenize import Row
from sfed.distributed import world as distributed
from sfed.federated import session
from sfed.lora import packed_attention
from sfed.memory import clients_per_pass, counts, profile
from sfed.memory.costs import ClientState, Cost, Costs, Load, Work, largest
from sfed.memory.live_bytes import LiveBytes
from sfed.memory.trial import Frozen
from sfed.models import hf_config, synthetic
from tests.support import runs, tiny
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes
from tests.support.selection import full

CPU = torch.device("cpu")
ALL, ATTENTION = "all-linear", ("q_proj", "v_proj")


def settings(
    rank: int,
    targets: Any,
    checkpointing: bool = False,
    *,
    packing: bool = False,
    attention: str = "auto",
) -> Any:
    return config_load.validate(
        {
            "model": {"attention": attention},
            "data": {"task": "gsm8k", "packing": packing},
            "lora": {"rank": rank, "target_modules": targets},
            "backbone": {"gradient_checkpointing": checkpointing},
        }
    )


def measured(config: Any, model_config: Any, dtype: torch.dtype, device: str = "cpu") -> Costs:
    """What the trial says, followed once for all tests: seconds of CPU."""
    key = (config.model_dump_json(), model_config.to_json_string(), dtype, device)
    if key not in _MEASURED:
        _MEASURED[key] = _followed(config, model_config, dtype, device)
    return _MEASURED[key]


_MEASURED: dict[Any, Costs] = {}


def _followed(config: Any, model_config: Any, dtype: torch.dtype, device: str) -> Costs:
    targets = counts.counts_of(config, hf_config.MetaModel(config, model_config)).targets
    return profile.measure(config, Frozen(model_config, dtype, targets, device), pytest.fail)


def trainer(name: str, load: Load, rank: int, targets: Any, dtype: torch.dtype) -> Sfed:
    """The trainer's own steps on a whole model; only sizes count, so its weights are 0."""
    config = synthetic.model_config(name, None, None)
    work = workload.Workload(load.clients, load.rows, load.tokens, rank, targets, dtype)
    model = synthetic.build(config, work.dtype, work.seed, CPU, blank=True)
    ids = workload.random_tokens(config, work)
    return Sfed(model, work, ids, clients_per_pass=load.clients)


@pytest.mark.parametrize(
    ("name", "targets", "dtype", "checkpointing"),
    [
        ("stories", ALL, torch.float32, False),
        ("stories", ALL, torch.bfloat16, True),
        full("stories", ATTENTION, torch.bfloat16, False),
        ("llama-30m", ALL, torch.bfloat16, False),
    ],
)
def test_a_trial_of_two_layers_predicts_the_passes_of_the_whole_model(
    name: str, targets: Any, dtype: torch.dtype, checkpointing: bool
) -> None:
    """stories has 5 layers and grouped queries, llama-30m 8 and as many keys as queries."""
    config = settings(16, targets, checkpointing)
    model_config = synthetic.model_config(name, None, None)
    costs = measured(config, model_config, dtype)
    for load in (Load(1, 2, 64), Load(4, 1, 40), Load(8, 1, 16)):
        ours = trainer(name, load, 16, targets, dtype)
        if checkpointing:
            ours.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
            ours.backbone.training()
        with LiveBytes() as live:
            ours.enter(0)
            loss = ours.losses().sum()
            kept = live.now
            torch.autograd.backward(loss)
        needs = Work(load.clients, load.clients, load.rows, 1, load.tokens, 0).needs(
            costs, ClientState(ours.clients.layout.size, 2), load.clients
        )
        assert costs.kept.of(load) == pytest.approx(kept, rel=0.05), load
        peak = needs.copies + needs.activations + max(needs.logits, needs.transient)
        assert live.peak <= 1.05 * peak, load
        assert peak <= 1.15 * live.peak, load


def packed_into_one_row(load: Load) -> batches.Batch:
    """One row for each client, of a long sequence and seven short ones."""
    lengths = [load.tokens - 70, *[9] * 7]
    rows = [Row(np.zeros(length, dtype=np.int32), 1, None) for length in lengths]
    packing = Packing(widest=load.tokens, even_width=math.inf, document_slots=0.0)
    packed = batches.collate([rows] * load.clients, len(rows), packing)
    assert packed.documents is not None
    assert packed.input_ids.shape == (load.clients, load.tokens)
    return packed


@pytest.mark.parametrize(
    ("clients", "dtype", "attention"),
    [
        pytest.param(1, torch.float32, "sdpa", id="a mask"),
        pytest.param(3, torch.bfloat16, "auto", id="no mask"),
        full(1, torch.float32, "auto"),
        full(3, torch.bfloat16, "sdpa"),
    ],
)
def test_what_a_packed_pass_keeps_is_counted_with_its_masks_where_it_has_some(
    clients: int, dtype: torch.dtype, attention: str
) -> None:
    """Masks of 512 x 512 are half of what a packed pass of this model keeps."""
    load = Load(clients, 1, 512)
    model_config = synthetic.model_config("stories", None, None)
    costs = measured(settings(16, ALL, packing=True, attention=attention), model_config, dtype)
    assert costs.packing is not None
    ours, batch = trainer("stories", load, 16, ALL, dtype), packed_into_one_row(load)
    ours.backbone.model.set_attn_implementation(
        packed_attention.NAME if attention == "auto" else attention
    )
    with LiveBytes() as live:
        ours.enter(0)
        loss = ours.backbone.token_losses(
            batch.input_ids, batch.labels, batch.positions, batch.documents
        )
        kept = live.now
        torch.autograd.backward(loss.sum())
    assert costs.kept.of(load) == pytest.approx(kept, rel=0.1)
    needs = Work(clients, clients, 1, 1, load.tokens, 0).needs(
        costs, ClientState(ours.clients.layout.size, 2), clients
    )
    peak = needs.copies + needs.activations + max(needs.logits, needs.transient)
    assert live.peak <= 1.05 * peak
    assert peak <= 1.15 * live.peak
    padded = measured(settings(16, ALL), model_config, dtype)
    assert padded.packing is None
    if attention == "sdpa":
        assert padded.kept.of(load) < 0.7 * kept
    else:
        assert costs.kept.per_square == pytest.approx(0.0, abs=1e-6)


def test_a_kernel_without_a_mask_keeps_no_more_of_packed_rows_than_of_padded_ones() -> None:
    model_config = synthetic.model_config("stories", None, None)
    padded = measured(settings(16, ALL), model_config, torch.bfloat16)
    packs = settings(16, ALL, packing=True)
    assert measured(packs, model_config, torch.bfloat16, "cuda") == padded
    masked = measured(packs, model_config, torch.float32, "cuda")  # which the kernel cannot compute
    assert masked.packing is not None and masked.kept.per_square > 0


@pytest.mark.parametrize(("clients", "rank"), [(1, 4), (4, 16), (8, 2)])
@pytest.mark.parametrize("targets", [ALL, ATTENTION])
def test_the_clients_state_is_what_the_trainer_allocates(
    clients: int, rank: int, targets: Any
) -> None:
    load = Load(clients, 1, 16)
    ours = trainer("tiny", load, rank, targets, torch.float32)
    config = settings(rank, targets)
    meta = hf_config.MetaModel(config, synthetic.model_config("tiny", None, None))
    facts = counts.counts_of(config, meta)
    layout = ours.clients.layout
    assert facts.a_numbers + facts.b_numbers == layout.size
    needs = Work(clients, clients, 1, 1, 16, 0).needs(FREE, ClientState(layout.size, 2), clients)
    rows = ours.rows
    assert needs.values == rows.values.nbytes
    assert needs.gradients == rows.grads.nbytes
    assert needs.moments == sum(moment.nbytes for moment in rows.moments.values())


def test_an_optimizer_step_takes_what_the_trial_says() -> None:
    load = Load(4, 1, 16)
    ours = trainer("tiny", load, 8, ALL, torch.float32)
    config = settings(8, ALL)
    model_config = synthetic.model_config("tiny", None, None)
    costs = measured(config, model_config, torch.float32)
    ours.losses().sum().backward()
    with LiveBytes() as live:
        ours.update()
    predicted = costs.optimizer_per_number * ours.clients.layout.size * load.clients
    assert live.peak == pytest.approx(predicted, rel=0.1, abs=1024)


def test_saved_bytes_and_live_bytes_agree_on_what_a_pass_keeps() -> None:
    ours = trainer("tiny", Load(2, 2, 24), 4, ALL, torch.float32)
    with SavedBytes(ours.frozen()) as saved, LiveBytes() as live:
        loss = ours.losses().sum()
        kept = live.now
    del loss
    assert kept == pytest.approx(saved.total, rel=0.02)


NOTHING = Cost(0, 0, 0, 0, 0)
FREE = Costs(NOTHING, NOTHING, NOTHING, NOTHING, 0, 1, 0, 0)
_sizes = st.floats(min_value=0, max_value=1e6)
_costs = st.builds(Cost, _sizes, _sizes, _sizes, _sizes, _sizes)
_all_costs = st.builds(
    Costs,
    kept=_costs,
    kept_by_layer=_costs,
    transient=_costs,
    forward=_costs,
    logits_per_token=st.integers(0, 10**6),
    logits_at_a_time=st.integers(1, 10**5),
    cache_per_token=st.integers(0, 10**6),
    optimizer_per_number=st.floats(min_value=0, max_value=20),
    packing=st.none() | st.builds(Packing, st.integers(4096, 10**5), st.floats(16, 1e5)),
)
_works = st.builds(
    Work,
    own_clients=st.just(64),
    round_clients=st.integers(1, 64),
    train_rows=st.integers(1, 16),
    eval_rows=st.integers(1, 16),
    tokens=st.integers(2, 4096),
    new_tokens=st.integers(0, 512),
)
_states = st.builds(ClientState, numbers=st.integers(1, 10**8), moments=st.sampled_from([0, 2]))


@given(_all_costs, _works, _states, st.integers(1, 63))
def test_memory_grows_with_clients_tokens_and_the_size_of_an_adapter(
    costs: Costs, work: Work, state: ClientState, clients: int
) -> None:
    needed = work.needs(costs, state, clients).total
    if clients + 1 < work.round_clients:  # all of a round need no second group
        assert work.needs(costs, state, clients + 1).total >= needed
    longer = dataclasses.replace(work, tokens=work.tokens + 1)
    assert longer.needs(costs, state, clients).total >= needed
    larger = dataclasses.replace(state, numbers=state.numbers + 1)
    assert work.needs(costs, larger, clients).total >= needed


@given(_all_costs, _works, _states, st.integers(0, 10**11))
def test_as_many_clients_share_a_pass_as_fit_and_no_more(
    costs: Costs, work: Work, state: ClientState, free: int
) -> None:
    most = work.round_clients
    found = work.most_clients(costs, state, free)

    def fits(clients: int) -> bool:
        return work.needs(costs, state, clients).total <= 0.9 * free

    assert 0 <= found <= most
    assert found == 0 or fits(found)
    assert found == most or not fits(found + 1)
    assert (found > 0) == any(fits(clients) for clients in range(1, most + 1))


@given(st.integers(0, 100), st.integers(0, 100))
def test_the_largest_that_fits_is_found(limit: int, edge: int) -> None:
    assert largest(lambda count: count <= edge, limit) == min(limit, edge)


def test_costs_travel_as_json() -> None:
    costs = dataclasses.replace(FREE, kept=Cost(1, 2.5, 3, 4, 5), cache_per_token=7)
    for packing in (None, Packing(4096, 128.0), Packing(4096, 128.0, 17.0)):
        sent = dataclasses.replace(costs, packing=packing)
        assert Costs.of_json(json.loads(json.dumps(dataclasses.asdict(sent)))) == sent


@pytest.mark.parametrize(
    ("section", "processes", "free", "kind"),
    [
        ({}, 1, 0, "none"),
        ({}, 8, 2000, "none"),
        ({}, 8, 1999, "zero3"),
        ({"sharding": "none"}, 8, 0, "none"),
        ({"sharding": "zero3"}, 1, 10**12, "zero3"),
        ({"offload": "cpu"}, 8, 10**12, "zero3"),
    ],
)
def test_how_the_backbone_is_stored_follows_from_one_rule(
    section: dict[str, Any], processes: int, free: int, kind: str
) -> None:
    backbone = config_load.validate({"backbone": section}).backbone
    chosen = hf_config.resolve_sharding(backbone, processes, lambda: (1000, free))
    assert chosen.kind == kind


FOUR_CLIENTS = clients_per_pass.Estimate(
    Work(4, 4, 1, 1, 8, 0), dataclasses.replace(FREE, kept=Cost(0, 100, 0, 0, 0))
)


def _agreed(config: Any, free_of_process: list[list[int]]) -> list[clients_per_pass.ClientsPerPass]:
    """What is agreed on with so much free memory on each process, one after another."""
    world = distributed.start(RUN_SECONDS)
    start = clients_per_pass.Start(config, world, hf_config.Sharding("none", "a test"), None)
    agreed = []
    for free in free_of_process:
        clients_per_pass.free_bytes = lambda _, free=free: free[world.rank] * world.size
        agreed.append(clients_per_pass.agree(start, FOUR_CLIENTS, 0))
    distributed.stop(world)
    return agreed


@pytest.mark.dist
def test_processes_agree_on_what_fits_the_one_with_the_least_memory() -> None:
    config = config_load.validate({"data": {"task": "gsm8k"}})
    free_of_process = [[10_000, 230], [20, 10_000], [10_000, 10_000]]
    one, other = on_processes(2, _agreed, config, free_of_process)
    assert one == other
    assert one == [
        clients_per_pass.planned(config, FOUR_CLIENTS, 0, min(free)) for free in free_of_process
    ], "the plan follows another rule"
    some, none, all_of_them = one
    assert (some.clients_per_pass, some.is_doubtful) == (2, False)
    assert (none.clients_per_pass, none.is_doubtful) == (1, True)
    assert "even one" in none.reason
    assert all_of_them.of(range(4)) == 4


def _train_with(free: int, settings: dict[str, Any]) -> None:
    clients_per_pass.free_bytes = lambda _device: free
    session.run_session(config_load.validate(settings))


@pytest.mark.dist
def test_what_does_not_fit_into_one_pass_makes_several_with_the_same_numbers(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Two of four clients fit. Resumed with plenty of memory, it stays two: bit for bit."""

    settings = partial(tiny.named_settings, tiny_folder, tmp_path)
    needed = _free_for_two(tiny_folder)
    on_processes(1, _train_with, needed, settings("auto", num_rounds=1))
    assert runs.newest_facts(tmp_path / "auto")["clients_per_pass"] == 2
    on_processes(1, _train_with, 10**12, settings("auto", num_rounds=2))
    assert runs.newest_facts(tmp_path / "auto")["clients_per_pass"] == 2
    on_processes(1, _train_with, 10**12, settings("two", num_rounds=2, clients_per_pass=2))
    on_processes(1, _train_with, 10**12, settings("all", num_rounds=2))
    assert runs.newest_facts(tmp_path / "all")["clients_per_pass"] > 4
    auto, two, whole = (runs.adapters(tmp_path / name) for name in ("auto", "two", "all"))
    assert runs.identical(auto, two)
    assert runs.relative_difference(auto, whole) < 1e-3


def _free_for_two(folder: Path) -> int:
    """Memory in which passes of two clients of the tiny run fit, and of three do not."""
    config = tiny.config(folder)
    model_config = hf_config.read_model_config(config, str(folder / "model"))
    facts = counts.counts_of(config, hf_config.MetaModel(config, model_config))
    costs = measured(config, model_config, torch.float32)
    state = clients_per_pass.state_of(config, facts.a_numbers + facts.b_numbers)
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    # A token per byte, and one at each end.
    longest = max(len(row["prompt"] + row["completion"]) + 2 for row in rows)
    work = clients_per_pass.work_of(config, 4, longest)
    two, three = (work.needs(costs, state, clients).total for clients in (2, 3))
    return int((two + three) / 2 / 0.9)
