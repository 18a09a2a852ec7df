"""Which clients are evaluated: a function of the seed alone."""

from __future__ import annotations

import pytest

from sfed.config import load as config_load
from sfed.methods import sampling
from sfed.utils.errors import ConfigError


def test_the_sample_is_sorted_distinct_and_the_same_for_a_seed():
    found = sampling.evaluated(3, 4096, 64)
    assert found == sampling.evaluated(3, 4096, 64)
    assert list(found) == sorted(set(found)) and len(found) == 64
    assert set(found) <= set(range(4096))


def test_another_seed_draws_others_and_every_client_is_drawn_by_some():
    samples = [sampling.evaluated(seed, 20, 5) for seed in range(60)]
    assert len(set(samples)) > 40
    assert {client for sample in samples for client in sample} == set(range(20))


def test_the_sample_is_not_the_cohort_of_a_round():
    cohorts = {sampling.cohort(0, round_index, 1000, 10) for round_index in range(20)}
    assert sampling.evaluated(0, 1000, 10) not in cohorts


@pytest.mark.parametrize("count", [None, 5, 7])
def test_without_a_sample_all_are_evaluated(count):
    assert sampling.evaluated(0, 5, count) == (0, 1, 2, 3, 4)


def test_a_sample_of_more_clients_than_there_are_is_refused():
    settings = {"federated": {"num_clients": 4}, "evaluation": {"clients": 5}}
    with pytest.raises(ConfigError, match=r"evaluation\.clients=5 is more than .*num_clients=4"):
        config_load.validate(settings)
