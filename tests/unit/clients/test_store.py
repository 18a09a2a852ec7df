"""Clients at rest and in a pass: what is common exists once, and paging changes no bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfed.clients import store as client_store
from sfed.clients.offload import HostOffload
from sfed.clients.state import MOMENTS, PassState
from sfed.clients.store import ClientStore, groups
from sfed.distributed import world as distributed
from sfed.lora.factors import PassRows
from sfed.lora.layout import Layout
from sfed.methods import aggregation
from tests.support import runs, tiny
from tests.support.deadlines import RUN_SECONDS

LAYOUT = Layout.of([("q", 5, 7), ("v", 3, 4)], lora_rank=2)
CPU = torch.device("cpu")
N = 6
ALL = ("A", "B")


def make(clients_per_pass: int, num_clients: int = N) -> ClientStore:
    own = range(num_clients)
    return ClientStore(own, LAYOUT, CPU, clients_per_pass=clients_per_pass, moments=MOMENTS)


def train(rows: PassState, factors: tuple[str, ...], seed: int) -> None:
    """Something that depends on the client, its state and the seed only."""
    for position, client in enumerate(rows.clients):
        generator = torch.Generator().manual_seed(1000 * seed + client)
        for factor in factors:
            columns = LAYOUT.columns(factor)
            for number, tensor in enumerate((rows.values, *rows.moments.values())):
                change = torch.randn(tensor[position, columns].shape, generator=generator)
                tensor[position, columns] = tensor[position, columns] * 0.9 + change * (number + 1)
        rows.optimizer_steps[position] += 1


def a_round(
    clients: ClientStore, cohort: tuple[int, ...], trained: tuple[str, ...], seed: int
) -> None:
    shared = list(groups(cohort, clients.clients_per_pass))
    with closing(clients.passes(shared, trained)) as passes:
        for rows in passes:
            train(rows, trained, seed)


def state_of(clients: ClientStore) -> tuple:
    """All that a client is, by client."""
    found = []
    copied = copy.deepcopy(clients)  # a pass notes its clients as changed
    with closing(copied.passes(list(groups(clients.own, clients.clients_per_pass)), ())) as passes:
        for rows in passes:
            tensors = (rows.values, rows.moments["exp_avg"], rows.moments["exp_avg_sq"])
            found += [
                [tensor[position].clone() for tensor in (*tensors, rows.optimizer_steps)]
                for position in range(len(rows.clients))
            ]
    return tuple(found)


def assert_same(one: ClientStore, other: ClientStore) -> None:
    for client, (mine, theirs) in enumerate(zip(state_of(one), state_of(other), strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), client


@settings(deadline=None, max_examples=30)
@given(
    per_pass=st.integers(1, N - 1),
    course=st.lists(
        st.tuples(
            st.sets(st.integers(0, N - 1), min_size=1),
            st.sampled_from([("A", "B"), ("B",), ("A",)]),
            st.sampled_from([("A",), ("B",), ("A", "B"), ()]),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_paged_clients_are_bit_for_bit_those_that_stay(per_pass: int, course: list) -> None:
    world = distributed.start(RUN_SECONDS)
    try:
        paged, staying = make(per_pass), make(N)
        for clients in (paged, staying):
            for client in clients.own:
                generator = torch.Generator().manual_seed(client)
                clients.set_own(
                    client, {"a": torch.randn(clients.widths["a"], generator=generator)}
                )
        for seed, (cohort, trained, averaged, resets) in enumerate(course):
            weights = aggregation.normalised_weights(N, sorted(cohort), range(1, N + 1))
            for clients in (paged, staying):
                a_round(clients, tuple(sorted(cohort)), trained, seed)
                aggregation.share(world, clients, averaged, weights)
                if resets:
                    clients.reset_optimizer()
            everyone = [1 / N] * N
            rows = [aggregation.global_row(world, c, everyone, ("B",)) for c in (paged, staying)]
            assert torch.equal(*rows)
            assert aggregation.similarity(world, paged) == aggregation.similarity(world, staying)
            assert_same(paged, staying)
    finally:
        distributed.stop(world)


@settings(deadline=None, max_examples=20)
@given(
    ranks=st.lists(st.integers(1, 3), min_size=N, max_size=N),
    per_pass=st.integers(1, N),
    cohorts=st.lists(st.sets(st.integers(0, N - 1), min_size=1), min_size=1, max_size=3),
    averaged=st.sampled_from([("A",), ("B",), ("A", "B"), ()]),
)
def test_clients_of_a_smaller_rank_have_zeros_beyond_it_wherever_they_are(
    ranks: list[int], per_pass: int, cohorts: list, averaged: tuple
) -> None:
    """In a pass, at rest, alone on the device, and in what is exported."""
    layout = Layout.of([("q", 5, 7), ("v", 3, 4)], lora_rank=max(ranks))
    layout = dataclasses.replace(layout, ranks=tuple(ranks))
    world = distributed.start(RUN_SECONDS)
    try:
        clients = ClientStore(range(N), layout, CPU, clients_per_pass=per_pass, moments=MOMENTS)
        for factor in ALL:
            clients.set_shared(factor, torch.ones(clients.widths[factor.lower()]))
        for cohort in cohorts:
            some = sorted(cohort)
            with closing(clients.passes(list(groups(some, per_pass)), ALL)) as passes:
                for rows in passes:
                    assert_padded(layout, rows.clients, rows.values)
                    rows.values.mul_(torch.tensor(rows.clients)[:, None] + 1.0)
            weights = aggregation.normalised_weights(N, some, None)
            aggregation.share(world, clients, averaged, weights)
        assert_padded(layout, clients.own, clients.load_values(clients.own))
        for client in clients.own:
            assert_padded(layout, [client], clients.load_values([client]))
            assert_padded(layout, [client], clients.row(client)[None])
    finally:
        distributed.stop(world)


@pytest.mark.parametrize("per_pass", [1, 2, N])
def test_a_client_takes_the_common_b_with_its_own_factor_once(per_pass: int) -> None:
    """Wherever its row is made up; what it holds of its own is as it is."""
    scales = (2.0, 1.0, 0.5, *([1.0] * (N - 3)))
    layout = dataclasses.replace(
        Layout.of([("q", 5, 7)], lora_rank=2), ranks=(1, *([2] * (N - 1))), b_scales=scales
    )
    clients = ClientStore(range(N), layout, CPU, clients_per_pass=per_pass, moments=())
    clients.set_shared("A", torch.ones(clients.widths["a"]))
    clients.set_shared("B", torch.ones(clients.widths["b"]))
    clients.set_own(2, {"b": torch.full((clients.widths["b"],), 3.0)})
    common, held = clients.collect_changes(also=clients.holders)
    clients.restore(common, held.items())
    expected = {client: 3.0 if client == 2 else scales[client] for client in range(N)}

    def check(client: int, row: torch.Tensor) -> None:
        b = row[layout.columns("B")].view(7, 2)
        rank = layout.rank_of(client)
        assert (b[:, :rank] == expected[client]).all() and not b[:, rank:].any()
        assert (row[layout.columns("A")].view(2, 5)[:rank] == 1).all()

    for _ in range(2):
        with closing(clients.passes(list(groups(range(N), per_pass)), ())) as passes:
            for rows in passes:
                for client, row in zip(rows.clients, rows.values, strict=True):
                    check(client, row)
    for client in range(N):
        check(client, clients.row(client))
        check(client, clients.load_values([client])[0])
    assert clients.shared("B").eq(1).all()


def assert_padded(layout: Layout, clients: Sequence[int], rows: torch.Tensor) -> None:
    """Zeros beyond the rank of each client, and nothing else is zero."""
    for factor in ALL:
        for view in layout.along_rank(factor, rows[:, layout.columns(factor)]):
            for client, values in zip(clients, view, strict=True):
                rank = layout.rank_of(client)
                assert values[:, :rank].all() and not values[:, rank:].any()


def test_the_device_holds_two_groups_whatever_the_number_of_clients() -> None:
    def on_the_device(num_clients: int) -> int:
        clients = make(2, num_clients)
        a_round(clients, tuple(range(num_clients)), ALL, 0)
        resting = {id(t) for c in clients.own for t in clients._parts[c].values()}
        resting |= {id(t) for t in clients._common.values()}
        memory = {t.untyped_storage().data_ptr(): t for t in clients.memory()}
        return sum(t.untyped_storage().nbytes() for t in memory.values() if id(t) not in resting)

    # Two groups of two rows: values, two moments and steps each; one of gradients for both. A row
    # of 38 numbers has room for 64.
    assert on_the_device(6) == on_the_device(60) == 4 * (2 * 2 * (3 * 64 + 3) + 2 * 64)


def test_who_has_never_taken_part_costs_nothing_and_a_mean_leaves_one_a() -> None:
    world = distributed.start(RUN_SECONDS)
    try:
        clients = make(2, 1000)
        a_round(clients, (3, 500, 900), ALL, 0)
        held = {c: set(parts) for c, parts in clients._parts.items() if parts}
        assert held.keys() == {3, 500, 900}
        assert clients.owners("A") == [3, 500, 900]
        weights = aggregation.normalised_weights(1000, (3, 500, 900), None)
        aggregation.share(world, clients, ("A",), weights)
        assert clients.owners("A") == []
        assert clients.owners("B") == [3, 500, 900]
        assert torch.equal(clients.factor(3, "A"), clients.factor(0, "A"))
        assert clients.factor(7, "A").data_ptr() == clients.factor(8, "A").data_ptr()
    finally:
        distributed.stop(world)


def test_a_factor_that_never_trains_is_never_held() -> None:
    clients = make(2)
    a_round(clients, tuple(range(N)), ("B",), 0)
    assert clients.owners("A") == []
    assert set(clients._parts[0]) == {"b", "b_exp_avg", "b_exp_avg_sq", "optimizer_steps"}


@pytest.mark.parametrize("clients_per_pass", [2, N])
def test_changes_are_those_since_the_last_time_and_stay_as_they_were(clients_per_pass: int) -> None:
    clients = make(clients_per_pass)
    a_round(clients, (1, 4), ALL, 0)
    _, changed = clients.collect_changes()
    assert set(changed) == {1, 4}
    kept = {c: {name: t.clone() for name, t in parts.items()} for c, parts in changed.items()}
    assert clients.collect_changes()[1] == {}
    a_round(clients, (0, 4), ALL, 1)
    for client, parts in kept.items():
        assert all(torch.equal(changed[client][name], part) for name, part in parts.items())
    common, later = clients.collect_changes()
    assert set(later) == {0, 4}
    other = make(N + 2 - clients_per_pass)
    other.restore(common, {**changed, **later}.items())
    assert_same(clients, other)
    assert other.collect_changes()[1] == {}
    assert set(other.collect_changes(also=other.holders)[1]) == {0, 1, 4}


class LateFerry(HostOffload):
    """A GPU at its slowest: a copy is made, in order, when somebody waits for it and not before."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._asked: list[Callable[[], object]] = []
        self._done = 0

    def bring(self, place: torch.Tensor, held: torch.Tensor | None) -> None:
        self._asked.append(lambda: HostOffload.bring(self, place, held))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(tensor, torch.nan)
        self._asked.append(lambda: kept.copy_(tensor))
        return kept

    def mark(self) -> int:
        return len(self._asked)

    def wait(self, mark: int) -> None:
        while self._done < mark:
            self._asked[self._done]()
            self._done += 1

    def finish(self) -> None:
        self.wait(len(self._asked))


@pytest.mark.parametrize("per_pass", [1, 2, 4])
def test_copies_that_come_as_late_as_they_may_change_nothing(
    per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = distributed.start(RUN_SECONDS)
    try:
        prompt = make(per_pass)
        monkeypatch.setattr(client_store, "HostOffload", LateFerry)
        late = make(per_pass)
        for clients in (prompt, late):
            for seed, cohort in enumerate([(0, 1, 2, 3, 4, 5), (1, 2, 5), (0, 2, 3, 4)]):
                a_round(clients, cohort, ALL, seed)
                weights = aggregation.normalised_weights(N, cohort, None)
                aggregation.share(world, clients, ("A",), weights)
                clients.collect_changes()
        assert all(bool(torch.isfinite(late.row(client)).all()) for client in late.own)
        assert_same(prompt, late)
    finally:
        distributed.stop(world)


def test_a_round_that_is_broken_off_keeps_what_was_trained() -> None:
    clients = make(2)
    with closing(clients.passes([(0, 1), (2, 3)], ALL)) as passes:
        for rows in passes:
            train(rows, ALL, 0)
            break
    assert clients.owners("B") == [0, 1]


SHAPES = {
    "sfed": {},
    "partial": {"clients_per_round": 3},
    "fedit": {"method": "fedit"},
    "local": {"method": "local"},
    "ffa": {"method": "ffa"},
    "rolora": {"method": "rolora", "clients_per_round": 4},
    "reset": {"optimizer_state": "reset", "clients_per_round": 4},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_paged_run_ends_with_the_adapters_of_one_that_stays(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow twin: the same passes, with all clients where they are used."""
    federated = {"num_clients": 5, "num_rounds": 3, "clients_per_pass": 2, **SHAPES[name]}

    def run(out: str) -> dict:
        from sfed.config import load as config_load
        from sfed.federated import session

        output = {"dir": str(tmp_path), "name": out}
        own = tiny.settings(tiny_folder, federated=federated, output=output)
        session.run_session(config_load.validate(own))
        return runs.adapters(tmp_path / out)

    paged = run("paged")
    original = ClientStore.__init__

    def all_stay(self: ClientStore, own: range, *arguments: object, **named: object) -> None:
        original(self, own, *arguments, **{**named, "clients_per_pass": len(own)})

    monkeypatch.setattr(ClientStore, "__init__", all_stay)
    assert runs.identical(paged, run("staying"))


@pytest.mark.parametrize("per_pass", [2, 3])
def test_rows_of_a_pass_begin_at_addresses_that_matrix_products_like(per_pass: int) -> None:
    assert LAYOUT.size % 64, "every row would begin so by itself"
    clients = make(per_pass, num_clients=3)
    with closing(clients.passes([(0, 1)], ALL)) as passes:
        for rows in passes:
            for tensor in (rows.values, rows.grads, *rows.moments.values()):
                assert tensor.shape == (2, LAYOUT.size)
                assert all(row.data_ptr() % 64 == 0 for row in tensor)
            half = PassRows(rows.values, rows.grads, torch.bfloat16)
            assert all(row.data_ptr() % 64 == 0 for row in half.values_CN)
