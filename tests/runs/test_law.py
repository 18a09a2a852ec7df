"""Property 6: SFed is rsLoRA from another start; the factor keeps the first step's size in N and r.

DESIGN section 2 has the derivation; the linear model here is the theorem's own setting.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sfed.clients import optimizer
from sfed.clients.state import PassState
from sfed.config.sections.train import TrainSection
from sfed.kernels.plain import adamw
from sfed.lora.layout import Layout
from sfed.methods import scaling

WIDTH = 128


def independent_mean(num_clients: int, lora_rank: int, seed: int) -> torch.Tensor:
    """Mean of N independent A's, each uniform in +-1/sqrt(in): (r, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(num_clients, lora_rank, WIDTH)
    return draws.uniform_(-(WIDTH**-0.5), WIDTH**-0.5, generator=generator).mean(dim=0)


@pytest.mark.parametrize("num_clients", [1, 4, 16, 64])
@pytest.mark.parametrize("lora_rank", [4, 32, 256])
def test_gamma_times_the_mean_a_has_the_same_size_for_all_n_and_r(
    num_clients: int, lora_rank: int
) -> None:
    gamma = scaling.lora_scaling(1.0, lora_rank, num_clients, scaling.EXPONENTS["sfed"])
    sizes = [
        gamma * float(independent_mean(num_clients, lora_rank, seed).norm()) for seed in range(4)
    ]
    expected = math.sqrt(WIDTH) * WIDTH**-0.5 / math.sqrt(3)  # alpha sigma sqrt(k)
    assert np.mean(sizes) == pytest.approx(expected, rel=0.1)


def first_gradient(num_clients: int, lora_rank: int, name: str, *, independent: bool) -> float:
    """Norm of the first gradient of A and B for a linear layer with B = 0, over several draws."""
    gamma = scaling.lora_scaling(1.0, lora_rank, num_clients, scaling.EXPONENTS[name])
    norms = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(1000 + seed)
        x, v = (torch.randn(8, WIDTH, generator=generator) for _ in range(2))
        a = independent_mean(num_clients if independent else 1, lora_rank, seed)
        norms.append(float((gamma * v.T @ (x @ a.T)).norm()))  # the gradient of A is 0
    return float(np.mean(norms))


@pytest.mark.parametrize(
    ("name", "independent", "slope_n", "slope_r"),
    [
        ("sfed", True, 0.0, 0.0),
        ("rslora", True, -0.5, 0.0),
        ("lora", True, -0.5, -0.5),
        ("sfed", False, 0.5, 0.0),
        ("rslora", False, 0.0, 0.0),
        ("lora", False, 0.0, -0.5),
    ],
)
def test_the_first_gradient_grows_with_n_and_r_as_the_theory_says(
    name: str, independent: bool, slope_n: float, slope_r: float
) -> None:
    clients, ranks = [1, 4, 16, 64], [16, 64, 256]
    over_n = [first_gradient(n, 64, name, independent=independent) for n in clients]
    over_r = [first_gradient(16, r, name, independent=independent) for r in ranks]
    assert np.polyfit(np.log(clients), np.log(over_n), 1)[0] == pytest.approx(slope_n, abs=0.1)
    assert np.polyfit(np.log(ranks), np.log(over_r), 1)[0] == pytest.approx(slope_r, abs=0.1)


@pytest.mark.parametrize("ranks", [(4, 8, 64, 64), (4, 4, 4, 64)])
def test_the_first_gradient_of_every_rank_is_the_same_for_all_n(ranks: tuple[int, ...]) -> None:
    """Clients of mixed ranks: the slopes in N and r are 0 for each, as with one rank for all."""
    counts, norms = [4, 16, 64], []
    for num_clients in counts:
        of_clients = [ranks[client % 4] for client in range(num_clients)]
        exponents = scaling.EXPONENTS["sfed"]
        gammas = scaling.client_scalings(1.0, of_clients, [1.0] * num_clients, exponents)
        sizes = np.zeros(4)
        for seed in range(16):
            generator = torch.Generator().manual_seed(1000 + seed)
            x, v = (torch.randn(8, WIDTH, generator=generator) for _ in range(2))
            draws = torch.empty(num_clients, max(ranks), WIDTH)
            draws.uniform_(-(WIDTH**-0.5), WIDTH**-0.5, generator=generator)
            holds = torch.tensor(of_clients)[:, None] > torch.arange(max(ranks))
            a = torch.einsum("nr,nri->ri", holds / holds.sum(dim=0), draws)
            for client in range(4):
                own = a[: ranks[client]]
                sizes[client] += float((gammas[client] * v.T @ (x @ own.T)).norm()) / 16
        norms.append(sizes)
    for client in range(4):
        slope = np.polyfit(np.log(counts), np.log([one[client] for one in norms]), 1)[0]
        assert slope == pytest.approx(0.0, abs=0.1)
    assert np.polyfit(np.log(ranks), np.log(norms[0]), 1)[0] == pytest.approx(0.0, abs=0.1)


def trained(
    kind: str, a_start: torch.Tensor, gamma: float, lr_a: float, lr_b: float, num_clients: int
) -> list[torch.Tensor]:
    """Three rounds of our optimizer on linear clients, A averaged; returns gamma B_i A of each."""
    lora_rank, layout = a_start.shape[0], Layout.of([("l", WIDTH, 24)], a_start.shape[0])
    shape = (num_clients, layout.size)
    moments = {name: torch.zeros(shape, dtype=torch.float64) for name in ("exp_avg", "exp_avg_sq")}
    rows = PassState(
        tuple(range(num_clients)),
        torch.zeros(shape, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
        moments,
        torch.zeros(num_clients, 3, dtype=torch.float64),
    )
    a_columns, b_columns = layout.columns("A"), layout.columns("B")
    rows.values[:, a_columns] = a_start.double().flatten()
    generator = torch.Generator().manual_seed(9)
    data = torch.randn(num_clients, 8, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randn(num_clients, 8, 24, generator=generator, dtype=torch.float64)
    section = TrainSection(optimizer=kind, max_grad_norm=None, lr=lr_a, loraplus_ratio=lr_b / lr_a)
    rates = torch.full((num_clients,), lr_a, dtype=torch.float64)
    for _ in range(3):
        for _ in range(4):
            values = rows.values.clone().requires_grad_()
            a = values[:, a_columns].view(num_clients, lora_rank, WIDTH)
            b = values[:, b_columns].view(num_clients, 24, lora_rank)
            y = gamma * torch.bmm(torch.bmm(data, a.transpose(1, 2)), b.transpose(1, 2))
            ((y - targets) ** 2).mean(dim=(1, 2)).sum().backward()
            rows.grads.copy_(values.grad)
            active = torch.ones(num_clients, dtype=torch.bool)
            norms = torch.ones(num_clients)
            optimizer.StackedOptimizer(section, layout, ("A", "B")).step(rows, rates, norms, active)
        rows.values[:, a_columns] = rows.values[:, a_columns].mean(dim=0)
    a = rows.values[:, a_columns].view(num_clients, lora_rank, WIDTH)
    b = rows.values[:, b_columns].view(num_clients, 24, lora_rank)
    return list(gamma * torch.bmm(b, a))


@pytest.mark.parametrize(
    ("kind", "factor", "tolerance"), [("sgd", 1.0, 1e-9), ("adamw", 0.5, 1e-4)]
)
@pytest.mark.parametrize("num_clients", [4, 16])
def test_sfed_is_rslora_from_the_scaled_mean_with_a_faster_a(
    kind: str, factor: float, tolerance: float, num_clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lr of A times N under SGD, times sqrt(N) under Adam with eps -> 0; B's unchanged."""
    monkeypatch.setattr(adamw, "EPS", 1e-14)
    lora_rank, lr = 8, 1e-3 if kind == "adamw" else 0.3
    mean = independent_mean(num_clients, lora_rank, 3)
    gamma = {
        name: scaling.lora_scaling(2.0, lora_rank, num_clients, scaling.EXPONENTS[name])
        for name in ("sfed", "rslora")
    }
    sfed = trained(kind, mean, gamma["sfed"], lr, lr, num_clients)
    start = math.sqrt(num_clients) * mean
    faster = lr * num_clients**factor
    same = trained(kind, start, gamma["rslora"], faster, lr, num_clients)
    slower = trained(kind, start, gamma["rslora"], lr, lr, num_clients)
    size = max(float(one.norm()) for one in sfed)
    assert size > 0
    for one, other in zip(sfed, same, strict=True):
        assert float((one - other).norm()) <= tolerance * size
    assert any(float((one - o).norm()) > 1e-4 * size for one, o in zip(sfed, slower, strict=True))


def test_one_client_makes_sfed_rslora() -> None:
    for lora_rank in (1, 8, 300):
        values = [
            scaling.lora_scaling(3.0, lora_rank, 1, scaling.EXPONENTS[name])
            for name in ("sfed", "rslora")
        ]
        assert values[0] == values[1]
