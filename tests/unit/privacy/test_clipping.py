"""The bound on what one client can move, in exact arithmetic: no rounding is excused."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfed.clients.store import ClientStore
from sfed.lora.layout import Layout
from sfed.privacy.clipping import UNITS, clipped_sum

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


def square(units: torch.Tensor) -> int:
    """The exact square of a norm."""
    return sum(int(one) ** 2 for one in units.tolist())


@given(changes=CHANGES, clip=st.floats(1e-6, 1e6))
def test_a_client_less_moves_the_sum_by_at_most_the_clip(
    changes: list[list[float]], clip: float
) -> None:
    clients = store(changes)
    everyone = clipped_sum(clients, FACTORS, clients.own, clip)
    for client in clients.own:
        others = [other for other in clients.own if other != client]
        assert square(everyone - clipped_sum(clients, FACTORS, others, clip)) <= UNITS**2


@given(changes=CHANGES, other=st.lists(NUMBERS, min_size=10, max_size=10))
def test_a_client_replaced_moves_the_sum_by_at_most_twice_the_clip(
    changes: list[list[float]], other: list[float]
) -> None:
    before = clipped_sum(store(changes), FACTORS, range(len(changes)), 1.0)
    after = clipped_sum(store([other, *changes[1:]]), FACTORS, range(len(changes)), 1.0)
    assert square(before - after) <= (2 * UNITS) ** 2


def test_opposite_clients_reach_the_bounds() -> None:
    """So the bounds of the two tests above are the smallest ones."""
    far = [1000.0] + [0.0] * 9
    one = clipped_sum(store([far, [0.0] * 10]), FACTORS, (0, 1), 0.5)
    other = clipped_sum(store([[-1000.0] + [0.0] * 9, [0.0] * 10]), FACTORS, (0, 1), 0.5)
    assert math.isclose(int(one[0]), UNITS, rel_tol=1e-8)
    assert math.isclose(int(one[0] - other[0]), 2 * UNITS, rel_tol=1e-8)


def test_the_factors_of_a_client_are_one_vector() -> None:
    """Clipped by factor, a client could move the sum by the clip times the root of two."""
    clients = store([[3.0, 0, 0, 0, 4.0, 0, 0, 0, 0, 0]])
    units = clipped_sum(clients, FACTORS, (0,), 1.0).double() / UNITS
    expected = torch.tensor([0.6, 0, 0, 0, 0.8, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(units, expected, rtol=1e-8, atol=0)


def test_a_change_within_the_clip_is_what_it_is() -> None:
    change = [0.125, -0.25, 0.5, 0, 0, 0.375, 0, 0, -0.125, 0]
    units = clipped_sum(store([change, change]), FACTORS, (0, 1), 4.0).double() * (4.0 / UNITS)
    expected = 2 * torch.tensor(change, dtype=torch.float64)
    torch.testing.assert_close(units, expected, rtol=1e-8, atol=0)


def test_a_client_that_is_not_finite_or_has_nothing_of_its_own_counts_nothing() -> None:
    clients = store([[1.0] * 10, [math.nan] * 10, [math.inf] + [0.0] * 9])
    everyone = clipped_sum(clients, FACTORS, (0, 1, 2), 1.0)
    assert torch.equal(everyone, clipped_sum(clients, FACTORS, (0,), 1.0))
    clients.set_shared("A", torch.zeros(4))  # nobody has an A of its own any more
    assert not clipped_sum(clients, ("A",), (0, 1, 2), 1.0).any()
    assert clipped_sum(clients, ("A",), (), 1.0).shape == (4,)


def test_the_sum_has_the_same_bits_in_any_order() -> None:
    generator = np.random.default_rng(0)
    clients = store(generator.normal(size=(7, 10)).tolist())
    one = clipped_sum(clients, FACTORS, range(7), 1.0)
    parts = [clipped_sum(clients, FACTORS, some, 1.0) for some in ((6, 2, 4), (5, 0, 1, 3))]
    assert torch.equal(one, parts[0] + parts[1])
