"""Tests of the optimizer: every client against torch.optim run on its own.

Shape suffixes: C clients, N parameters of a row.
"""

import dataclasses
import math
from contextlib import closing

import pytest
import torch

from sfed.clients import optimizer
from sfed.clients.state import MOMENTS
from sfed.clients.store import ClientStore
from sfed.config.sections.train import TrainSection
from sfed.lora.layout import Layout

LAYOUT = Layout.of([("q", 5, 7), ("v", 3, 4)], lora_rank=2)
CLIENTS, STEPS = 3, 40
AB = ("A", "B")


def section(**values):
    return TrainSection(**{"max_grad_norm": None, **values})


def make_rows(kind, num_clients=CLIENTS):
    """Clients that differ, with B = 0 as at the start of a run."""
    names = MOMENTS if kind == "adamw" else ()
    cpu, own = torch.device("cpu"), range(num_clients)
    clients = ClientStore(own, LAYOUT, cpu, clients_per_pass=num_clients, moments=names)
    with closing(clients.passes([tuple(own)], ())) as passes:
        rows = next(passes)  # all clients stay on the device
    rows.values.normal_(generator=torch.Generator().manual_seed(1))
    rows.values[:, LAYOUT.columns("B")] = 0.0
    return rows


def gradients(steps=STEPS, num_clients=CLIENTS):
    """Gradients of very different sizes for the clients, (steps, C, N)."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(steps, num_clients, LAYOUT.size, generator=generator)
    return drawn * torch.tensor([1e-3, 1.0, 30.0])[:num_clients, None]


def take_step(rows, grads_CN, settings, lr_C, trained=AB, active_C=None):
    rows.grads.copy_(grads_CN)
    if active_C is None:
        active_C = torch.ones(len(rows.clients), dtype=torch.bool)
    adam = optimizer.StackedOptimizer(settings, LAYOUT, trained)
    norms_C = adam.gradient_norms(rows)
    adam.step(rows, lr_C, norms_C, active_C)


class Alone:
    """One client's training with torch.optim."""

    def __init__(self, row, settings):
        self.factors = {
            factor: torch.nn.Parameter(row[LAYOUT.columns(factor)].clone()) for factor in AB
        }
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.optimizer]
        groups = [{"params": [parameter]} for parameter in self.factors.values()]
        self.optimizer = kind(groups, lr=1.0, weight_decay=settings.weight_decay)
        self.settings = settings

    def step(self, grads_N, lr, trained=AB):
        for factor, parameter in self.factors.items():
            columns = LAYOUT.columns(factor)
            parameter.grad = grads_N[columns].clone() if factor in trained else None
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.factors.values(), self.settings.max_grad_norm)
        group_a, group_b = self.optimizer.param_groups
        group_a["lr"], group_b["lr"] = lr, lr * self.settings.loraplus_ratio
        self.optimizer.step()


def assert_equal_to(rows, alone, tolerance=1e-6):
    for client, one in enumerate(alone):
        for factor, parameter in one.factors.items():
            found, expected = rows.values[client, LAYOUT.columns(factor)], parameter.detach()
            error = torch.linalg.vector_norm(found - expected)
            assert error <= tolerance * torch.linalg.vector_norm(expected), (client, factor)


SETTINGS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "clipping": {"max_grad_norm": 1.0},
    "LoRA+": {"loraplus_ratio": 16.0},
    "everything": {"weight_decay": 0.1, "max_grad_norm": 0.5, "loraplus_ratio": 4.0},
}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS.keys())
def test_zeros_beyond_a_rank_stay_zeros_bit_for_bit(kind, values):
    """Their gradients are 0; so are their moments, and neither eps nor weight decay moves them."""
    layout = dataclasses.replace(LAYOUT, ranks=(1, 2, 1))
    rows = make_rows(kind)
    for grads_CN in gradients(5):
        for factor in AB:
            for tensor in (rows.values, grads_CN):
                layout.clear_padding(rows.clients, factor, tensor[:, layout.columns(factor)])
        take_step(rows, grads_CN, section(optimizer=kind, **values), torch.full((3,), 1e-2))
        for factor in AB:
            for view in layout.along_rank(factor, rows.values[:, layout.columns(factor)]):
                beyond = view[[0, 2], :, 1:]
                assert not beyond.any() and not beyond.signbit().any()
                assert view[1].all() and view[:, :, 0].all()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS.keys())
def test_each_client_moves_as_with_torch_optim_alone(kind, values):
    settings = section(optimizer=kind, **values)
    rows = make_rows(kind)
    alone = [Alone(row, settings) for row in rows.values]
    lr_C = torch.tensor([1e-3, 1e-2, 3e-3])
    for number, grads_CN in enumerate(gradients()):
        rates = lr_C * (1.0 - number / STEPS)
        take_step(rows, grads_CN, settings, rates)
        for client, one in enumerate(alone):
            one.step(grads_CN[client], float(rates[client]))
        assert_equal_to(rows, alone)
    assert (rows.optimizer_steps[:, :2] == STEPS).all()


def test_the_moments_are_those_of_torch_optim():
    settings = section(max_grad_norm=1.0)
    rows = make_rows("adamw")
    alone = [Alone(row, settings) for row in rows.values]
    for grads_CN in gradients():
        take_step(rows, grads_CN, settings, torch.full((CLIENTS,), 1e-2))
        for client, one in enumerate(alone):
            one.step(grads_CN[client], 1e-2)
    for client, one in enumerate(alone):
        for factor, parameter in one.factors.items():
            for name in MOMENTS:
                found = rows.moments[name][client, LAYOUT.columns(factor)]
                torch.testing.assert_close(
                    found, one.optimizer.state[parameter][name], rtol=1e-5, atol=1e-9
                )


def test_factors_that_train_in_turns_move_as_with_torch_optim_alone():
    settings = section()
    rows = make_rows("adamw")
    alone = [Alone(row, settings) for row in rows.values]
    for number, grads_CN in enumerate(gradients()):
        trained = ("B",) if number // 10 % 2 == 0 else ("A",)
        take_step(rows, grads_CN, settings, torch.full((CLIENTS,), 1e-2), trained)
        for client, one in enumerate(alone):
            one.step(grads_CN[client], 1e-2, trained)
        assert_equal_to(rows, alone, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_client_that_rests_now_and_then_moves_as_alone(kind):
    settings = section(optimizer=kind, weight_decay=0.1, max_grad_norm=1.0)
    rows = make_rows(kind)
    alone = [Alone(row, settings) for row in rows.values]
    generator = torch.Generator().manual_seed(3)
    for grads_CN in gradients():
        active_C = torch.rand(CLIENTS, generator=generator) < 0.6
        take_step(rows, grads_CN, settings, torch.full((CLIENTS,), 1e-2), active_C=active_C)
        for client, one in enumerate(alone):
            if active_C[client]:
                one.step(grads_CN[client], 1e-2)
        assert_equal_to(rows, alone)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_client_moves_bit_for_bit_the_same_whatever_the_others_do(kind):
    settings = section(optimizer=kind, weight_decay=0.1, max_grad_norm=1.0)
    first, second = make_rows(kind), make_rows(kind)
    second.values[[0, 2]] *= 100.0
    for grads_CN in gradients():
        take_step(first, grads_CN, settings, torch.tensor([1e-3, 1e-2, 1e-3]))
        other_CN = grads_CN * torch.tensor([1e6, 1.0, -3.0])[:, None]
        active_C = torch.tensor([True, True, False])
        take_step(second, other_CN, settings, torch.tensor([9.0, 1e-2, 5.0]), active_C=active_C)
    assert torch.equal(first.values[1], second.values[1])
    assert not torch.equal(first.values[0], second.values[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_client_that_rests_keeps_every_bit_whatever_its_gradient_holds(kind, clip, bad):
    settings = section(optimizer=kind, weight_decay=0.1, max_grad_norm=clip, loraplus_ratio=2.0)
    rows = make_rows(kind)
    grads = gradients(6)
    for grads_CN in grads[:3]:
        take_step(rows, grads_CN, settings, torch.full((CLIENTS,), 1e-2))

    def state_of(client):
        parts = [rows.values, *rows.moments.values(), rows.optimizer_steps]
        return [part[client].clone().reshape(-1).view(torch.int32) for part in parts]

    before = [state_of(client) for client in range(CLIENTS)]
    active_C = torch.tensor([True, False, True])
    for grads_CN in grads[3:]:
        grads_CN[1] = bad
        take_step(rows, grads_CN, settings, torch.full((CLIENTS,), 1e-2), active_C=active_C)
    assert all(map(torch.equal, before[1], state_of(1)))
    for client in (0, 2):
        assert not any(map(torch.equal, before[client], state_of(client)))
        assert torch.isfinite(rows.values[client]).all()


@pytest.mark.parametrize("trained", ["A", "B"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_factor_that_is_not_trained_keeps_every_bit_even_under_weight_decay(kind, trained):
    settings = section(optimizer=kind, weight_decay=0.5, max_grad_norm=1.0)
    rows = make_rows(kind)
    rows.values.normal_(generator=torch.Generator().manual_seed(4))
    frozen = LAYOUT.columns("A" if trained == "B" else "B")
    before = rows.values.clone()
    for grads_CN in gradients(5):
        take_step(rows, grads_CN, settings, torch.full((CLIENTS,), 0.1), (trained,))
    assert torch.equal(rows.values[:, frozen], before[:, frozen])
    assert not torch.equal(
        rows.values[:, LAYOUT.columns(trained)], before[:, LAYOUT.columns(trained)]
    )
    assert all(not moment[:, frozen].any() for moment in rows.moments.values())


@pytest.mark.parametrize("trained", [("A", "B"), ("A",), ("B",)])
def test_the_norm_of_a_gradient_is_over_the_trained_factors_of_each_client(trained):
    rows = make_rows("sgd")
    rows.grads.copy_(gradients(1)[0])
    expected = [
        torch.cat([row[LAYOUT.columns(factor)] for factor in trained]).double().norm().item()
        for row in rows.grads
    ]
    found = optimizer.StackedOptimizer(section(), LAYOUT, trained).gradient_norms(rows)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_only_the_client_whose_gradient_is_too_long_is_clipped():
    settings = section(optimizer="sgd", max_grad_norm=1.0)
    rows = make_rows("sgd", 2)
    before = rows.values.clone()
    grads_CN = torch.zeros(2, LAYOUT.size)
    grads_CN[0, :2], grads_CN[1, :2] = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    take_step(rows, grads_CN, settings, torch.ones(2))
    moved = (before - rows.values)[:, :2]
    torch.testing.assert_close(moved, torch.tensor([[0.3, 0.4], [0.6, 0.8]]), rtol=1e-5, atol=0)
