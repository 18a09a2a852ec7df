"""AdamW (arXiv 1711.05101) of each client as if it were alone; SGD too.

A client that does not step keeps every bit of its row and of its moments. Shape suffixes:
C clients, N parameters of a row or of a factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sfed.kernels.interface import AdamwRows, ClientStep, FactorStep

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def adamw(rows: AdamwRows, factors: Sequence[FactorStep], step: ClientStep) -> None:
    """Make a step of AdamW; see ``interface.Adamw``."""
    _scale(rows.grads, step)
    # 0 and 1 of who does not step, whose moments move by nothing.
    weight_C1 = step.active[:, None].to(rows.grads.dtype)
    gain_C1, kept_C1 = (1.0 - BETA1) * weight_C1, 1.0 - (1.0 - BETA2) * weight_C1
    for factor in factors:
        own, rates_C1 = rows.at(factor.columns), factor.rates[:, None]
        own.exp_avg.lerp_(own.grads, gain_C1)
        own.exp_avg_sq.mul_(kept_C1).addcmul_(own.grads, own.grads, value=1.0 - BETA2)
        _decay(own.values, rates_C1, step.weight_decay)
        rates_C1 = rates_C1 * _adam(own, factor.steps[:, None])
        own.values.addcmul_(own.grads, rates_C1, value=-1.0)


def sgd(
    values_CN: torch.Tensor,
    grads_CN: torch.Tensor,
    factors: Sequence[FactorStep],
    step: ClientStep,
) -> None:
    """Make a step of SGD; there are no moments."""
    _scale(grads_CN, step)
    for factor in factors:
        own_CN, rates_C1 = values_CN[:, factor.columns], factor.rates[:, None]
        _decay(own_CN, rates_C1, step.weight_decay)
        own_CN.addcmul_(grads_CN[:, factor.columns], rates_C1, value=-1.0)


def _scale(grads_CN: torch.Tensor, step: ClientStep) -> None:
    """Clip the gradients; 0 of who does not step."""
    grads_CN.masked_fill_(~step.active[:, None], 0.0)
    if step.clip is not None:
        grads_CN.mul_(step.clip.where(step.active, 0.0)[:, None])


def _decay(values_CN: torch.Tensor, rates_C1: torch.Tensor, weight_decay: float) -> None:
    if weight_decay:
        values_CN.mul_(1.0 - rates_C1 * weight_decay)


def _adam(rows: AdamwRows, steps_C1: torch.Tensor) -> torch.Tensor:
    """Write mean / (sqrt(square) + eps * c) over the gradients; return c / (1 - beta1^t).

    With c = sqrt(1 - beta2^t), that is Adam's corrected mean / (sqrt(corrected square) + eps).
    """
    steps_C1 = steps_C1.clamp(min=1.0)  # 0 of who never stepped: unused
    # 1 - beta^steps, without the cancellation.
    correction1_C1 = -torch.expm1(steps_C1 * math.log(BETA1))
    root_C1 = torch.expm1(steps_C1 * math.log(BETA2)).neg_().sqrt_()
    torch.sqrt(rows.exp_avg_sq, out=rows.grads)
    torch.div(rows.exp_avg, rows.grads.add_(EPS * root_C1), out=rows.grads)
    return root_C1 / correction1_C1
