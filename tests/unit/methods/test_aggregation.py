"""Property 1: the federated mean is the formula, on non-square layers, for every placement."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfed.clients.store import ClientStore
from sfed.config.sections.federated import FederatedSection
from sfed.data import partition
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.lora.layout import Layout
from sfed.methods import aggregation, scaling
from sfed.methods.aggregation import ServerSide
from sfed.methods.server_optimizer import ServerOptimizer
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

# DESIGN section 8: d = 3, k = 2, r = 2, N = 3.
A = torch.tensor([[[1.0, 2], [3, 4]], [[2, 0], [0, 2]], [[-1, 1], [1, -1]]])
B = torch.tensor([[[1.0, 0], [0, 1], [1, 1]], [[0, 1], [1, 0], [2, 2]], [[1, 1], [1, 1], [0, 1]]])
LAYOUT = Layout.of([("layer", 2, 3)], lora_rank=2)
MEAN_A = [[2 / 3, 1], [4 / 3, 5 / 3]]
MEAN_B = [[2 / 3, 2 / 3], [2 / 3, 2 / 3], [1, 4 / 3]]
EXAMPLES = (10, 20, 70)
# Examples, who takes part, the means of A and B.
WORKED: dict[str, tuple[tuple | None, tuple, list, list]] = {
    "uniform": (None, (0, 1, 2), MEAN_A, MEAN_B),
    "by examples": (
        *(EXAMPLES, (0, 1, 2), [[-0.2, 0.9], [1.0, 0.1]]),
        [[0.8, 0.9], [0.9, 0.8], [0.5, 1.2]],
    ),
    "two of three": (None, (0, 2), [[0, 1.5], [2, 1.5]], [[1, 0.5], [0.5, 1], [0.5, 1]]),
    "two of three by examples": (
        *(EXAMPLES, (0, 2), [[-0.75, 1.125], [1.25, -0.375]]),
        [[1, 0.875], [0.875, 1], [0.125, 1]],
    ),
}


def three_clients(own: range) -> ClientStore:
    clients = ClientStore(own, LAYOUT, torch.device("cpu"), clients_per_pass=len(own), moments=())
    for client in own:
        clients.set_own(client, {"a": A[client].flatten(), "b": B[client].flatten()})
    return clients


Shared = tuple[int, dict[int, torch.Tensor]]


def shared(asked: list[tuple[tuple[str, ...], list[float]]]) -> list[Shared]:
    """Bytes and own rows after sharing these factors with these weights, each from the start."""
    world = distributed.start(RUN_SECONDS)
    try:
        found = []
        for factors, weights in asked:
            clients = three_clients(partition.place(3, world.size)[world.rank])
            sent = aggregation.share(world, clients, factors, weights)
            found.append((sent, {client: clients.row(client) for client in clients.own}))
        sync.barrier(world, "end")  # nobody leaves while another still connects,
        sync.leave_store_last(world)  # and the store not before all have read that
        return found
    finally:
        distributed.stop(world)


def rows_after(num: int, factors: tuple[str, ...], many: list[list[float]]) -> list[dict]:
    """Factors of each client, for each of these weights."""
    of_processes = on_processes(num, shared, [(factors, weights) for weights in many])
    return [
        {c: (row[:4].view(2, 2), row[4:].view(3, 2)) for _, held in some for c, row in held.items()}
        for some in zip(*of_processes, strict=True)
    ]


@pytest.mark.dist
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_the_mean_is_the_worked_example(num_processes: int) -> None:
    many = [
        aggregation.normalised_weights(3, participants, counts)
        for counts, participants, _, _ in WORKED.values()
    ]
    all_after = rows_after(num_processes, ("A", "B"), many)
    for (name, (_, _, *means)), after in zip(WORKED.items(), all_after, strict=True):
        for client in range(3):
            for found, mean in zip(after[client], means, strict=True):
                torch.testing.assert_close(found, torch.tensor(mean), msg=f"{name}: {found}")


@pytest.mark.dist
def test_sharing_a_leaves_every_b_alone_and_gives_the_worked_products() -> None:
    [after] = rows_after(2, ("A",), [[1 / 3] * 3])
    for client, (a, b) in after.items():
        assert torch.equal(b, B[client])
        torch.testing.assert_close(a, torch.tensor(MEAN_A))
    product = after[0][1] @ after[0][0]
    torch.testing.assert_close(product, torch.tensor([[2 / 3, 1], [4 / 3, 5 / 3], [2, 8 / 3]]))
    # mean_i(B_i A) = (mean_i B_i) A exactly, once A is shared; before that it is not.
    mean_of_products = torch.stack([b @ a for a, b in after.values()]).mean(dim=0)
    mean_b = torch.stack([b for _, b in after.values()]).mean(dim=0)
    torch.testing.assert_close(mean_of_products, mean_b @ after[0][0])
    unshared = torch.einsum("cor,cri->oi", B, A) / 3
    torch.testing.assert_close(unshared, torch.tensor([[1 / 3, 4 / 3], [5 / 3, 4 / 3], [3, 3]]))
    assert not torch.allclose(unshared, B.mean(dim=0) @ A.mean(dim=0))


@pytest.mark.dist
def test_the_message_is_exactly_the_shared_factor_whatever_the_number_of_clients() -> None:
    numbers = {("A",): 4, ("B",): 6, ("A", "B"): 10, (): 0}
    for num_processes in (1, 3):
        asked = [(factors, [1 / 3] * 3) for factors in numbers]
        for found in on_processes(num_processes, shared, asked):
            assert [sent for sent, _ in found] == [4 * count for count in numbers.values()]


def test_a_client_of_weight_zero_cannot_spread_nan() -> None:
    world = distributed.start(RUN_SECONDS)
    try:
        rows = torch.tensor([[1.0, 2], [float("nan"), float("inf")], [3, 6]])
        total = aggregation.weighted_sum(rows, [0.5, 0.0, 0.5])
        [mean] = aggregation.mean_over_clients(world, [total])
    finally:
        distributed.stop(world)
    assert torch.equal(mean, torch.tensor([2.0, 4.0]))


@given(
    counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=12),
    data=st.data(),
)
def test_weights_sum_to_one_over_the_participants_and_are_zero_elsewhere(
    counts: list[int], data: st.DataObject
) -> None:
    chosen = data.draw(st.sets(st.sampled_from(range(len(counts))), min_size=1))
    for given_counts in (None, counts):
        weights = aggregation.normalised_weights(len(counts), sorted(chosen), given_counts)
        assert abs(sum(weights) - 1.0) < 1e-9
        assert {i for i, weight in enumerate(weights) if weight > 0} == chosen


@given(order=st.permutations(range(5)), seed=st.integers(0, 1000))
def test_the_mean_does_not_depend_on_the_order_of_the_clients(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 7, generator=generator)
    weights = torch.rand(5, generator=generator)
    weights /= weights.sum()
    world = distributed.start(RUN_SECONDS)
    try:
        straight, mixed = aggregation.mean_over_clients(
            world,
            [
                aggregation.weighted_sum(rows, weights.tolist()),
                aggregation.weighted_sum(rows[order], weights[order].tolist()),
            ],
        )
    finally:
        distributed.stop(world)
    torch.testing.assert_close(straight, mixed, rtol=1e-5, atol=1e-6)
    assert bool((straight <= rows.max(dim=0).values + 1e-5).all())
    assert bool((straight >= rows.min(dim=0).values - 1e-5).all())


# --- clients of different ranks ----------------------------------------------------------------

MIXED = (1, 3, 2)
WIDE = dataclasses.replace(Layout.of([("layer", 2, 3)], lora_rank=3), ranks=MIXED)
GAMMAS = (2.0, 0.5, 1.0)


def own_factors(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r_i, 2) and B (3, r_i) of a client."""
    generator = torch.Generator().manual_seed(client)
    rank = MIXED[client]
    return torch.randn(rank, 2, generator=generator), torch.randn(3, rank, generator=generator)


def three_of_mixed_ranks(own: range, *, paged: bool) -> ClientStore:
    """Clients with zeros beyond their ranks; before, all A were 5 and all B were 7."""
    clients = ClientStore(
        own,
        WIDE,
        torch.device("cpu"),
        clients_per_pass=1 if paged else len(own),
        moments=(),
    )
    clients.set_shared("A", torch.full((6,), 5.0))
    clients.set_shared("B", torch.full((9,), 7.0))
    for client in own:
        a, b = torch.zeros(3, 2), torch.zeros(3, 3)
        rank = MIXED[client]
        a[:rank], b[:, :rank] = own_factors(client)
        clients.set_own(client, {"a": a.flatten(), "b": b.flatten()})
    return clients


def mixed_after(
    many: list[list[float]], paged: bool
) -> list[tuple[dict, torch.Tensor, torch.Tensor]]:
    """Rows after the mean of A; the global row before it would not be exact, so after it."""
    world = distributed.start(RUN_SECONDS)
    try:
        found = [_mixed_after(world, weights, paged) for weights in many]
        sync.barrier(world, "end")
        sync.leave_store_last(world)
        return found
    finally:
        distributed.stop(world)


def _mixed_after(
    world: World, weights: list[float], paged: bool
) -> tuple[dict, torch.Tensor, torch.Tensor]:
    clients = three_of_mixed_ranks(partition.place(3, world.size)[world.rank], paged=paged)
    aggregation.share(world, clients, ("A",), weights)
    everyone = [0.2, 0.3, 0.5]
    of_all = aggregation.global_row(world, clients, everyone, ("B",), GAMMAS)
    rows = {client: clients.row(client) for client in clients.own}
    aggregation.share(world, clients, ("B",), weights)
    of_shared = aggregation.global_row(world, clients, everyone, (), GAMMAS)
    own = {client: (rows[client], clients.row(client)) for client in clients.own}
    return own, of_all, of_shared


@pytest.mark.dist
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_a_row_is_the_mean_over_those_that_hold_it(num_processes: int) -> None:
    """And keeps its value where nobody of the cohort does: 5 of A, 7 of B."""
    many = [[0.2, 0.3, 0.5], [0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]
    of_processes = on_processes(num_processes, mixed_after, many, num_processes == 1)
    for weights, found in zip(many, zip(*of_processes, strict=True), strict=True):
        _require_means_over_holders(weights, found)


def _require_means_over_holders(weights: list[float], found: tuple) -> None:
    a_mean, b_mean = torch.full((3, 2), 5.0), torch.full((3, 3), 7.0)
    for row in range(3):
        holders = [c for c in range(3) if MIXED[c] > row and weights[c] > 0]
        total = sum(weights[c] for c in holders)
        if holders:
            a_mean[row] = sum(weights[c] / total * own_factors(c)[0][row] for c in holders)
            b_mean[:, row] = sum(weights[c] / total * own_factors(c)[1][:, row] for c in holders)
    everyone, with_own, with_mean = [0.2, 0.3, 0.5], torch.zeros(3, 2), torch.zeros(3, 2)
    for own, _, _ in found:
        for client, (after_a, after_b) in own.items():
            rank = MIXED[client]
            a, b = after_a[:6].view(3, 2), after_b[6:].view(3, 3)
            torch.testing.assert_close(a[:rank], a_mean[:rank])
            torch.testing.assert_close(b[:, :rank], b_mean[:, :rank])
            assert not a[rank:].any() and not b[:, rank:].any()
            factor = everyone[client] * GAMMAS[client]
            with_own += factor * own_factors(client)[1] @ a_mean[:rank]
            with_mean += factor * b_mean[:, :rank] @ a_mean[:rank]
    for _, of_all, of_shared in found:
        for row, expected in ((of_all, with_own), (of_shared, with_mean)):
            torch.testing.assert_close(row[6:].view(3, 3) @ row[:6].view(3, 2), expected)


def test_rows_that_few_hold_do_not_shrink_from_mean_to_mean() -> None:
    """As in a mean with zeros for the others, round after round."""
    world = distributed.start(RUN_SECONDS)
    try:
        clients = three_of_mixed_ranks(range(3), paged=False)
        norms = []
        for _ in range(3):
            aggregation.share(world, clients, ("A",), [1 / 3] * 3)
            norms.append(float(clients.row(1)[:6].norm()))
            clients.set_own(1, {"a": clients.factor(1, "A").clone()})
        assert norms == pytest.approx([norms[0]] * 3)
    finally:
        distributed.stop(world)


def test_the_mean_of_drawn_a_has_the_variance_that_gamma_makes_up_for() -> None:
    """gamma_i |A[:r_i]| is alpha sigma sqrt(k) for every client, whatever its rank."""
    in_features, everyone = 512, [0.1, 0.2, 0.3, 0.4]
    for ranks in ((4, 8, 64, 64), (2, 2, 2, 32), (16, 4, 128, 8)):
        wide = Layout.of([("layer", in_features, 3)], lora_rank=max(ranks))
        layout = dataclasses.replace(wide, ranks=ranks)
        world = distributed.start(RUN_SECONDS)
        try:
            cpu = torch.device("cpu")
            clients = ClientStore(range(4), layout, cpu, clients_per_pass=4, moments=())
            draws = torch.randn(4, max(ranks), in_features, generator=torch.manual_seed(1))
            for draw, rank in zip(draws, ranks, strict=True):
                draw[rank:] = 0.0
            aggregation.share_draws(world, clients, draws.flatten(1), everyone)
            gammas = scaling.client_scalings(3.0, ranks, everyone, scaling.EXPONENTS["sfed"])
            for client, gamma in enumerate(gammas):
                size = gamma * float(clients.factor(client, "A").norm())
                assert size == pytest.approx(3.0 * in_features**0.5, rel=0.08), (ranks, client)
        finally:
            distributed.stop(world)


def padded(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (3, 2) and B (3, 3) of a client, with zeros beyond its rank."""
    a, b = torch.zeros(3, 2), torch.zeros(3, 3)
    rank = MIXED[client]
    a[:rank], b[:, :rank] = own_factors(client)
    return a, b


def mixed_share(server: ServerSide, rounds: list[list[float]]) -> ClientStore:
    """Rounds after each of which clients hold the same again, on one process."""
    world = distributed.start(RUN_SECONDS)
    try:
        clients = three_of_mixed_ranks(range(3), paged=False)
        for weights in rounds:
            for client in range(3):
                a, b = padded(client)
                clients.set_own(client, {"a": a.flatten(), "b": b.flatten()})
            aggregation.share(world, clients, ("A", "B"), weights, server)
        return clients
    finally:
        distributed.stop(world)


@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], [0.5, 0.0, 0.5]])
def test_the_zero_padded_mean_counts_missing_rows_as_zeros(weights: list[float]) -> None:
    """A row that nobody of the cohort holds keeps its value in it too: 5 of A, 7 of B."""
    clients = mixed_share(ServerSide(zero_padded=True), [weights])
    a = sum(w * padded(c)[0] for c, w in enumerate(weights))
    b = sum(w * padded(c)[1] for c, w in enumerate(weights))
    if weights[1] == 0:
        a[2], b[:, 2] = 5.0, 7.0
    torch.testing.assert_close(clients.shared("A").view(3, 2), a)
    torch.testing.assert_close(clients.shared("B").view(3, 3), b)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadagrad", "fedyogi", "fedadam"])
@pytest.mark.parametrize("zero_padded", [False, True])
def test_a_server_optimizer_leaves_rows_alone_that_nobody_of_the_cohort_holds(
    kind: str, zero_padded: bool
) -> None:
    """Its state of them too: row 2 is held by client 1 alone, who is out in the second round."""
    of_all, without = [0.2, 0.3, 0.5], [0.5, 0.0, 0.5]
    optimizer = ServerOptimizer.of(FederatedSection(server_optimizer=kind))
    one = mixed_share(ServerSide(optimizer, zero_padded=zero_padded), [of_all])
    two = mixed_share(ServerSide(optimizer, zero_padded=zero_padded), [of_all, without])
    state = {name for name in one.common_state if name.startswith("a_")}
    assert state == ({"a_m"} if kind == "fedavgm" else {"a_m", "a_v"})
    pairs = [(one.shared("A"), two.shared("A"))]
    pairs += [(one.common_state[name], two.common_state[name]) for name in sorted(state)]
    for before, after in pairs:
        assert torch.equal(after.view(3, 2)[2], before.view(3, 2)[2])
        assert not torch.equal(after.view(3, 2)[:2], before.view(3, 2)[:2])
    assert not torch.equal(one.shared("A").view(3, 2)[2], torch.full((2,), 5.0))


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_a_server_optimizer_begins_with_rows_when_they_are_first_held(kind: str) -> None:
    optimizer = ServerOptimizer.of(FederatedSection(server_optimizer=kind))
    server = ServerSide(optimizer)
    late = mixed_share(server, [[0.5, 0.0, 0.5], [0.2, 0.3, 0.5]])
    first = mixed_share(server, [[0.2, 0.3, 0.5]])
    assert torch.equal(late.shared("A").view(3, 2)[2], first.shared("A").view(3, 2)[2])
