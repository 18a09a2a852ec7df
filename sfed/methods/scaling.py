"""The LoRA scaling factor gamma as a function of alpha, the LoRA rank and the number of clients.

    h = W0 x + gamma B A x          gamma = alpha * N^(exponent of N) * r^(exponent of r)

LoRA (arXiv 2106.09685): alpha / r. rsLoRA (arXiv 2312.03732): alpha / sqrt(r).
SFed-LoRA (arXiv 2603.08058): alpha * sqrt(N / r).

Where the clients have different ranks r_i, row l of A is the mean over those that hold it. With
weights q_il of that mean, sum 1 over i, its variance is 1/N_l = sum_i q_il^2 of a draw's, and

    gamma_i = alpha / sqrt(sum over the rows l of client i of 1/N_l)

keeps the variance of gamma_i A x what it is with one rank, where it is alpha * sqrt(N / r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sfed.utils.errors import ConfigError

# name -> (exponent of N, exponent of r)
EXPONENTS: dict[str, tuple[float, float]] = {
    "lora": (0.0, -1.0),
    "rslora": (0.0, -0.5),
    "sfed": (0.5, -0.5),
}

_SUSPECT_TIMES, _SUSPECT_GAMMA = 4.0, 4.0
"""Gammas beyond are not what recipes of LoRA train with."""


def lora_scaling(
    alpha: float, lora_rank: int, num_clients: float, exponents: tuple[float, float]
) -> float:
    """Return gamma = alpha * N**exponents[0] * r**exponents[1].

    Args:
        alpha: LoRA's alpha, > 0.
        lora_rank: r, >= 1.
        num_clients: N, the number of independent draws of A averaged before the first step. With
            unequal weights pass ``effective_clients``. Never the clients of one round.
        exponents: of N and of r.
    """
    of_clients, of_rank = exponents
    return alpha * math.pow(num_clients, of_clients) * math.pow(lora_rank, of_rank)


def client_scalings(
    alpha: float,
    ranks: Sequence[int],
    client_weights: Sequence[float],
    exponents: tuple[float, float],
) -> tuple[float, ...]:
    """Return gamma of each client.

    Args:
        alpha: LoRA's alpha, > 0.
        ranks: (N,) r_i of each client.
        client_weights: (N,) of the mean before the first step, of any sum above 0.
        exponents: of N and of r.

    Raises:
        ConfigError: where the ranks differ and gamma grows with N in another way than sfed's: what
            N is for a client then follows from no formula.
    """
    if len(set(ranks)) == 1:
        effective = effective_clients(client_weights)
        return (lora_scaling(alpha, ranks[0], effective, exponents),) * len(ranks)
    if exponents[0] == 0:
        return tuple(lora_scaling(alpha, lora_rank, 1, exponents) for lora_rank in ranks)
    if exponents != EXPONENTS["sfed"]:
        raise ConfigError(
            f"lora.scaling = [{exponents[0]:g}, {exponents[1]:g}] with clients of different LoRA "
            "ranks: rows of A are means over different numbers of clients, so N is no one number; "
            "set lora.scaling=sfed, an exponent of N of 0, or one rank for all clients"
        )
    inverse_of_row: list[float] = []
    for row in range(max(ranks)):
        holders = [w for w, lora_rank in zip(client_weights, ranks, strict=True) if lora_rank > row]
        inverse_of_row.append(1.0 / effective_clients(holders))
    return tuple(alpha / math.sqrt(math.fsum(inverse_of_row[:lora_rank])) for lora_rank in ranks)


def alpha_of_another_formula(alpha: float, lora_rank: int, gamma: float) -> str | None:
    """Say that an alpha seems to be made for alpha / r, where gamma is much larger; else None.

    Args:
        alpha: that a person has set.
        lora_rank: r.
        gamma: that follows from it here.
    """
    plain = alpha / lora_rank
    if gamma <= max(_SUSPECT_TIMES * plain, _SUSPECT_GAMMA):
        return None
    return (
        f"lora.alpha = {alpha:g} gives gamma = {gamma:.3g}, {gamma / plain:.3g} times what "
        "alpha / r gives, the formula of plain LoRA: if the value is from there, lora.alpha = "
        f"{alpha * plain / gamma:.3g} gives the same gamma here"
    )


def effective_clients(client_weights: Sequence[float]) -> float:
    """Return N_eff = 1 / sum(p_i^2) of weights normalised to sum 1; N for equal weights.

    It is what N is in the variance of a weighted mean of independent matrices.
    """
    total = math.fsum(client_weights)
    return 1.0 / math.fsum((weight / total) ** 2 for weight in client_weights)
