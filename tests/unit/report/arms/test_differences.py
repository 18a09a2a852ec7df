"""Tests of the intervals of paired differences, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.report.arms import differences
from sfed.report.arms.differences import difference, t_quantile, verdict


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042)],
)
def test_t_quantiles_are_those_of_the_published_table(freedom: int, table: float) -> None:
    assert t_quantile(freedom) == pytest.approx(table, abs=5e-4)


def test_the_interval_over_seeds_is_a_paired_t_interval() -> None:
    """Seed means 1, 2, 3: mean 2, deviation 1, error 1/sqrt(3), t(2) = 4.3027."""
    one = difference({0: [0.0, 2.0], 1: [2.0, 2.0], 2: [3.0, 3.0]})
    half = 4.302653 / math.sqrt(3)
    assert one.mean == 2.0
    assert one.seeds == 3
    assert one.over_seeds == pytest.approx((2 - half, 2 + half), abs=1e-5)
    assert verdict(one, lower_is_better=True) == differences.NOT_SHOWN, "-0.484 to 4.484"


def test_seeds_weigh_equally_whatever_their_number_of_clients() -> None:
    assert difference({0: [1.0], 1: [3.0, 3.0, 3.0]}).mean == 2.0


def test_one_seed_has_an_interval_over_clients_alone() -> None:
    """Student's sleep data: mean 1.58, 95 % from 0.7001 to 2.4599 with 9 degrees of freedom."""
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    one = difference({7: sleep})
    assert one.mean == pytest.approx(1.58)
    assert one.over_seeds is None
    assert one.over_clients == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert verdict(one, lower_is_better=False) == "one seed: no interval"


def test_the_interval_over_clients_pools_strata_after_welch_and_satterthwaite() -> None:
    """Equal strata: variances 2 of 2 clients: error sqrt(1 + 1) / 2, 2 degrees of freedom."""
    one = difference({0: [0.0, 2.0], 1: [3.0, 5.0]})
    half = 4.302653 * math.sqrt(2) / 2
    assert one.over_clients == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)


def test_equal_differences_of_all_seeds_give_no_interval() -> None:
    """Scores of few examples tie often; a width of zero would claim certainty."""
    tied = difference({0: [0.1, 0.2], 1: [0.2, 0.1], 2: [0.15, 0.15]})
    assert tied.over_seeds is None
    assert verdict(tied, lower_is_better=False) == "no spread over seeds: no interval"
    nothing = difference({0: [0.0, 0.0], 1: [0.0, 0.0]})
    assert verdict(nothing, lower_is_better=False) == "no difference shown"


@pytest.mark.parametrize(("lower_is_better", "word"), [(True, "better"), (False, "worse")])
def test_which_way_is_better_depends_on_the_measure(lower_is_better: bool, word: str) -> None:
    one = difference({0: [-1.0], 1: [-1.01], 2: [-0.99]})
    assert one.over_clients is None, "one client each"
    assert verdict(one, lower_is_better=lower_is_better) == word


numbers = st.integers(-64, 64).map(lambda n: n / 16)  # exact in floats, so is every sum


@given(
    pairs=st.lists(
        st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    shifts=st.lists(numbers, min_size=4, max_size=4),
)
def test_what_a_seed_adds_to_all_its_runs_changes_nothing(pairs, shifts) -> None:
    plain = difference({s: [a - b for a, b in some] for s, some in enumerate(pairs)})
    moved = difference(
        {s: [(a + shifts[s]) - (b + shifts[s]) for a, b in some] for s, some in enumerate(pairs)}
    )
    assert moved == plain
