"""Server steps on the product, against dense references in numpy and PEFT's own combinations."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from sfed.clients.store import ClientStore
from sfed.lora.layout import Layout
from sfed.methods import product
from sfed.methods.server import CommonLayer, SentLayer

OUT, IN, RANK, GAMMA = 7, 5, 2, 1.5
UNEQUAL = (0.5, 0.2, 0.3)


def sent_of(a, b, weights, gamma: float, before) -> SentLayer:
    """What clients of one rank and one gamma sent."""
    n, lora_rank, _ = a.shape
    gammas = torch.full((n,), gamma, dtype=torch.float64)
    of_rounds = ((lora_rank,) * n, before, {}, 0, gamma)
    return SentLayer("x", tuple(range(n)), {"A": a, "B": b}, weights, gammas, *of_rounds)


def sent_by(
    weights: tuple[float, ...] = UNEQUAL, *, shape: tuple[int, int, int] = (OUT, IN, RANK), seed=0
) -> SentLayer:
    """Random factors of as many clients as there are weights."""
    (out, width, rank), n = shape, len(weights)
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(n, rank, width, generator=draw)
    b = torch.randn(n, out, rank, generator=draw)
    before = {"A": torch.randn(rank, width, generator=draw), "B": torch.zeros(out, rank)}
    p = torch.tensor(weights, dtype=torch.float64)
    return sent_of(a, b, p, GAMMA, before)


def dense(sent: SentLayer) -> np.ndarray:
    """Delta = sum_i p_i gamma B_i A_i, client by client."""
    total = np.zeros((sent.factors["B"].shape[1], sent.factors["A"].shape[2]))
    for p, a, b in zip(sent.weights, sent.factors["A"], sent.factors["B"], strict=True):
        total += float(p) * sent.gamma * b.double().numpy() @ a.double().numpy()
    return total


def added(common: CommonLayer, sent: SentLayer) -> np.ndarray:
    """What a layer's output gains from the result."""
    a, b = common.factors["A"].double().numpy(), common.factors["B"].double().numpy()
    return sent.gamma * b @ a


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal to fp32 round-off of the largest number."""
    return bool(np.abs(one - other).max() <= 2e-6 * max(np.abs(other).max(), 1e-30))


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rows] * s[:rows]) @ vt[:rows] if (rows := min(rank, len(s))) else matrix


def equal_clients(sent: SentLayer) -> SentLayer:
    """All clients hold what the first one does."""
    same = {name: one[:1].expand_as(one).contiguous() for name, one in sent.factors.items()}
    return dataclasses.replace(sent, factors=same)


def reordered(sent: SentLayer, order: tuple[int, ...]) -> SentLayer:
    places = list(order)
    return dataclasses.replace(
        sent,
        clients=tuple(sent.clients[i] for i in places),
        factors={name: one[places] for name, one in sent.factors.items()},
        weights=sent.weights[places],
    )


SHAPES = [(7, 5, 2), (5, 7, 2), (3, 11, 2), (11, 3, 2), (4, 4, 3), (9, 2, 4), (2, 9, 4)]


# FlexLoRA


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [UNEQUAL, (1.0,), (0.25,) * 4, (0.05,) * 20])
def test_flexlora_is_the_best_approximation_of_the_product_of_its_rank(
    shape: tuple[int, int, int], weights: tuple[float, ...]
) -> None:
    """Eckart-Young: no matrix of r columns is nearer than the truncated SVD."""
    sent = sent_by(weights, shape=shape)
    common = product.flexlora(sent)
    assert close(added(common, sent), truncated(dense(sent), shape[2]))
    rows = min(shape)
    a = common.factors["A"][:rows].double()
    torch.testing.assert_close(a @ a.T, torch.eye(rows).double(), atol=1e-6, rtol=0)
    gram = common.factors["B"].double().T @ common.factors["B"].double()
    assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 1e-5 * float(gram.max())


def test_flexlora_of_full_rank_is_the_whole_product() -> None:
    """A rank of min(out, in) holds any product: what FLoRA adds to the weight."""
    sent = sent_by(shape=(OUT, IN, IN))
    assert close(added(product.flexlora(sent), sent), dense(sent))


def test_a_rank_beyond_the_layer_keeps_rows_that_can_learn() -> None:
    sent = sent_by(shape=(9, 2, 4))
    common = product.flexlora(sent)
    assert torch.equal(common.factors["A"][2:], sent.before["A"][2:])
    assert not common.factors["B"][:, 2:].any()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rows_of_singular_values_that_are_zero_are_those_of_before_the_round(rank: int) -> None:
    """As after a round whose rate was 0, or of clients that still hold one A: no basis is made of
    the rounding of a library."""
    sent = sent_by(shape=(OUT, IN, 3))
    a = sent.factors["A"][:1].expand_as(sent.factors["A"]).contiguous()
    b = sent.factors["B"].clone()
    b[:, :, rank:] = 0
    sent = dataclasses.replace(sent, factors={"A": a, "B": b})
    common = product.flexlora(sent)
    assert close(added(common, sent), dense(sent))
    assert torch.equal(common.factors["A"][rank:], sent.before["A"][rank:])
    assert not common.factors["B"][:, rank:].any()


def test_a_worked_example_of_two_clients_with_unequal_weights() -> None:
    """Delta = 2 (1/4 [3 0 0; 0 0 0] + 3/4 [0 0 0; 0 4 0]) = diag(1.5, 6): its first value is 6."""
    a = torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, -4.0, 0.0]]])
    b = torch.tensor([[[1.0], [0.0]], [[0.0], [-1.0]]])
    before = {"A": torch.zeros(1, 3), "B": torch.zeros(2, 1)}
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    common = product.flexlora(sent_of(a, b, weights, 2.0, before))
    torch.testing.assert_close(common.factors["A"], torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(common.factors["B"], torch.tensor([[0.0], [3.0]]))


@pytest.mark.parametrize("weights", [(1.0,), UNEQUAL])
def test_flexlora_changes_no_product_of_one_client_or_of_equal_ones(
    weights: tuple[float, ...],
) -> None:
    sent = equal_clients(sent_by(weights))
    assert close(added(product.flexlora(sent), sent), dense(sent))


def test_flexlora_adds_nothing_where_all_share_one_factor() -> None:
    """FFA-LoRA and the rounds of RoLoRA: with all A equal the mean of B is exact, and so with B."""
    for factor in ("A", "B"):
        sent = sent_by()
        same = sent.factors[factor][:1].expand_as(sent.factors[factor])
        sent = dataclasses.replace(sent, factors={**sent.factors, factor: same.contiguous()})
        means = {
            name: torch.einsum("n,nij->ij", sent.weights, one.double())
            for name, one in sent.factors.items()
        }
        assert close(added(product.flexlora(sent), sent), added(CommonLayer(means), sent))


def test_signs_are_fixed_and_the_order_of_the_clients_is_none_of_the_result() -> None:
    sent = sent_by()
    first = product.flexlora(sent)
    a = first.factors["A"]
    assert (a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all()
    for order in itertools.permutations(range(3)):
        common = product.flexlora(reordered(sent, order))
        for name, values in common.factors.items():
            torch.testing.assert_close(values, first.factors[name], atol=1e-6, rtol=1e-6)


def test_masked_rows_of_a_client_change_nothing() -> None:
    """A client of rank 1 among those of rank 2: its second row and column are zero."""
    sent = sent_by()
    short = {name: one.clone() for name, one in sent.factors.items()}
    short["A"][1, 1:] = 0
    short["B"][1, :, 1:] = 0
    sent = dataclasses.replace(sent, factors=short)
    assert close(added(product.flexlora(sent), sent), truncated(dense(sent), RANK))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99)
)
def test_the_svd_of_a_product_is_that_of_the_matrix(
    out: int, width: int, rank: int, n: int, seed: int
) -> None:
    sent = sent_by((1 / n,) * n, shape=(out, width, rank), seed=seed)
    left, right = product.stacks(sent)
    u, s, vt = product.svd_of_product(left, right)
    expected = np.linalg.svd(dense(sent), compute_uv=False)[: len(s)]
    np.testing.assert_allclose(s.numpy(), expected, atol=1e-12 * max(expected))
    np.testing.assert_allclose(
        ((u * s) @ vt).numpy(), dense(sent), atol=1e-12 * np.abs(dense(sent)).max()
    )


class OneLayer(nn.Module):
    """A model of one linear layer for PEFT."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.x = nn.Linear(width, out, bias=False)


def combined_by_peft(sent: SentLayer, how: str) -> np.ndarray:
    """gamma B A of PEFT's combination of the clients' adapters."""
    out, width = sent.factors["B"].shape[1], sent.factors["A"].shape[2]
    config = LoraConfig(r=RANK, lora_alpha=GAMMA * RANK, target_modules=["x"])
    model = get_peft_model(OneLayer(out, width), config, adapter_name="0")
    names = [str(client) for client in sent.clients]
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, a, b in zip(names, sent.factors["A"], sent.factors["B"], strict=True):
        model.base_model.model.x.lora_A[name].weight.data = a.clone()
        model.base_model.model.x.lora_B[name].weight.data = b.clone()
    rank = {"svd_rank": RANK} if how == "svd" else {}
    model.add_weighted_adapter(names, sent.weights.tolist(), "all", combination_type=how, **rank)
    layer = model.base_model.model.x
    b, a = layer.lora_B["all"].weight, layer.lora_A["all"].weight
    return layer.scaling["all"] * (b.double() @ a.double()).detach().numpy()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_peft_combines_the_adapters_to_the_same_products(shape: tuple[int, int]) -> None:
    """Its "cat" is Delta and its "svd" the truncation."""
    sent = sent_by(shape=(*shape, RANK))
    left, right = product.stacks(sent)
    assert close((left @ right).numpy(), combined_by_peft(sent, "cat"))
    assert close(added(product.flexlora(sent), sent), combined_by_peft(sent, "svd"))


# HetLoRA


def test_the_weight_of_hetlora_is_the_norm_of_the_products_of_all_layers() -> None:
    one, two = sent_by(seed=1), sent_by(shape=(3, 11, RANK), seed=2)
    for client in range(3):
        layers = {
            name: {factor: values[client] for factor, values in sent.factors.items()}
            for name, sent in (("one", one), ("two", two))
        }
        products = [f["B"].double().numpy() @ f["A"].double().numpy() for f in layers.values()]
        expected = np.sqrt(sum((matrix**2).sum() for matrix in products))
        assert product.norm_of_products(layers) == pytest.approx(expected, rel=1e-12)


def test_an_untrained_client_of_hetlora_has_the_weight_nothing() -> None:
    layers = {"x": {"A": torch.ones(2, 5), "B": torch.zeros(7, 2)}}
    assert product.norm_of_products(layers) == 0.0


# FedEx-LoRA and FLoRA


def folded(common: CommonLayer, sent: SentLayer) -> np.ndarray:
    """What the layer gains: the common product, and what was added to the frozen weight."""
    if common.base_change is None:
        return added(common, sent)
    u, v = (one.double().numpy() for one in common.base_change)
    return added(common, sent) + u @ v


@pytest.mark.parametrize("step", [product.fedex, product.flora])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [UNEQUAL, (1.0,), (0.05,) * 20])
def test_weight_and_adapter_together_are_the_mean_of_the_clients(
    step, shape: tuple[int, int, int], weights: tuple[float, ...]
) -> None:
    sent = sent_by(weights, shape=shape)
    common = step(sent)
    assert close(folded(common, sent), dense(sent))
    if common.base_change is not None:
        assert common.base_change[0].shape[1] == len(weights) * shape[2]


def test_fedex_has_the_means_of_both_factors_with_the_same_weights_as_its_residual() -> None:
    sent = sent_by()
    common = product.fedex(sent)
    for name, values in sent.factors.items():
        mean = sum(float(p) * one.double() for p, one in zip(sent.weights, values, strict=True))
        torch.testing.assert_close(common.factors[name], mean.float())
    u, v = common.base_change
    means = {name: values.double() for name, values in common.factors.items()}
    residual = dense(sent) - GAMMA * (means["B"] @ means["A"]).numpy()
    assert close((u @ v).numpy(), residual)
    assert np.abs(residual).max() > 0.1, "otherwise the test compares nothing"


def test_a_worked_residual() -> None:
    """p 1/4, 3/4; B_1 A_1 = 3 at (0, 0), B_2 A_2 = 4 at (1, 1); A = (0.75, 3, 0), B = (1/4, 3/4).

    gamma B A = 2 [0.1875 0.75 0; 0.5625 2.25 0]; Delta = [1.5 0 0; 0 6 0].
    """
    a = torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 4.0, 0.0]]])
    b = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
    before = {"A": torch.zeros(1, 3), "B": torch.zeros(2, 1)}
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    common = product.fedex(sent_of(a, b, weights, 2.0, before))
    torch.testing.assert_close(common.factors["A"], torch.tensor([[0.75, 3.0, 0.0]]))
    torch.testing.assert_close(common.factors["B"], torch.tensor([[0.25], [0.75]]))
    u, v = common.base_change
    residual = torch.tensor([[1.125, -1.5, 0.0], [-1.125, 1.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(u @ v, residual)


def test_fedex_adds_nothing_to_the_weight_where_clients_or_one_factor_are_equal() -> None:
    """FFA-LoRA and RoLoRA: their mean is exact already."""
    alone = product.fedex(sent_by((1.0,)))
    assert alone.base_change is None
    cases = [equal_clients(sent_by())]
    for factor in ("A", "B"):
        sent = sent_by()
        same = sent.factors[factor][:1].expand_as(sent.factors[factor]).contiguous()
        cases.append(dataclasses.replace(sent, factors={**sent.factors, factor: same}))
    for sent in cases:
        u, v = product.fedex(sent).base_change
        assert float((u @ v).abs().max()) < 1e-14


def test_flora_starts_anew_from_its_seed_alone_and_from_the_bound_of_peft() -> None:
    sent = dataclasses.replace(sent_by(shape=(7, 400, 8)), seed=5)
    common = product.flora(sent)
    a = common.factors["A"]
    assert not common.factors["B"].any()
    other = dataclasses.replace(sent_by(seed=3, shape=(7, 400, 8)), seed=5)
    assert torch.equal(product.flora(other).factors["A"], a)
    assert not torch.equal(product.flora(dataclasses.replace(sent, seed=6)).factors["A"], a)
    linear = nn.Linear(400, 8)
    nn.init.kaiming_uniform_(linear.weight, a=5**0.5)
    assert float(a.abs().max()) <= 1 / 20
    assert float(a.std()) == pytest.approx(float(linear.weight.detach().std()), rel=0.05)


def test_what_flora_folds_is_what_flexlora_of_full_rank_holds_and_peft_concatenates() -> None:
    sent = sent_by(shape=(OUT, IN, IN))
    u, v = product.flora(sent).base_change
    assert close((u @ v).numpy(), added(product.flexlora(sent), sent))
    sent = sent_by()
    u, v = product.flora(sent).base_change
    assert close((u @ v).numpy(), combined_by_peft(sent, "cat"))


@pytest.mark.parametrize("step", [product.fedex, product.flora])
def test_the_order_of_the_clients_is_none_of_the_sum(step) -> None:
    sent = sent_by()
    for order in itertools.permutations(range(3)):
        assert close(folded(step(reordered(sent, order)), sent), dense(sent))


def test_a_cohort_counts_with_weights_of_its_own() -> None:
    """Clients 1 and 4 of five: the weights are theirs, and sum to 1 over them."""
    sent = dataclasses.replace(sent_by((0.75, 0.25)), clients=(1, 4))
    for step in (product.fedex, product.flora):
        assert close(folded(step(sent), sent), dense(sent))


# Faults that public code has shown, each put into a step; the comparison above notices all.


def _broken(name: str, sent: SentLayer) -> np.ndarray:
    """The sum as a faulty implementation of FedEx-LoRA or FLoRA would have it."""
    p = [float(one) for one in sent.weights]
    a = [one.double().numpy() for one in sent.factors["A"]]
    b = [one.double().numpy() for one in sent.factors["B"]]
    n, gamma = len(p), sent.gamma
    mean_a = sum(x * y for x, y in zip(p, a, strict=True))
    mean_b = sum(x * y for x, y in zip(p, b, strict=True))
    exact = gamma * sum(x * y @ z for x, y, z in zip(p, b, a, strict=True))
    common = gamma * mean_b @ mean_a
    faults = {
        "residual without gamma": lambda: common + (exact - common) / gamma,
        "sum in the place of the mean": lambda: (
            gamma * sum(y @ z for y, z in zip(b, a, strict=True))
        ),
        "other weights in the residual": lambda: (
            common + gamma * sum(y @ z for y, z in zip(b, a, strict=True)) / n - common
        ),
        "weights on one factor only": lambda: gamma * mean_b @ (sum(a) / n) + exact - common,
        "weights on both stacks": lambda: (
            gamma * sum(x * x * y @ z for x, y, z in zip(p, b, a, strict=True))
        ),
        "a client is dropped": lambda: exact - gamma * p[-1] * b[-1] @ a[-1],
        "the last client counts alone": lambda: gamma * b[-1] @ a[-1],
        "counted twice": lambda: exact + common,
        "residual left out": lambda: common,
    }
    return faults[name]()


@pytest.mark.parametrize(
    "name",
    [
        "residual without gamma",
        "sum in the place of the mean",
        "other weights in the residual",
        "weights on one factor only",
        "weights on both stacks",
        "a client is dropped",
        "the last client counts alone",
        "counted twice",
        "residual left out",
    ],
)
def test_a_known_fault_is_not_the_sum(name: str) -> None:
    sent = sent_by()
    assert not close(_broken(name, sent), dense(sent))


def test_known_faults_of_the_svd_are_not_its_truncation() -> None:
    sent = sent_by()
    u, s, vt = np.linalg.svd(dense(sent), full_matrices=False)
    right = truncated(dense(sent), RANK)
    u, s, vt = u[:, :RANK], s[:RANK], vt[:RANK]
    assert close((u * s) @ vt, right)
    assert not close((u * np.sqrt(s)) @ vt, right), "one of two roots is lost"
    v = np.linalg.svd(dense(sent), full_matrices=False)[2].T  # as torch.svd returns it
    assert not close((u * s) @ v[:RANK, :IN], right), "V in the place of its transpose"
    assert not close(sent.gamma * (u * s) @ vt, right), "not divided by gamma"


# --- clients of different ranks --------------------------------------------------------------

MIXED, MIXED_GAMMAS = (1, 3, 2), (8.0, 8 / 3, 4.0)


def sent_of_mixed_ranks(seed: int = 3) -> SentLayer:
    """Random factors with zeros beyond the rank of each client, each with its own gamma."""
    sent = sent_by(shape=(OUT, IN, max(MIXED)), seed=seed)
    for client, lora_rank in enumerate(MIXED):
        sent.factors["A"][client, lora_rank:] = 0.0
        sent.factors["B"][client, :, lora_rank:] = 0.0
    gammas = torch.tensor(MIXED_GAMMAS, dtype=torch.float64)
    return dataclasses.replace(sent, gammas=gammas, ranks=MIXED, common_gamma=MIXED_GAMMAS[1])


def dense_of_mixed_ranks(sent: SentLayer) -> np.ndarray:
    """Delta = sum_i p_i gamma_i B_i A_i, client by client, without padding."""
    total = np.zeros((OUT, IN))
    for i, (p, gamma, lora_rank) in enumerate(zip(UNEQUAL, MIXED_GAMMAS, MIXED, strict=True)):
        a, b = sent.factors["A"][i, :lora_rank], sent.factors["B"][i, :, :lora_rank]
        total += p * gamma * b.double().numpy() @ a.double().numpy()
    return total


def test_flexlora_gives_each_client_the_best_approximation_of_its_rank() -> None:
    """A = V_r^T and B = U_r S_r / gamma_i of the one product (arXiv 2402.11505)."""
    sent = sent_of_mixed_ranks()
    common = product.flexlora(sent).factors
    scales = tuple(sent.common_gamma / gamma for gamma in MIXED_GAMMAS)
    layout = dataclasses.replace(
        Layout.of([("x", IN, OUT)], lora_rank=max(MIXED)), ranks=MIXED, b_scales=scales
    )
    clients = ClientStore(range(3), layout, torch.device("cpu"), clients_per_pass=1, moments=())
    for factor in ("A", "B"):
        clients.set_shared(factor, common[factor].flatten())
    u, s, vt = np.linalg.svd(dense_of_mixed_ranks(sent), full_matrices=False)
    for client, (lora_rank, gamma) in enumerate(zip(MIXED, MIXED_GAMMAS, strict=True)):
        a = clients.factor(client, "A").view(-1, IN).double().numpy()
        b = clients.factor(client, "B").view(OUT, -1).double().numpy()
        expected = u[:, :lora_rank] * s[:lora_rank] @ vt[:lora_rank]
        np.testing.assert_allclose(gamma * b @ a, expected, rtol=0, atol=1e-5 * s[0])
        assert not a[lora_rank:].any() and not b[:, lora_rank:].any()


def test_flora_stacks_what_each_client_holds_and_nothing_of_the_padding() -> None:
    sent = sent_of_mixed_ranks()
    u, v = product.flora(sent).base_change
    assert (u.shape, v.shape) == ((OUT, sum(MIXED)), (sum(MIXED), IN))
    np.testing.assert_allclose((u @ v).numpy(), dense_of_mixed_ranks(sent), rtol=1e-12)


def test_hetlora_weighs_a_client_by_its_own_rows() -> None:
    sent = sent_of_mixed_ranks()
    for client, lora_rank in enumerate(MIXED):
        a, b = sent.factors["A"][client], sent.factors["B"][client]
        cut = {"A": a[:lora_rank], "B": b[:, :lora_rank]}
        of_cut = product.norm_of_products({"x": cut})
        assert product.norm_of_products({"x": {"A": a, "B": b}}) == pytest.approx(of_cut, rel=1e-12)
