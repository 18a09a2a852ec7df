"""Tests of gamma: exact values, equalities between the rules, what stock PEFT makes of it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from sfed.lora.peft_form import peft_alpha
from sfed.methods.scaling import (
    EXPONENTS,
    alpha_of_another_formula,
    client_scalings,
    effective_clients,
    lora_scaling,
)
from sfed.utils.errors import ConfigError

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


@given(st.floats(min_value=1e-6, max_value=1e9), ranks)
def test_the_alpha_for_peft_gives_gamma_back_by_the_rule_that_all_readers_know(gamma, lora_rank):
    """Bit by bit where some alpha does; otherwise within 1 ulp, and no other alpha comes nearer."""
    alpha = peft_alpha(gamma, lora_rank)
    others = [alpha]
    for towards in (0.0, math.inf):
        other = alpha
        for _ in range(3):
            other = math.nextafter(other, towards)
            others.append(other)
    error = abs(alpha / lora_rank - gamma)
    assert error == min(abs(other / lora_rank - gamma) for other in others)
    assert error <= math.ulp(gamma)


@pytest.mark.parametrize("lora_rank", [1, 2, 4, 8, 16, 64, 512, 3, 5, 6, 12, 24, 100])
@pytest.mark.parametrize("rule", EXPONENTS)
@pytest.mark.parametrize("num_clients", [1, 3, 8, 20])
def test_the_usual_ranks_give_gamma_bit_by_bit(num_clients, rule, lora_rank):
    for alpha in (1.0, 2.0, 4.0, 16.0, 5.657):
        gamma = lora_scaling(alpha, lora_rank, num_clients, EXPONENTS[rule])
        assert abs(peft_alpha(gamma, lora_rank) / lora_rank - gamma) <= math.ulp(gamma)
        if lora_rank & (lora_rank - 1) == 0:
            assert peft_alpha(gamma, lora_rank) / lora_rank == gamma


def test_the_alpha_of_lora_is_its_own():
    assert peft_alpha(lora_scaling(16.0, 8, 3, EXPONENTS["lora"]), 8) == 16.0


@pytest.mark.parametrize(("num_clients", "lora_rank"), [(1, 4), (8, 8), (5, 3)])
def test_stock_peft_computes_gamma_of_sfed_from_the_exported_alpha(num_clients, lora_rank):
    gamma = lora_scaling(4.0, lora_rank, num_clients, EXPONENTS["sfed"])
    alpha = peft_alpha(gamma, lora_rank)
    assert alpha == pytest.approx(4.0 * math.sqrt(num_clients * lora_rank), rel=1e-12)
    settings = LoraConfig(r=lora_rank, lora_alpha=alpha, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(nn.Linear(8, 8)), settings).base_model.model[0]
    assert layer.scaling["default"] == pytest.approx(gamma, rel=1e-15)


@pytest.mark.parametrize(
    ("alpha", "rank", "clients", "scaling", "share"),
    [
        (16.0, 8, 8, "sfed", 8.0),
        (32.0, 64, 20, "sfed", 35.8),
        (16.0, 8, 8, "lora", None),
        (16.0, 8, 8, "rslora", None),
        (2.0, 16, 4, "sfed", None),
        (5.657, 8, 3, "sfed", None),
    ],
)
def test_an_alpha_that_is_made_for_plain_lora_is_noticed(alpha, rank, clients, scaling, share):
    gamma = lora_scaling(alpha, rank, clients, EXPONENTS[scaling])
    said = alpha_of_another_formula(alpha, rank, gamma)
    if share is None:
        assert said is None
    else:
        assert f"gamma = {gamma:.3g}, {share:g} times what alpha / r gives" in said
        same = float(said.rpartition("lora.alpha = ")[2].split()[0])
        assert lora_scaling(same, rank, clients, EXPONENTS[scaling]) == pytest.approx(
            alpha / rank, rel=0.01
        )


# --- clients of different ranks ----------------------------------------------------------------

SFED = EXPONENTS["sfed"]


def test_gamma_of_clients_of_different_ranks_is_the_worked_example() -> None:
    found = client_scalings(1.0, [4, 8, 64], [1.0] * 3, SFED)
    assert found == pytest.approx([0.8660, 0.5477, 0.1298], abs=5e-5)
    assert found == pytest.approx(
        [1 / math.sqrt(4 / 3), 1 / math.sqrt(4 / 3 + 4 / 2), 1 / math.sqrt(4 / 3 + 4 / 2 + 56)]
    )


def test_weights_count_as_they_do_in_the_mean_of_each_row() -> None:
    """Rows 0 to 3 are means with 0.1, 0.2, 0.7; rows 4 to 7 with 2/9, 7/9; the others one's own."""
    rows = [4 * 0.54, 4 * (4 + 49) / 81, 56.0]
    expected = [3 / math.sqrt(sum(rows[: end + 1])) for end in range(3)]
    found = client_scalings(3.0, [4, 8, 64], [10, 20, 70], SFED)
    assert found == pytest.approx(expected, rel=1e-12)


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    exponents=st.sampled_from([EXPONENTS["lora"], EXPONENTS["rslora"], (0.0, 0.0), SFED]),
)
def test_equal_ranks_give_the_one_gamma_bit_for_bit(ranks: list[int], exponents: tuple) -> None:
    num, weights = len(ranks), [1.0 + client for client in range(len(ranks))]
    same = client_scalings(2.0, [ranks[0]] * num, weights, exponents)
    assert same == (lora_scaling(2.0, ranks[0], effective_clients(weights), exponents),) * num
    if exponents != SFED and len(set(ranks)) > 1:
        own = [lora_scaling(2.0, lora_rank, 1, exponents) for lora_rank in ranks]
        assert client_scalings(2.0, ranks, weights, exponents) == tuple(own)


@pytest.mark.parametrize("exponents", [(1.0, -0.5), (0.5, -1.0), (-0.5, 0.0)])
def test_other_exponents_of_n_are_refused_where_ranks_differ(exponents: tuple) -> None:
    assert len(client_scalings(1.0, [4, 4], [1, 1], exponents)) == 2
    with pytest.raises(ConfigError, match="so N is no one number"):
        client_scalings(1.0, [4, 8], [1, 1], exponents)
