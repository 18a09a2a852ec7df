"""Server steps by layers: what a step gets and gives, on any number of processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfed.clients.store import ClientStore
from sfed.data import partition
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.lora.layout import Layout
from sfed.methods import by_layer
from sfed.methods.by_layer import Assignment, BaseChanges, ByLayer
from sfed.methods.server import CommonLayer, SentLayer
from sfed.utils.errors import UserError
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

SHAPES = [("x.up_proj", 3, 5), ("x.gate_proj", 3, 5), ("y.o_proj", 4, 2), ("z.down_proj", 7, 3)]
LAYOUT = Layout.of(SHAPES, lora_rank=2)
N = 5
ROWS = torch.randn(N, LAYOUT.size, generator=torch.Generator().manual_seed(1))
WEIGHTS = [0.1, 0.0, 0.3, 0.4, 0.2]


def mean(sent: SentLayer) -> CommonLayer:
    """The weighted mean, and how often it was asked, weighted in a way that tells layers apart."""
    count = sent.state.get("count", torch.zeros(1)) + len(sent.layer)
    return CommonLayer(
        {
            factor: torch.einsum("n,nij->ij", sent.weights, values.double()).float()
            for factor, values in sent.factors.items()
        },
        {"count": count},
    )


def first(sent: SentLayer) -> CommonLayer:
    """The factors of the first client that sent, and where the step has its facts from."""
    assert sent.clients == (0, 2, 3, 4)
    assert sent.gamma == 0.5
    assert sent.ranks == (2, 2, 2, 2)
    assert torch.equal(sent.weights, torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=torch.float64))
    for values in sent.before.values():
        assert (values == 7.0).all()
    return CommonLayer({factor: values[0] for factor, values in sent.factors.items()})


def wrong_shape(sent: SentLayer) -> CommonLayer:
    return CommonLayer(sent.factors)


def not_finite(sent: SentLayer) -> CommonLayer:
    return CommonLayer({factor: values[0] / 0.0 for factor, values in sent.factors.items()})


def half(sent: SentLayer) -> CommonLayer:
    return CommonLayer({factor: values[0].half() for factor, values in sent.factors.items()})


def forgets_b(sent: SentLayer) -> CommonLayer:
    return CommonLayer({"A": sent.factors["A"][0]})


def fails(sent: SentLayer) -> CommonLayer:
    raise KeyError(sent.layer)


def nothing(sent: SentLayer) -> None:
    return None


def folds(sent: SentLayer) -> CommonLayer:
    """Changes of the weight of other ranks in each layer, and none of one of them."""
    factors = {factor: values[0] for factor, values in sent.factors.items()}
    common = CommonLayer(factors, {"seed": torch.tensor([sent.seed])})
    if sent.layer == "y.o_proj":
        return common
    (_, width), (out, _) = (sent.before[factor].shape for factor in ("A", "B"))
    draw = torch.Generator().manual_seed(sent.seed)
    q = len(sent.layer) % 5
    u, v = torch.randn(out, q, generator=draw), torch.randn(q, width, generator=draw)
    return dataclasses.replace(common, base_change=(u.double(), v))


def changes_of(change: object) -> object:
    def changes(sent: SentLayer) -> CommonLayer:
        common = {factor: values[0] for factor, values in sent.factors.items()}
        return CommonLayer(common, base_change=change)

    return changes


def stepped(step, factors: tuple[str, ...], rounds: int = 1):
    """Each own client's row, the bytes, and the state of the layers that this process has."""
    world = distributed.start(RUN_SECONDS)
    try:
        placement = partition.place(N, world.size)
        own = placement[world.rank]
        clients = ClientStore(
            own, LAYOUT, torch.device("cpu"), clients_per_pass=len(own), moments=()
        )
        senders = [[c for c in some if WEIGHTS[c] > 0] for some in placement]
        for _ in range(rounds):
            for factor in ("A", "B"):
                width = clients.widths[factor.lower()]
                clients.set_shared(factor, torch.full((width,), 7.0))
            for client in own:
                parts = {f: ROWS[client][LAYOUT.columns(f)] for f in ("A", "B")}
                clients.set_own(client, {name.lower(): part for name, part in parts.items()})
            layers = ByLayer(world, clients, senders, WEIGHTS, [0.5] * N, seed=11)
            shared = layers.share(step, factors)
        sync.barrier(world, "end")
        sync.leave_store_last(world)
        kept = {**clients.server_state, **flat(shared.base_changes)}
        return {c: clients.row(c) for c in own}, shared.num_bytes, kept
    finally:
        distributed.stop(world)


def flat(changes: BaseChanges) -> dict[str, torch.Tensor]:
    return {
        f"change/{name}/{i}": one for name, pair in changes.items() for i, one in enumerate(pair)
    }


def after(num: int, *arguments: object) -> tuple[dict[int, torch.Tensor], list[int], dict]:
    rows, state, sent = {}, {}, []
    for held, num_bytes, kept in on_processes(num, stepped, *arguments):
        rows.update(held)
        changes = {name for name in kept if name.startswith("change/")}
        assert not (state.keys() & kept.keys()) - changes, "a layer is on one process"
        assert not state or changes == {name for name in state if name in changes}
        assert all(torch.equal(state.get(name, kept[name]), kept[name]) for name in changes)
        state.update(kept)
        sent.append(num_bytes)
    return rows, sent, state


@pytest.mark.dist
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_step_gets_what_every_sender_has_and_all_get_its_result(num_processes: int) -> None:
    rows, sent, _ = after(num_processes, first, ("A", "B"))
    assert sorted(rows) == list(range(N))
    for row in rows.values():
        assert torch.equal(row, ROWS[0]), "also for client 1, who sent nothing"
    assert len(set(sent)) == 1


@pytest.mark.dist
@pytest.mark.parametrize("factors", [("A",), ("B",)])
def test_a_factor_that_is_not_sent_stays_each_clients_own(factors: tuple[str, ...]) -> None:
    rows, _, _ = after(2, mean, factors)
    columns = LAYOUT.columns(factors[0])
    expected = torch.einsum("n,nk->k", torch.tensor(WEIGHTS).double(), ROWS.double()).float()
    for client, row in rows.items():
        torch.testing.assert_close(row[columns], expected[columns])
        other = LAYOUT.columns("A" if factors == ("B",) else "B")
        assert torch.equal(row[other], ROWS[client][other])


@pytest.mark.dist
def test_the_result_is_bit_for_bit_that_of_one_process_and_the_state_comes_back() -> None:
    alone, _, state_alone = after(1, mean, ("A", "B"), 3)
    for num_processes in (2, 3, 5):
        rows, _, state = after(num_processes, mean, ("A", "B"), 3)
        assert all(torch.equal(rows[client], alone[client]) for client in alone)
        assert state.keys() == state_alone.keys() == {f"{name}/count" for name, _, _ in SHAPES}
        assert all(torch.equal(state[name], state_alone[name]) for name in state)
    assert float(state_alone["y.o_proj/count"]) == 3 * len("y.o_proj")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("step", "part"),
    [
        (wrong_shape, "A has shape (4, 2, 3)"),
        (not_finite, "A holds numbers that are not finite"),
        (half, "dtype torch.float16"),
        (forgets_b, "it returned the factors A; it has to return those that were sent: A, B"),
        (fails, "it raised KeyError: "),
        (nothing, "it returned NoneType, not a CommonLayer"),
    ],
)
def test_what_is_wrong_with_a_step_is_said_with_its_layer(step, part: str) -> None:
    with pytest.raises(UserError) as caught:
        stepped(step, ("A", "B"))
    message = str(caught.value)
    assert f"the server step {step.__name__} of federated.method, layer " in message
    assert part in message


@given(st.integers(1, 9), st.sampled_from([("A",), ("B",), ("A", "B")]))
def test_every_layer_is_dealt_once_and_none_is_split(num: int, factors: tuple[str, ...]) -> None:
    dealt = Assignment.of(LAYOUT, factors, num)
    names = [name for own in dealt.layers for name in own]
    assert sorted(names) == sorted(name for name, _, _ in SHAPES)
    total = sum(LAYOUT.columns(f).stop - LAYOUT.columns(f).start for f in factors)
    assert sum(map(dealt.width, range(num))) == total


def test_the_message_is_the_factors_of_the_senders_and_a_share_of_the_result() -> None:
    size = LAYOUT.size
    assert by_layer.message_bytes(LAYOUT, ("A", "B"), [[0, 2, 3]]) == 4 * (3 * size + size)
    two = by_layer.message_bytes(LAYOUT, ("A", "B"), [[0], [2, 3]])
    assert 4 * (2 * size + size / 2) <= two < 4 * (2 * size + size)


@pytest.mark.dist
def test_changes_of_weights_reach_every_process_the_same_on_any_number_of_them() -> None:
    _, sent_alone, alone = after(1, folds, ("A", "B"))
    changes = {name for name in alone if name.startswith("change/")}
    assert {n.split("/")[1] for n in changes} == {name for name, _, _ in SHAPES} - {"y.o_proj"}
    for name, width, out in SHAPES:
        if name != "y.o_proj":
            u, v = (alone[f"change/{name}/{i}"] for i in (0, 1))
            assert (u.shape, v.shape) == ((out, len(name) % 5), (len(name) % 5, width))
            assert u.dtype == v.dtype == torch.float32
    seeds = {int(alone[f"{name}/seed"]) for name, _, _ in SHAPES}
    assert len(seeds) == len(SHAPES), "each layer has a seed of its own"
    numbers = sum(alone[name].numel() for name in changes)
    assert sent_alone == [by_layer.message_bytes(LAYOUT, ("A", "B"), [[0, 2, 3, 4]]) + 4 * numbers]
    for num_processes in (2, 4):
        _, _, others = after(num_processes, folds, ("A", "B"))
        assert others.keys() == alone.keys()
        assert all(torch.equal(others[name], alone[name]) for name in alone)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ((torch.ones(5, 2), torch.ones(3, 3)), "the shapes (5, 2) and (3, 3); expected (5, q)"),
        ((torch.ones(3, 2), torch.ones(2, 5)), "expected (5, q) and (q, 3)"),
        ((torch.ones(5, 2), torch.full((2, 3), float("nan"))), "not finite"),
        (torch.ones(5, 3), "no pair of matrices"),
        ((1.0, 2.0), "no pair of matrices"),
    ],
)
@pytest.mark.dist
def test_a_wrong_change_of_a_weight_is_said_with_its_layer(change: object, part: str) -> None:
    """A transposed one among them, which a square layer would not show."""
    with pytest.raises(UserError) as caught:
        stepped(changes_of(change), ("A", "B"))
    assert "layer x." in str(caught.value) or "layer y." in str(caught.value)
    assert part in str(caught.value)


def test_the_bytes_of_changes_are_those_of_the_process_with_most_of_them() -> None:
    total = sum(width + out for _, width, out in SHAPES)
    assert by_layer.base_change_bytes(LAYOUT, ("A", "B"), 6, 1) == 4 * 6 * total
    two = by_layer.base_change_bytes(LAYOUT, ("A", "B"), 6, 2)
    assert 4 * 3 * total <= two < 4 * 6 * total


def test_clients_of_different_ranks_are_sent_with_zeros_beyond_them() -> None:
    layout = dataclasses.replace(LAYOUT, ranks=(2, 1, 1))
    world = distributed.start(RUN_SECONDS)
    seen: list[SentLayer] = []

    def step(sent: SentLayer) -> CommonLayer:
        seen.append(sent)
        return CommonLayer({factor: values[0] for factor, values in sent.factors.items()})

    try:
        cpu = torch.device("cpu")
        clients = ClientStore(range(3), layout, cpu, clients_per_pass=1, moments=())
        for factor in ("A", "B"):
            clients.set_shared(factor, torch.ones(clients.widths[factor.lower()]))
        layers = ByLayer(world, clients, [[0, 2]], [0.5, 0.0, 0.5], [0.5, 1.0, 2.0])
        layers.share(step, ("A", "B"))
    finally:
        distributed.stop(world)
    assert len(seen) == len(SHAPES)
    for sent in seen:
        assert sent.ranks == (2, 1) and sent.gammas.tolist() == [0.5, 2.0]
        assert sent.factors["A"].sum(dim=2).gt(0).tolist() == [[True, True], [True, False]]
        assert sent.factors["B"].sum(dim=1).gt(0).tolist() == [[True, True], [True, False]]
        assert (sent.before["A"] == 1).all()
        with pytest.raises(ValueError, match="different gammas"):
            _ = sent.gamma
