"""One optimizer step for all clients of a pass, each as if it were alone.

AdamW (arXiv 1711.05101) and SGD over the flat rows of the clients. Learning rate, clipping, weight
decay and bias correction are per client; a client that does not step keeps every bit of its row and
of its moments. Shape suffixes: C clients, N numbers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sfed.adapters import Layout
from sfed.rows import FACTORS, Rows
from sfed.sections import TrainSection

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def learning_rate(section: TrainSection, num_rounds: int, progress_rounds: float) -> float:
    """Return the learning rate after ``progress_rounds`` rounds (a fraction within a round).

    Linear warm-up over ``warmup_rounds``, then constant, or cosine or linear down to 0 at the end
    of the run.
    """
    warmup = section.warmup_rounds
    if progress_rounds < warmup:
        return section.lr * progress_rounds / warmup
    rest = (progress_rounds - warmup) / max(num_rounds - warmup, 1e-12)
    if section.schedule == "cosine":
        return section.lr * 0.5 * (1.0 + math.cos(math.pi * min(rest, 1.0)))
    if section.schedule == "linear":
        return section.lr * max(0.0, 1.0 - rest)
    return section.lr


def gradient_norms(rows: Rows, layout: Layout, trained: Sequence[str]) -> torch.Tensor:
    """Return the Euclidean norm of each client's gradient over its trained factors: (C,)."""
    parts = [rows.grads[:, layout.columns(factor)] for factor in trained]
    norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts])
    total: torch.Tensor = torch.linalg.vector_norm(norms, dim=0)
    return total


def step(
    rows: Rows,
    layout: Layout,
    trained: Sequence[str],
    section: TrainSection,
    lr_C: torch.Tensor,
    norms_C: torch.Tensor,
    active_C: torch.Tensor,
) -> None:
    """Take one step, in place.

    Args:
        rows: of the clients; ``grads`` is used up.
        layout: of a row.
        trained: factors that move.
        section: the optimizer's settings.
        lr_C: (C,) learning rate of A.
        norms_C: (C,) norm of each gradient, for clipping.
        active_C: (C,) bool, who takes the step. The gradients of the others may hold anything.
    """
    active_C1 = active_C[:, None]
    rows.grads.masked_fill_(~active_C1, 0.0)
    if section.max_grad_norm is not None:
        clip_C = (section.max_grad_norm / (norms_C + 1e-6)).clamp(max=1.0)
        rows.grads.mul_(clip_C.where(active_C, 0.0)[:, None])
    for factor in trained:
        columns = layout.columns(factor)
        steps_C1 = rows.optimizer_steps[:, FACTORS.index(factor), None]
        steps_C1.add_(active_C1)
        lr_C1 = (lr_C * active_C)[:, None]
        if factor == "B":
            lr_C1 = lr_C1 * section.loraplus_ratio
        values_CN, grads_CN = rows.values[:, columns], rows.grads[:, columns]
        if section.weight_decay:
            values_CN.mul_(1.0 - lr_C1 * section.weight_decay)
        if section.optimizer == "sgd":
            values_CN.addcmul_(grads_CN, lr_C1.expand_as(grads_CN), value=-1.0)
        else:
            _adam(rows, columns, values_CN, grads_CN, lr_C1, active_C1, steps_C1)


def _adam(
    rows: Rows,
    columns: slice,
    values_CN: torch.Tensor,
    grads_CN: torch.Tensor,
    lr_C1: torch.Tensor,
    active_C1: torch.Tensor,
    steps_C1: torch.Tensor,
) -> None:
    mean_CN = rows.moments["exp_avg"][:, columns]
    square_CN = rows.moments["exp_avg_sq"][:, columns]
    weight_C1 = active_C1.to(grads_CN.dtype)
    mean_CN.lerp_(grads_CN, (1.0 - BETA1) * weight_C1)
    square_CN.mul_(1.0 - (1.0 - BETA2) * weight_C1)
    square_CN.addcmul_(grads_CN, grads_CN, value=1.0 - BETA2)
    steps_C1 = steps_C1.clamp(min=1.0)  # 0 of who never stepped: unused
    # 1 - beta^steps, without the cancellation.
    correction1_C1 = -torch.expm1(steps_C1 * math.log(BETA1))
    correction2_C1 = -torch.expm1(steps_C1 * math.log(BETA2))
    denominator_CN = (square_CN / correction2_C1).sqrt_().add_(EPS)
    values_CN.sub_((lr_C1 / correction1_C1) * mean_CN / denominator_CN)
