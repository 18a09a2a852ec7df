"""The LoRA scaling factor gamma as a function of alpha, the LoRA rank and the number of clients.

    h = W0 x + gamma B A x          gamma = alpha * N^(exponent of N) * r^(exponent of r)

LoRA (arXiv 2106.09685): alpha / r. rsLoRA (arXiv 2312.03732): alpha / sqrt(r).
SFed-LoRA (arXiv 2603.08058): alpha * sqrt(N / r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
