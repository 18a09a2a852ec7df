"""Tests of gamma: exact values, equalities between the rules, what stock PEFT makes of it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from sfed.scaling import EXPONENTS, effective_clients, lora_scaling, peft_alpha

ranks = st.integers(min_value=1, max_value=4096)
clients = st.integers(min_value=1, max_value=4096)
alphas = st.floats(min_value=1e-3, max_value=1e3)
weights = st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=1, max_size=50)


@pytest.mark.parametrize(
    ("num_clients", "lora_rank", "gamma"),
    [(1, 8, 1.41421), (3, 8, 2.44949), (8, 8, 4.0), (4, 64, 1.0), (16, 512, 0.70711)],
)
def test_gamma_of_sfed_has_the_published_values(num_clients, lora_rank, gamma):
    found = lora_scaling(4.0, lora_rank, num_clients, EXPONENTS["sfed"])
    assert found == pytest.approx(gamma, abs=5e-6)


@given(alphas, ranks, clients)
def test_each_rule_is_its_formula(alpha, lora_rank, num_clients):
    def gamma(rule):
        return lora_scaling(alpha, lora_rank, num_clients, EXPONENTS[rule])

    assert gamma("lora") == pytest.approx(alpha / lora_rank, rel=1e-12)
    assert gamma("rslora") == pytest.approx(alpha / math.sqrt(lora_rank), rel=1e-12)
    assert gamma("sfed") == pytest.approx(alpha * math.sqrt(num_clients / lora_rank), rel=1e-12)


@given(alphas, ranks)
def test_with_one_client_sfed_is_rslora(alpha, lora_rank):
    sfed = lora_scaling(alpha, lora_rank, 1, EXPONENTS["sfed"])
    assert sfed == lora_scaling(alpha, lora_rank, 1, EXPONENTS["rslora"])


@given(alphas, ranks, clients, st.floats(-2, 2), st.floats(-2, 2))
def test_any_pair_of_exponents_gives_the_product_of_powers(
    alpha, lora_rank, num_clients, of_clients, of_rank
):
    found = lora_scaling(alpha, lora_rank, num_clients, (of_clients, of_rank))
    assert found == pytest.approx(alpha * num_clients**of_clients * lora_rank**of_rank, rel=1e-12)


@given(clients, st.floats(min_value=1e-6, max_value=1e6))
def test_equal_weights_count_every_client(num_clients, weight):
    assert effective_clients([weight] * num_clients) == pytest.approx(num_clients, rel=1e-12)


@pytest.mark.parametrize("client_weights", [(0.1, 0.2, 0.7), (10, 20, 70)])
def test_unequal_weights_count_fewer_clients(client_weights):
    assert effective_clients(client_weights) == pytest.approx(1 / 0.54, rel=1e-12)


@given(weights)
def test_effective_clients_lie_between_one_and_all(client_weights):
    found = effective_clients(client_weights)
    assert 1 - 1e-9 <= found <= len(client_weights) * (1 + 1e-9)


@given(weights)
def test_a_client_without_weight_does_not_count(client_weights):
    with_idle = effective_clients([*client_weights, 0.0])
    assert with_idle == pytest.approx(effective_clients(client_weights), rel=1e-12)


@given(st.floats(min_value=1e-3, max_value=1e3), ranks)
def test_the_alpha_for_peft_gives_gamma_back_by_the_rslora_rule(gamma, lora_rank):
    assert peft_alpha(gamma, lora_rank) / math.sqrt(lora_rank) == pytest.approx(gamma, rel=1e-12)


@pytest.mark.parametrize(("num_clients", "lora_rank"), [(1, 4), (8, 8), (5, 3)])
def test_stock_peft_computes_gamma_of_sfed_from_the_exported_alpha(num_clients, lora_rank):
    gamma = lora_scaling(4.0, lora_rank, num_clients, EXPONENTS["sfed"])
    alpha = peft_alpha(gamma, lora_rank)
    assert alpha == pytest.approx(4.0 * math.sqrt(num_clients), rel=1e-12)
    settings = LoraConfig(r=lora_rank, lora_alpha=alpha, use_rslora=True, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(nn.Linear(8, 8)), settings).base_model.model[0]
    assert layer.scaling["default"] == pytest.approx(gamma, rel=1e-12)
