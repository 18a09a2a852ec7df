"""The bound on what one client can move, in exact arithmetic: no rounding is excused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfed.clients.store import ClientStore
from sfed.lora.layout import Layout
from sfed.privacy.accounting import Sampling
from sfed.privacy.clipping import UNITS, clipped_sum
from sfed.privacy.guarantee import AdaptiveClip, Guarantee

# d = 3, k = 2, r = 2: 4 numbers of A and 6 of B.
LAYOUT = Layout.of([("layer", 2, 3)], lora_rank=2)
FACTORS = ("A", "B")
SIZES = {"A": 4, "B": 6}
NUMBERS = st.floats(-1e6, 1e6, width=32)
CHANGES = st.lists(st.lists(NUMBERS, min_size=10, max_size=10), min_size=2, max_size=4)


def store(changes: list[list[float]], *, start: float = 0.25) -> ClientStore:
    """Clients who received ``start`` everywhere and changed it so."""
    clients = ClientStore(
        range(len(changes)), LAYOUT, torch.device("cpu"), clients_per_pass=1, moments=()
    )
    for factor, size in SIZES.items():
        clients.set_shared(factor, torch.full((size,), start))
    for client, change in enumerate(changes):
        row = start + torch.tensor(change, dtype=torch.float32)
        clients.set_own(client, {"a": row[:4], "b": row[4:]})
    return clients


def units_of(
    clients: ClientStore, factors: Sequence[str], participants: Sequence[int], clip: float
) -> torch.Tensor:
    return clipped_sum(clients, factors, participants, clip)[0]


def square(units: torch.Tensor) -> int:
    """The exact square of a norm."""
    return sum(int(one) ** 2 for one in units.tolist())


@given(changes=CHANGES, clip=st.floats(1e-6, 1e6))
def test_a_client_less_moves_the_sum_by_at_most_the_clip(
    changes: list[list[float]], clip: float
) -> None:
    clients = store(changes)
    everyone = units_of(clients, FACTORS, clients.own, clip)
    for client in clients.own:
        others = [other for other in clients.own if other != client]
        assert square(everyone - units_of(clients, FACTORS, others, clip)) <= UNITS**2


@given(changes=CHANGES, other=st.lists(NUMBERS, min_size=10, max_size=10))
def test_a_client_replaced_moves_the_sum_by_at_most_twice_the_clip(
    changes: list[list[float]], other: list[float]
) -> None:
    before = units_of(store(changes), FACTORS, range(len(changes)), 1.0)
    after = units_of(store([other, *changes[1:]]), FACTORS, range(len(changes)), 1.0)
    assert square(before - after) <= (2 * UNITS) ** 2


def test_opposite_clients_reach_the_bounds() -> None:
    """So the bounds of the two tests above are the smallest ones."""
    far = [1000.0] + [0.0] * 9
    one = units_of(store([far, [0.0] * 10]), FACTORS, (0, 1), 0.5)
    other = units_of(store([[-1000.0] + [0.0] * 9, [0.0] * 10]), FACTORS, (0, 1), 0.5)
    assert math.isclose(int(one[0]), UNITS, rel_tol=1e-8)
    assert math.isclose(int(one[0] - other[0]), 2 * UNITS, rel_tol=1e-8)


def test_the_factors_of_a_client_are_one_vector() -> None:
    """Clipped by factor, a client could move the sum by the clip times the root of two."""
    clients = store([[3.0, 0, 0, 0, 4.0, 0, 0, 0, 0, 0]])
    units = units_of(clients, FACTORS, (0,), 1.0).double() / UNITS
    expected = torch.tensor([0.6, 0, 0, 0, 0.8, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(units, expected, rtol=1e-8, atol=0)


def test_a_change_within_the_clip_is_what_it_is() -> None:
    change = [0.125, -0.25, 0.5, 0, 0, 0.375, 0, 0, -0.125, 0]
    units = units_of(store([change, change]), FACTORS, (0, 1), 4.0).double() * (4.0 / UNITS)
    expected = 2 * torch.tensor(change, dtype=torch.float64)
    torch.testing.assert_close(units, expected, rtol=1e-8, atol=0)


def test_a_client_that_is_not_finite_or_has_nothing_of_its_own_counts_nothing() -> None:
    clients = store([[1.0] * 10, [math.nan] * 10, [math.inf] + [0.0] * 9])
    everyone = units_of(clients, FACTORS, (0, 1, 2), 1.0)
    assert torch.equal(everyone, units_of(clients, FACTORS, (0,), 1.0))
    clients.set_shared("A", torch.zeros(4))  # nobody has an A of its own any more
    assert not units_of(clients, ("A",), (0, 1, 2), 1.0).any()
    assert units_of(clients, ("A",), (), 1.0).shape == (4,)


def test_the_sum_has_the_same_bits_in_any_order() -> None:
    generator = np.random.default_rng(0)
    clients = store(generator.normal(size=(7, 10)).tolist())
    one = units_of(clients, FACTORS, range(7), 1.0)
    parts = [units_of(clients, FACTORS, some, 1.0) for some in ((6, 2, 4), (5, 0, 1, 3))]
    assert torch.equal(one, parts[0] + parts[1])


def test_the_balance_counts_changes_within_the_clip_against_longer_ones() -> None:
    far = [3.0, 0, 0, 0, 4.0, 0, 0, 0, 0, 0]  # of length 5
    clients = store([far, [0.0] * 10, far, [math.nan] * 10])
    balances = {
        clip: clipped_sum(clients, FACTORS, clients.own, clip)[1] for clip in (4.999, 5.0, 6.0)
    }
    assert balances == {4.999: -1, 5.0: 3, 6.0: 3}
    assert clipped_sum(clients, FACTORS, (), 1.0)[1] == 0


@given(
    changes=CHANGES,
    other=st.lists(NUMBERS, min_size=10, max_size=10),
    noises=st.tuples(st.floats(0.1, 10), st.floats(1.01, 100)),
)
def test_sum_and_balance_together_stay_within_what_the_noise_multiplier_says(
    changes: list[list[float]], other: list[float], noises: tuple[float, float]
) -> None:
    """Each over its noise, one client less moves both by 1 / z, and one replaced by 2 / z."""
    z, above = noises
    adaptive = AdaptiveClip(0.5, 0.2, z / 2 * above)
    spread = Guarantee(Sampling(4, 4, is_poisson=True), 1.0, z, 1e-5, adaptive).sum_multiplier

    def moved(after: tuple[torch.Tensor, int]) -> float:
        length = math.sqrt(square(everyone[0] - after[0])) / UNITS / spread
        return math.hypot(length, (everyone[1] - after[1]) / 2 / adaptive.count_noise)

    clients = store(changes)
    everyone = clipped_sum(clients, FACTORS, clients.own, 1.0)
    assert moved(clipped_sum(clients, FACTORS, clients.own[1:], 1.0)) <= (1 + 1e-9) / z
    replaced = store([other, *changes[1:]])
    assert moved(clipped_sum(replaced, FACTORS, clients.own, 1.0)) <= (2 + 1e-9) / z
