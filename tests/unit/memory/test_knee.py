"""The fewest clients share a pass that are nearly as fast as any; nothing is timed."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.bench.against import material
from sfed.bench.against.job import Job
from sfed.bench.against.sfed_rounds import SfedRounds
from sfed.config import load as config_load
from sfed.data import batches
from sfed.data.batches import PassSize
from sfed.data.packing import Packing
from sfed.data.tokenize import Examples, Row, Tokens
from sfed.distributed import world as distributed
from sfed.federated import passes, session
from sfed.memory import knee
from sfed.memory.clients_per_pass import ClientsPerPass
from sfed.memory.knee import Reading, Typical
from sfed.memory.pass_time import PassTime, Speed, Trained, speed_of
from sfed.models.backbone import Backbone
from sfed.models.hf_config import Sharding
from tests.support import runs, tiny
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

LIMIT = ClientsPerPass(2**31, "all of a process fit", is_limit=True)
PADDED = Reading(seed=0, batch_sizes=(), micro_batch_size=None, packing=None)
LAUNCHES = PassTime(1.0, 0.0, 0.0, 0.0, runs_ahead=False)
SLOTS = PassTime(0.0, 0.0, 1.0, 0.0, runs_ahead=False)
# Machines on which launches cost nothing, and on which nothing else does.
NO_LAUNCH, ONLY_LAUNCH = Speed(0.0, 1e99, 1.0, False), Speed(1.0, 1e99, 1e99, False)


def test_a_pass_waits_for_its_launches_or_for_the_device_where_the_host_runs_ahead() -> None:
    model = Trained(4, 0, 1000, 2, 10, recomputes=False)
    one, three, many = (PassSize(slots, 4.0) for slots in (1, 3, 100))
    on_cpu = PassTime.of(model, Speed(0.5, 100.0, 10.0, runs_ahead=False))
    # 4 + 2 layers; 2 x 1000 weights of 2 bytes; 4 x 1000 + 6 x 10 operations a slot.
    assert on_cpu.seconds(three) == 3.0 + 40.0 + 3 * 406.0
    on_gpu = PassTime.of(model, Speed(0.5, 1e4, 1e4, runs_ahead=True))
    assert (on_gpu.seconds(one), on_gpu.seconds(many)) == (3.0, pytest.approx(0.4 + 40.6))
    again = PassTime.of(dataclasses.replace(model, recomputes=True), Speed(0, 100.0, 10.0, False))
    assert again.seconds(one) == 60.0 + 606.0


def test_attention_takes_time_for_each_place_that_it_attends_to() -> None:
    model = Trained(4, 5, 0, 2, 0, recomputes=False)
    time = PassTime.of(model, Speed(0.0, 1.0, 1.0, runs_ahead=False))
    assert time.seconds(PassSize(100, 10.0)) == 100 * 12 * 5 * 4 * 10


def test_attention_sees_half_an_example_or_under_a_mask_all_of_a_row_at_half_the_rate() -> None:
    lengths = [[24, 8, 8]]
    assert batches.pass_size(lengths, 3, None) == PassSize(3 * 24, 12.0)
    masked = Packing(widest=256, even_width=1e9)
    assert batches.pass_size(lengths, 3, masked) == PassSize(40, 80.0)
    told = Packing(widest=256, even_width=1e9, document_slots=0.0)
    assert batches.pass_size(lengths, 3, told) == PassSize(40, 12.0)


def test_more_threads_compute_faster_and_launch_no_faster() -> None:
    one, four = speed_of("cpu", 1), speed_of("cpu", 4)
    assert four.launch_seconds == one.launch_seconds
    assert four.flops_per_second == 4 * one.flops_per_second
    assert speed_of("cuda", 1) == speed_of("cuda", 4)


@given(
    lengths=st.lists(st.lists(st.integers(2, 90), min_size=1, max_size=4), min_size=1, max_size=4),
    packs=st.booleans(),
    document_slots=st.sampled_from([0.0, 3.0, math.inf]),
    context=st.integers(90, 97),
)
def test_the_slots_of_a_pass_are_known_without_making_it(
    lengths: list[list[int]], packs: bool, document_slots: float, context: int
) -> None:
    packing = Packing(256, 200.0, document_slots) if packs else None
    rows = [[Row(np.arange(one, dtype=np.int32), 1, None, None) for one in c] for c in lengths]
    most = max(map(len, lengths))
    batch = batches.collate(rows, most, packing, context)
    size = batches.pass_size(lengths, most, packing, context)
    is_masked = batch.documents is not None and batch.documents.is_masked
    longest = min(-(-max(length for some in lengths for length in some) // 8) * 8, context)
    assert size == PassSize(batch.slots, 2 * batch.input_ids.shape[1] if is_masked else longest / 2)


@pytest.mark.parametrize(
    ("most", "present", "sizes"),
    [
        (2**31, 1, [1]),
        (2**31, 8, [1, 2, 4, 8]),
        (2**31, 10, [1, 2, 3, 5, 10]),
        (7, 10, [1, 2, 3, 5]),
        (1, 10, [1]),
    ],
)
def test_sizes_are_even_shares_of_those_who_are_there(
    most: int, present: int, sizes: list[int]
) -> None:
    assert knee.sizes_up_to(most, present) == sizes


def test_the_smallest_size_with_97_percent_of_the_best_rate_is_taken() -> None:
    rates = {1: 50.0, 2: 96.9, 4: 97.0, 8: 100.0, 16: 99.0}
    found = knee.smallest_good(LIMIT, rates)
    assert (found.clients_per_pass, found.is_limit) == (4, False)
    for told in ("97 tokens/s", "97 %", "100 with 8, and 99 with 16", LIMIT.reason):
        assert told in found.reason
    assert knee.smallest_good(LIMIT, {1: 5.0, 2: 5.0, 4: 5.0}).clients_per_pass == 1


def test_launches_make_passes_large_and_empty_slots_make_them_small() -> None:
    steps = [[[8], [16], [24], [80]]] * 2
    seconds = {size: Typical(PADDED, LAUNCHES, steps).seconds(size) for size in (1, 2, 3, 4)}
    assert seconds == {1: 4.0, 2: 2.0, 3: 2.0, 4: 1.0}
    slots = {size: Typical(PADDED, SLOTS, steps).seconds(size) for size in (1, 2, 4)}
    assert slots == {1: 8.0 + 16 + 24 + 80, 2: 2 * 16.0 + 2 * 80, 4: 4 * 80.0}


def test_micro_passes_and_packing_count_as_they_are_made() -> None:
    steps = [[[8, 80], [80, 8]]]
    micro = dataclasses.replace(PADDED, micro_batch_size=1)
    assert Typical(micro, SLOTS, steps).seconds(2) == 2 * 2 * 80
    assert Typical(micro, LAUNCHES, steps).seconds(2) == 2.0
    assert Typical(PADDED, LAUNCHES, steps).seconds(2) == 1.0
    packed = dataclasses.replace(PADDED, packing=Packing(widest=512, even_width=1e9))
    assert Typical(packed, SLOTS, steps).seconds(2) == 2 * 88


def test_a_client_with_a_smaller_batch_has_empty_rows_in_a_shared_pass() -> None:
    steps = [[[8, 8, 8], [8]]]
    assert Typical(PADDED, SLOTS, steps).seconds(1) == 4 * 8
    assert Typical(PADDED, SLOTS, steps).seconds(2) == 6 * 8


def test_many_clients_are_judged_by_whole_groups_of_some() -> None:
    steps = [[[8]] * 1000]
    assert Typical(PADDED, LAUNCHES, steps).seconds(1) == 1000.0
    assert Typical(PADDED, LAUNCHES, steps).seconds(100) == pytest.approx(10.0)
    assert Typical(PADDED, LAUNCHES, steps).seconds(500) == pytest.approx(2.0)


def test_typical_steps_are_the_first_that_each_client_makes() -> None:
    starts = np.cumsum([0, 5, 7, 9, 11])
    table = Tokens(
        np.zeros(starts[-1], dtype=np.int32),
        starts,
        np.zeros(4, dtype=np.int32),
        keys=None,
        targets=np.full(4, np.nan),
        predicts_targets=False,
        parts=("",),
        part_of_row=np.zeros(4, dtype=np.int64),
        left_out=0,
    )
    train = {client: Examples(table, np.arange(4)) for client in (3, 5)}
    reading = dataclasses.replace(PADDED, seed=7, batch_sizes=(1,) * 3 + (3, 1, 2))
    steps = knee.typical_steps(reading, train, (3, 5), 2)
    order = batches.Order(7, 5, 4)
    assert len(steps) == 16
    assert list(steps[1][1]) == [[5, 7, 9, 11][order.at(place)] for place in (2, 3)]
    assert list(map(len, steps[0])) == [3, 2]
    by_turns = knee.typical_steps(reading, train, (3, 5), 1)
    assert by_turns[1] == [steps[1][1]], "with one of two in a round, they take turns"


def _chosen(lengths: list[list[int]]) -> ClientsPerPass:
    """What this process takes part in choosing, of clients with a row of one length each."""
    world = distributed.start(RUN_SECONDS)
    time = PassTime(20.0, 0.0, 1.0, 0.0, runs_ahead=False)
    steps = [[[length] for length in lengths[world.rank]]]
    found = knee.choose(world, LIMIT, (1, 2, 4), Typical(PADDED, time, steps))
    distributed.stop(world)
    return found


@pytest.mark.dist
def test_processes_agree_on_what_the_slowest_is_fast_with() -> None:
    even, uneven, short = [80, 80, 80, 80], [8, 160, 8, 160], [8, 8, 8, 8]
    one, other = on_processes(2, _chosen, [short, short])
    assert one == other
    assert one.clients_per_pass == LIMIT.clients_per_pass, "launches decide"
    one, other = on_processes(2, _chosen, [short, uneven])
    assert (one.clients_per_pass, one) == (1, other)
    alone = on_processes(1, _chosen, [even])[0]
    # 20 + 80, (20 + 160) / 2 and (20 + 320) / 4 for each client
    assert alone.clients_per_pass == LIMIT.clients_per_pass
    assert f"{320 / 340:,.0f} tokens/s are expected with 4" in alone.reason
    assert "100 % of the best" in alone.reason


def _train(speed: Speed, settings: dict[str, Any]) -> None:
    passes.speed_of = lambda _device, _threads: speed
    session.run_session(config_load.validate(settings))


@pytest.mark.dist
def test_a_run_trains_at_the_knee_and_goes_on_there_on_another_machine(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit as with that number asked for, and as never stopped."""

    settings = partial(tiny.named_settings, tiny_folder, tmp_path)
    on_processes(1, _train, NO_LAUNCH, settings("auto", num_rounds=1))
    resolved = json.loads((tmp_path / "auto" / "config.json").read_text())["resolved"]
    assert (
        resolved["clients_per_pass"]
        == runs.newest_facts(tmp_path / "auto")["clients_per_pass"]
        == 1
    )
    assert "of the best" in resolved["clients_per_pass_reason"]
    on_processes(1, _train, ONLY_LAUNCH, settings("auto", num_rounds=2))
    assert runs.newest_facts(tmp_path / "auto")["clients_per_pass"] == 1
    on_processes(1, _train, ONLY_LAUNCH, settings("one", num_rounds=2, clients_per_pass=1))
    on_processes(1, _train, ONLY_LAUNCH, settings("all", num_rounds=1))
    assert runs.newest_facts(tmp_path / "all")["clients_per_pass"] > 4
    on_processes(1, _train, NO_LAUNCH, settings("three", num_rounds=1, clients_per_pass=3))
    assert runs.newest_facts(tmp_path / "three")["clients_per_pass"] == 3, "a number is a number"
    assert runs.identical(runs.adapters(tmp_path / "auto"), runs.adapters(tmp_path / "one"))


def _taken_on_shards() -> tuple[int, int]:
    passes.speed_of = lambda _device, _threads: NO_LAUNCH
    world = distributed.start(RUN_SECONDS)
    job = Job("tiny", None, None, None, "text", "fp32", 4, 2, 24, 1, 4, "all-linear")
    run = SfedRounds(material.material(job, world), "all").run
    run = dataclasses.replace(run, sharing=LIMIT)
    model = run.backbone.model
    shards = dataclasses.replace(run, backbone=Backbone(model, None, Sharding("zero3", ""), None))
    found = [passes.at_the_knee(one).clients.clients_per_pass for one in (run, shards)]
    distributed.stop(world)
    return found[0], found[1]


def test_shards_are_gathered_for_as_many_as_fit() -> None:
    assert on_processes(1, _taken_on_shards)[0] == (1, 4)
