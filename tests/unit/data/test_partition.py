"""Tests of who holds what: examples, rounds and processes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.config.clients import settings_of
from sfed.config.load import validate
from sfed.data import partition
from sfed.data.assignment import placement
from sfed.methods import sampling
from sfed.utils.errors import UserError
from sfed.utils.rng import Stream, derive, generator

seeds = st.integers(min_value=0, max_value=2**63)
few = st.integers(min_value=1, max_value=40)
counts = st.integers(min_value=0, max_value=300)


def assert_disjoint_cover(parts, count):
    together = np.concatenate(parts)
    assert len(together) == count
    assert np.array_equal(np.sort(together), np.arange(count))
    for part in parts:
        assert np.array_equal(part, np.sort(part))


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


# --- rounds --------------------------------------------------------------------------------------


@given(seeds, st.integers(0, 1000), few, st.data())
def test_a_cohort_is_sorted_distinct_and_of_the_size_that_was_asked(seed, round_index, total, data):
    size = data.draw(st.integers(1, total))
    members = sampling.cohort(seed, round_index, total, size)
    assert list(members) == sorted(set(members))
    assert len(members) == size
    assert set(members) <= set(range(total))
    assert members == sampling.cohort(seed, round_index, total, size)


@pytest.mark.parametrize("size", [None, 5, 6])
def test_without_a_smaller_number_everybody_takes_part(size):
    assert sampling.cohort(0, 3, 5, size) == (0, 1, 2, 3, 4)


def test_cohorts_depend_on_the_round_and_on_the_seed():
    of_rounds = {sampling.cohort(0, round_index, 20, 5) for round_index in range(20)}
    of_seeds = {sampling.cohort(seed, 0, 20, 5) for seed in range(20)}
    assert len(of_rounds) > 15 and len(of_seeds) > 15


def test_over_many_rounds_every_client_takes_part_about_equally_often():
    members = [sampling.cohort(1, round_index, 10, 3) for round_index in range(2000)]
    often = np.bincount(np.concatenate(members), minlength=10)
    assert often.min() > 500 and often.max() < 700  # 600 expected


# --- processes -----------------------------------------------------------------------------------


@given(few, st.integers(min_value=0, max_value=200))
def test_processes_hold_all_clients_in_order_and_as_evenly_as_it_goes(num_processes, more):
    num_clients = num_processes + more
    placed = partition.place(num_clients, num_processes)
    assert list(itertools.chain(*placed)) == list(range(num_clients))
    sizes = [len(own) for own in placed]
    assert len(sizes) == num_processes
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


works = st.lists(st.floats(0, 1e9), min_size=1, max_size=60)


@given(works, st.data())
def test_dealing_by_work_places_every_client_once_and_leaves_no_process_without(work, data):
    num_processes = data.draw(st.integers(1, len(work)))
    placed = placement.by_work(work, num_processes, "tokens").clients
    assert sorted(itertools.chain(*placed)) == list(range(len(work)))
    assert len(placed) == num_processes and all(placed)
    assert all(list(own) == sorted(own) for own in placed)


@given(works, st.data())
def test_no_process_has_more_work_than_the_busiest_by_number(work, data):
    num_processes = data.draw(st.integers(1, len(work)))
    by_number = placement.by_number(len(work), num_processes)
    dealt = placement.by_work(work, num_processes, "tokens")
    assert max(placement.loads_of(dealt, work)) <= max(placement.loads_of(by_number, work))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 3))
def test_the_busiest_process_has_at_most_four_thirds_of_the_least_possible(work, num_processes):
    num_processes = min(num_processes, len(work))
    owners = itertools.product(range(num_processes), repeat=len(work))
    least = min(
        max(sum(itertools.compress(work, [one == p for one in each])) for p in range(num_processes))
        for each in owners
    )
    dealt = placement.by_work(work, num_processes, "tokens")
    assert max(placement.loads_of(dealt, work)) <= 4 / 3 / 0.95 * least


@given(few, st.integers(0, 100), st.floats(1, 1e9), st.floats(0, 0.02))
def test_clients_of_nearly_equal_work_are_placed_by_number(num_processes, more, each, spread):
    num_clients = num_processes + more
    work = [each * (1 + spread * (client % 3)) for client in range(num_clients)]
    placed = placement.by_work(work, num_processes, "tokens")
    assert placed == placement.by_number(num_clients, num_processes)


@given(st.lists(st.floats(1, 1e9), min_size=1, max_size=40))
def test_one_client_on_each_process_stays_where_its_number_puts_it(work):
    placed = placement.by_work(work, len(work), "tokens")
    assert placed.clients == tuple((client,) for client in range(len(work)))


def test_one_large_client_gets_a_process_of_its_own():
    work = [8.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    placed = placement.by_work(work, 2, "tokens")
    assert placed.clients == ((0,), (1, 2, 3, 4, 5))
    assert placement.loads_of(placed, work) == [8, 5]
    assert placement.loads_of(placement.by_number(6, 2), work) == [10, 3]
    assert placed.reason == (
        "by the tokens of a round: the busiest process has 62 % of all, by number it would have "
        "77 %"
    )


@pytest.mark.parametrize(
    ("train", "steps", "tokens"),
    [
        ({"local_steps": 3, "batch_size": 4}, 3, 3 * 4 * 50.0),
        ({"local_steps": None, "local_epochs": 2, "batch_size": 4}, 5, 2 * 450.0),
    ],
)
def test_the_tokens_of_a_round_are_those_of_its_steps_or_epochs(train, steps, tokens):
    config = validate({"model": {"name": "x"}, "data": {"task": "demo"}, "train": train})
    [client] = settings_of(config, [""])
    assert client.steps(9) == steps
    assert placement.tokens_of_round(client, 9, 450) == tokens


# --- examples ------------------------------------------------------------------------------------


@given(counts, few, seeds)
def test_dealing_at_random_gives_everything_to_somebody_and_nothing_twice(count, clients, seed):
    parts = partition.iid(count, clients, seed)
    assert_disjoint_cover(parts, count)
    sizes = [len(part) for part in parts]
    assert len(sizes) == clients and max(sizes) - min(sizes) <= 1
    assert_same(parts, partition.iid(count, clients, seed))


def test_dealing_at_random_depends_on_the_seed():
    first, second = partition.iid(100, 4, 0), partition.iid(100, 4, 1)
    assert not np.array_equal(first[0], second[0])


@given(seeds, st.integers(1, 6), few, st.floats(0.05, 50), counts)
def test_dealing_by_shares_gives_everything_to_somebody_and_nothing_twice(
    seed, num_labels, clients, concentration, count
):
    labels = np.random.default_rng(seed).integers(0, num_labels, count)
    shares = partition.dirichlet_shares(num_labels, clients, concentration, seed)
    assert shares.shape == (num_labels, clients)
    assert shares.sum(axis=1) == pytest.approx(np.ones(num_labels))
    parts = partition.by_shares(labels, shares, seed)
    assert len(parts) == clients
    assert_disjoint_cover(parts, count)
    assert_same(parts, partition.by_shares(labels, shares, seed))


def test_the_same_shares_give_held_out_data_the_distribution_of_the_training_data():
    generator = np.random.default_rng(0)
    train, held_out = generator.integers(0, 5, 40_000), generator.integers(0, 5, 20_000)
    shares = partition.dirichlet_shares(5, 6, 0.5, seed=3)
    train_parts = partition.by_shares(train, shares, seed=3)
    held_parts = partition.by_shares(held_out, shares, seed=4)
    spread = []
    for part, held in zip(train_parts, held_parts, strict=True):
        of_train = np.bincount(train[part], minlength=5) / len(part)
        of_held = np.bincount(held_out[held], minlength=5) / len(held)
        assert of_train == pytest.approx(of_held, abs=0.02)
        spread.append(of_train)
    assert np.ptp(spread, axis=0).max() > 0.3  # the clients do differ from each other


def test_each_client_gets_its_share_of_each_label():
    labels = np.repeat([0, 1], [100, 50])
    shares = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    parts = partition.by_shares(labels, shares, seed=0)
    held = [np.bincount(labels[part], minlength=2).tolist() for part in parts]
    assert held == [[20, 50], [30, 0], [50, 0]]


def test_a_small_concentration_skews_and_a_large_one_evens():
    skewed = partition.dirichlet_shares(200, 4, 0.05, seed=0).max(axis=1).mean()
    even = partition.dirichlet_shares(200, 4, 1000.0, seed=0).max(axis=1).mean()
    assert skewed > 0.9 and even < 0.3


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1), st.data())
def test_every_key_belongs_to_one_client(keys, data):
    clients = data.draw(st.integers(1, len(set(keys))))
    groups = partition.key_groups(keys, clients)
    assert list(itertools.chain(*groups)) == sorted(set(keys))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    parts = partition.by_key(keys, groups)
    assert_disjoint_cover(parts, len(keys))
    for part, group in zip(parts, groups, strict=True):
        assert {keys[index] for index in part} == set(group)


def test_a_key_that_no_client_holds_goes_to_nobody():
    parts = partition.by_key(["a", "x", "b", "a"], [("a",), ("b",)])
    assert [part.tolist() for part in parts] == [[0, 3], [2]]


def test_fewer_keys_than_clients_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="2 values for 3 clients") as caught:
        partition.key_groups(["a", "b", "a"], 3)
    assert "federated.num_clients to at most 2" in str(caught.value)


@given(
    st.integers(2, 200),
    st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True),
    seeds,
    st.integers(0, 100),
)
def test_holding_out_leaves_something_on_both_sides(count, fraction, seed, client):
    examples = np.arange(count) * 3
    kept, out = partition.hold_out(examples, fraction, seed, client)
    assert len(kept) and len(out)
    assert np.array_equal(np.sort(np.concatenate([kept, out])), examples)
    assert abs(len(out) - fraction * count) <= 1
    assert_same((kept, out), partition.hold_out(examples, fraction, seed, client))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_examples_to_split_all_stay_for_training(count):
    kept, out = partition.hold_out(np.arange(count), 0.5, 0, 0)
    assert (len(kept), len(out)) == (count, 0)


def test_clients_hold_out_different_places():
    held = {partition.hold_out(np.arange(50), 0.2, 0, client)[1].tobytes() for client in range(10)}
    assert len(held) == 10


@given(counts, st.none() | st.integers(1, 400), seeds)
def test_a_subset_is_sorted_distinct_and_no_larger_than_its_limit(count, limit, seed):
    chosen = partition.subset(count, limit, seed)
    assert len(chosen) == (count if limit is None else min(count, limit))
    assert np.array_equal(chosen, np.unique(chosen))
    assert not len(chosen) or (chosen[0] >= 0 and chosen[-1] < count)
    assert np.array_equal(chosen, partition.subset(count, limit, seed))


def test_length_edges_cut_a_training_set_into_equal_parts():
    lengths = np.random.default_rng(0).permutation(1000)
    edges = partition.length_edges(lengths)
    assert len(edges) == partition.LENGTH_QUANTILES - 1
    held = np.bincount(np.digitize(lengths, edges), minlength=partition.LENGTH_QUANTILES)
    assert held.tolist() == [100] * partition.LENGTH_QUANTILES


def test_length_edges_of_equal_lengths_make_one_group():
    edges = partition.length_edges(np.full(30, 7))
    assert len(set(np.digitize(np.full(30, 7), edges))) == 1


# --- seeds ---------------------------------------------------------------------------------------


@given(st.sampled_from(Stream), st.lists(st.integers(0, 2**31), min_size=1, max_size=5), st.data())
def test_every_word_of_a_seed_counts(stream, words, data):
    changed = list(words)
    changed[data.draw(st.integers(0, len(words) - 1))] += 1
    assert derive(stream, *words) == derive(stream, *words)
    assert derive(stream, *words) != derive(stream, *changed)


@pytest.mark.parametrize("stream", Stream)
def test_two_uses_of_randomness_do_not_share_their_numbers(stream):
    drawn = [derive(other, 1, 2) for other in Stream]
    assert drawn.count(derive(stream, 1, 2)) == 1


@pytest.mark.parametrize("some", [(), (5,), (5, 0)])
def test_a_word_of_zero_makes_another_draw_than_no_word(some):
    first, second = generator(Stream.SPLIT, *some), generator(Stream.SPLIT, *some, 0)
    assert first.random() != second.random()
