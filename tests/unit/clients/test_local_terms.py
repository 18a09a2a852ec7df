"""Proximal terms and control variates against loops over one client with torch.optim.

Shape suffixes: C clients, N parameters of a row.
"""

import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfed.clients.local_terms import LocalTerms, MethodTerm, mean_weights
from sfed.clients.optimizer import StackedOptimizer
from sfed.clients.state import MOMENTS
from sfed.clients.store import ClientStore
from sfed.config.sections.train import TrainSection
from sfed.distributed import world as distributed
from sfed.lora.layout import Layout
from sfed.methods import aggregation
from sfed.methods.aggregation import ServerSide
from sfed.utils.errors import UserError
from tests.support.deadlines import RUN_SECONDS

LAYOUT = Layout.of([("q", 5, 7), ("v", 3, 4)], lora_rank=2)
A, CPU, N, STEPS, MU = LAYOUT.columns("A"), torch.device("cpu"), 3, 4, 0.7
RATES = [0.0, 0.02, 0.05, 0.01]


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(per_pass=N, kind="adamw"):
    moments = MOMENTS if kind == "adamw" else ()
    clients = ClientStore(range(N), LAYOUT, CPU, clients_per_pass=per_pass, moments=moments)
    clients.keep_controls(("A",))
    for client in range(N):
        clients.set_own(client, {"b": draw(clients.widths["b"], seed=client)})
    clients.set_shared("A", draw(clients.widths["a"], seed=9))
    return clients


def local_round(clients, cohort, number, settings, mu=MU, bad=()):
    """A round of made-up gradients: of the client, the step, and where the client is."""
    terms = LocalTerms(
        LAYOUT,
        mu,
        {"A": clients.shared("A")} if mu else {},
        {"A": clients.common_state.get("a_control", torch.zeros(clients.widths["a"]))},
    )
    optimizer, weights = StackedOptimizer(settings, LAYOUT, ("A", "B")), mean_weights(RATES)
    size = clients.clients_per_pass
    groups = [tuple(cohort[i : i + size]) for i in range(0, len(cohort), size)]
    with closing(clients.passes(groups, ("A", "B"))) as passes:
        for rows in passes:
            start = rows.values.clone()
            for step in range(STEPS):
                for position, client in enumerate(rows.clients):
                    rows.grads[position] = raw_gradient(
                        rows.values[position], client, number, step, client in bad
                    )
                active_C = torch.ones(len(rows.clients), dtype=torch.bool)
                terms.add_to(rows, torch.full((len(rows.clients),), weights[step]), active_C)
                norms_C = optimizer.gradient_norms(rows)
                taken_C = torch.isfinite(norms_C)
                rates_C = torch.full((len(rows.clients),), RATES[step])
                optimizer.step(rows, rates_C, norms_C, taken_C)
            rows.restore(torch.tensor([client in bad for client in rows.clients]), start)


def raw_gradient(values_N, client, number, step, is_bad=False):
    drawn = draw(LAYOUT.size, seed=100 * number + 10 * step + client)
    return values_N + drawn * (math.nan if is_bad and step == 1 else 1.0)


class Alone:
    """One client with torch.optim and its own control variate, from the definition."""

    def __init__(self, row, settings):
        self.w, self.settings = torch.nn.Parameter(row.clone()), settings
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.optimizer]
        self.optimizer = kind([self.w], lr=1.0, weight_decay=settings.weight_decay)
        self.control = torch.zeros(A.stop)

    def round(self, c, received, client, number):
        raws = []
        for step in range(STEPS):
            grads = raw_gradient(self.w.detach(), client, number, step)
            grads[A] += MU * (self.w.detach()[A] - received)
            raws.append(grads[A].clone())
            grads[A] = grads[A] - self.control + c
            self.w.grad = grads
            if self.settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_([self.w], self.settings.max_grad_norm)
            self.optimizer.param_groups[0]["lr"] = RATES[step]
            self.optimizer.step()
        return sum(r * g for r, g in zip(RATES, raws, strict=True)) / sum(RATES)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("per_pass", [1, 2, N])
def test_gradients_are_corrected_before_they_are_clipped_and_stepped_along(kind, per_pass):
    """Partial cohorts of unequal weights; p_i of the variates are those among all N."""
    settings = TrainSection(optimizer=kind, max_grad_norm=2.0, weight_decay=0.1)
    clients, counts = store(per_pass, kind), (10, 20, 70)
    of_all = aggregation.normalised_weights(N, range(N), counts)
    alone = [Alone(clients.row(client), settings) for client in range(N)]
    c = torch.zeros(A.stop)
    world = distributed.start(RUN_SECONDS)
    try:
        for number, cohort in enumerate([(0, 1, 2), (0, 2), (1,), (0, 1, 2)]):
            received = clients.shared("A").clone()
            local_round(clients, cohort, number, settings)
            new = {i: alone[i].round(c, received, i, number) for i in cohort}
            weights = aggregation.normalised_weights(N, cohort, counts)
            senders = [of_all[client] * (client in cohort) for client in range(N)]
            aggregation.share(world, clients, ("A",), weights, ServerSide(None, ("A",), senders))
            c = c + sum(of_all[i] * (new[i] - alone[i].control) for i in cohort)
            mean = sum(weights[i] * alone[i].w.detach()[A] for i in cohort)
            for i, one in enumerate(alone):
                one.control = new.get(i, one.control)
                one.w.data[A] = mean
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(clients.common_state["a_control"], c, **close)
            # The server's variate is the mean of all variates, whoever has taken part.
            of_clients = sum(p * one.control for p, one in zip(of_all, alone, strict=True))
            torch.testing.assert_close(clients.common_state["a_control"], of_clients, **close)
            for i, one in enumerate(alone):
                torch.testing.assert_close(clients.row(i), one.w.detach(), **close)
    finally:
        distributed.stop(world)


@pytest.mark.parametrize("per_pass", [1, N])
def test_a_client_that_turned_non_finite_keeps_its_variate_and_spreads_nothing(per_pass):
    clients, settings = store(per_pass), TrainSection()
    world = distributed.start(RUN_SECONDS)
    try:
        for number, (healthy, bad) in enumerate([((0, 1, 2), ()), ((0, 2), (1,)), ((0, 1, 2), ())]):
            before = held(clients, 1)
            local_round(clients, (0, 1, 2), number, settings, bad=bad)
            weights = aggregation.normalised_weights(N, healthy, None)
            senders = [(client in healthy) / N for client in range(N)]
            aggregation.share(world, clients, ("A",), weights, ServerSide(None, ("A",), senders))
            if bad:
                assert torch.equal(held(clients, 1), before)
            for client in range(N):
                assert bool(torch.isfinite(held(clients, client)).all())
                assert not any("mean_gradient" in name for name in clients._parts[client])
            assert bool(torch.isfinite(clients.common_state["a_control"]).all())
    finally:
        distributed.stop(world)


def held(clients, client):
    nothing = torch.zeros(clients.widths["a"])
    return clients._parts[client].get("a_control", nothing).clone()


def test_new_moments_leave_control_variates_alone():
    clients = store()
    local_round(clients, (0, 1), 0, TrainSection())
    clients.take_controls({0, 1})
    variates = [held(clients, client) for client in range(N)]
    clients.reset_optimizer()
    assert set(clients._parts[0]) == {"a", "b", "a_control"}
    assert all(torch.equal(held(clients, c), one) for c, one in enumerate(variates))
    assert bool(variates[0].any()) and not variates[2].any()


def test_a_client_that_has_its_steps_behind_it_keeps_its_mean_gradient():
    """Clients of a pass make unequally many steps; the gradients of who is done may be anything."""
    clients = store()
    terms = LocalTerms(LAYOUT, 0.0, {}, {"A": torch.zeros(clients.widths["a"])})
    with closing(clients.passes([(0, 1, 2)], ("A", "B"))) as passes:
        rows = next(passes)
        rows.controls["a_mean_gradient"].fill_(3.0)
        rows.grads.fill_(math.nan)
        rows.grads[0] = 5.0
        active_C = torch.tensor([True, False, False])
        terms.add_to(rows, torch.tensor([0.5, 0.0, 0.0]), active_C)
        means = rows.controls["a_mean_gradient"]
        assert bool((means[0] == 4.0).all()) and bool((means[1:] == 3.0).all())


@given(rates=st.lists(st.floats(0, 10), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_the_running_mean_is_the_weighted_mean_whatever_was_there_before(rates, seed):
    values = draw(len(rates), seed=seed).double()
    mean = torch.tensor(1e30)
    for weight, value in zip(mean_weights(rates), values, strict=True):
        mean = torch.lerp(mean.double(), value, weight)
    weights = torch.tensor(rates if sum(rates) > 0 else [1.0] * len(rates), dtype=torch.float64)
    # Normalised first: the products of the smallest rates would underflow.
    torch.testing.assert_close(mean, (weights / weights.sum() * values).sum())


def test_without_terms_clients_hold_nothing_more():
    clients = ClientStore(range(N), LAYOUT, CPU, clients_per_pass=N, moments=MOMENTS)
    assert clients._stay is not None and not clients._stay.controls
    assert set(clients.widths) >= {"a", "b"} and "a_control" not in clients.widths


# --- a term that a method names -------------------------------------------------------------------


def orthogonal(held):
    """Of 1/4 ||A A^T - I||^2 of each client, and of gamma/2 ||B||^2."""
    a = held.factors["A"]
    return {"A": (a @ a.mT - torch.eye(a.shape[1])) @ a, "B": held.gamma * held.factors["B"]}


def term_of(function, trained=("A", "B")):
    return LocalTerms(
        LAYOUT, 0.0, {"A": draw(A.stop, seed=9)}, {}, MethodTerm(function, trained, 0.5)
    )


def rows_of(clients):
    with closing(clients.passes([tuple(range(N))], ())) as passes:
        rows = next(passes)
    rows.values.copy_(draw(N, LAYOUT.size, seed=4))
    rows.grads.copy_(draw(N, LAYOUT.size, seed=5))
    return rows


def test_a_methods_term_is_the_gradient_of_its_loss_for_each_client_and_layer():
    rows = rows_of(store())
    before = rows.grads.clone()
    term_of(orthogonal).add_to(rows, None, torch.ones(N, dtype=torch.bool))
    for client in range(N):
        row = rows.values[client].clone().requires_grad_(True)
        loss = torch.zeros(())
        for piece in LAYOUT.pieces:
            factor = row[piece.start : piece.end].view(piece.shape)
            if piece.factor == "A":
                loss = loss + 0.25 * (factor @ factor.T - torch.eye(len(factor))).square().sum()
            else:
                loss = loss + 0.25 * factor.square().sum()
        loss.backward()
        torch.testing.assert_close(rows.grads[client], before[client] + row.grad)


def test_a_methods_term_gets_what_was_received_and_may_leave_a_factor_out():
    rows, seen = rows_of(store()), {}

    def proximal(held):
        seen[held.layer] = held
        return {"A": held.factors["A"] - held.received["A"]}

    before = rows.grads.clone()
    term_of(proximal).add_to(rows, None, torch.ones(N, dtype=torch.bool))
    other = rows_of(store())
    received = {"A": draw(A.stop, seed=9)}
    LocalTerms(LAYOUT, 1.0, received, {}).add_to(other, None, torch.ones(N, dtype=torch.bool))
    torch.testing.assert_close(rows.grads, other.grads)
    assert torch.equal(rows.grads[:, LAYOUT.columns("B")], before[:, LAYOUT.columns("B")])
    assert seen.keys() == {"q", "v"} and seen["q"].received.keys() == {"A"}
    assert seen["q"].factors["A"].shape == (N, 2, 5) and seen["q"].factors["B"].shape == (N, 7, 2)


def changes_it(held):
    held.factors["A"].mul_(2.0)
    return {}


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda held: 1 / 0, "it raised ZeroDivisionError"),
        (lambda held: None, "it returned NoneType; it has to return a mapping"),
        (lambda held: {"B": held.factors["B"]}, "it returned ['B']"),
        (
            lambda held: {"A": held.factors["A"][0]},
            "shape (2, 5) and dtype torch.float32; expected",
        ),
        (lambda held: {"A": held.factors["A"].double()}, "dtype torch.float64"),
        (lambda held: {"A": 3.0}, "the gradient of A is float"),
        (changes_it, "it changed the factors"),
    ],
)
def test_what_is_wrong_with_a_methods_term_is_said_with_its_layer(function, part):
    with pytest.raises(UserError) as caught:
        term_of(function, ("A",)).add_to(rows_of(store()), None, torch.ones(N, dtype=torch.bool))
    assert "of federated.method, layer q: " in str(caught.value) and part in str(caught.value)


# --- clients of different ranks --------------------------------------------------------------


@pytest.mark.parametrize("b_scales", [(), (4.0, 1.0, 2.0)])
def test_the_proximal_term_is_about_what_a_client_of_a_smaller_rank_received(b_scales):
    """Its rows, B with its own factor, and nothing beyond its rank, which stays zero."""
    layout = replace(LAYOUT, ranks=(1, 2, 1), b_scales=b_scales)
    clients = ClientStore(range(N), layout, CPU, clients_per_pass=N, moments=())
    common = {f: draw(clients.widths[f.lower()], seed=7) for f in ("A", "B")}
    for factor, values in common.items():
        clients.set_shared(factor, values)
    received = clients.load_values(range(N)).clone()
    with closing(clients.passes([(0, 1, 2)], ("A", "B"))) as passes:
        for rows in passes:
            rows.grads.zero_()
            terms = LocalTerms(layout, MU, common, {})
            terms.add_to(rows, None, torch.ones(N, dtype=torch.bool))
            assert not rows.grads.any(), "nobody has moved"
            rows.values.add_(1.0)
            for factor in ("A", "B"):
                layout.clear_padding(rows.clients, factor, rows.values[:, layout.columns(factor)])
            terms.add_to(rows, None, torch.ones(N, dtype=torch.bool))
            torch.testing.assert_close(rows.grads, MU * (rows.values - received))
            for factor in ("A", "B"):
                grads = rows.grads[:, layout.columns(factor)]
                left = grads.clone()
                layout.clear_padding(rows.clients, factor, left)
                assert torch.equal(left, grads) and grads.any()
