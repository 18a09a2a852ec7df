"""One optimizer step for all clients of a pass, each as if it were alone.

AdamW (arXiv 1711.05101) and SGD over the flat rows of the clients. Learning rate, clipping, weight
decay and bias correction are per client; a client that does not step keeps every bit of its row and
of its moments. Shape suffixes: C clients, N parameters of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sfed.clients.state import FACTORS, PassState
from sfed.config.schema import TrainSection
from sfed.lora.layout import Layout

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def learning_rate(
    section: TrainSection, lr: float, num_rounds: int, progress_rounds: float
) -> float:
    """Return the learning rate after ``progress_rounds`` rounds (a fraction within a round).

    Linear warm-up over ``warmup_rounds``, then constant, or cosine or linear down to 0 at the end
    of the run.

    Args:
        section: the schedule.
        lr: of the client, after the warm-up.
        num_rounds: of the run.
        progress_rounds: since its start.
    """
    warmup = section.warmup_rounds
    if progress_rounds < warmup:
        return lr * progress_rounds / warmup
    rest = (progress_rounds - warmup) / max(num_rounds - warmup, 1e-12)
    if section.schedule == "cosine":
        return lr * 0.5 * (1.0 + math.cos(math.pi * min(rest, 1.0)))
    if section.schedule == "linear":
        return lr * max(0.0, 1.0 - rest)
    return lr


@dataclass(frozen=True)
class StackedOptimizer:
    """AdamW or SGD for the clients of a pass at once, in place; it holds no state of its own."""

    section: TrainSection
    layout: Layout
    """Layout of a client's row."""
    trained: tuple[str, ...]
    """Factors that move."""

    def gradient_norms(self, rows: PassState) -> torch.Tensor:
        """Return the Euclidean norm of each client's gradient over its trained factors: (C,)."""
        spans = self.layout.spans(self.trained)
        norms: list[torch.Tensor] = [
            torch.linalg.vector_norm(rows.grads[:, span], dim=1) for span in spans
        ]
        if len(norms) == 1:
            return norms[0]
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return total

    def step(
        self, rows: PassState, lr_C: torch.Tensor, norms_C: torch.Tensor, active_C: torch.Tensor
    ) -> None:
        """Take one step, in place; nothing is read back from the device.

        Args:
            rows: of the clients; ``grads`` is used up.
            lr_C: (C,) learning rate of A.
            norms_C: (C,) norm of each gradient, for clipping.
            active_C: (C,) bool, who takes the step. The gradients of the others may hold anything.
        """
        section, active_C1 = self.section, active_C[:, None]
        rows.grads.masked_fill_(~active_C1, 0.0)
        if section.max_grad_norm is not None:
            clip_C = (section.max_grad_norm / (norms_C + 1e-6)).clamp(max=1.0)
            rows.grads.mul_(clip_C.where(active_C, 0.0)[:, None])
        if section.optimizer == "adamw":
            for span in self.layout.spans(self.trained):
                _update_moments(rows, span, active_C1)
        lr_C1 = (lr_C * active_C)[:, None]
        for factor in self.trained:
            steps_C1 = rows.optimizer_steps[:, FACTORS.index(factor), None]
            steps_C1.add_(active_C1)
            rates_C1 = lr_C1 * section.loraplus_ratio if factor == "B" else lr_C1
            columns = self.layout.columns(factor)
            values_CN, update_CN = rows.values[:, columns], rows.grads[:, columns]
            if section.weight_decay:
                values_CN.mul_(1.0 - rates_C1 * section.weight_decay)
            if section.optimizer == "adamw":
                rates_C1 = rates_C1 * _adam(rows, columns, steps_C1, update_CN)
            values_CN.addcmul_(update_CN, rates_C1, value=-1.0)


def _update_moments(rows: PassState, columns: slice, active_C1: torch.Tensor) -> None:
    """Move the means of the gradient and of its square; of who does not step, by nothing."""
    grads_CN, weight_C1 = rows.grads[:, columns], active_C1.to(rows.grads.dtype)
    rows.moments["exp_avg"][:, columns].lerp_(grads_CN, (1.0 - BETA1) * weight_C1)
    square_CN = rows.moments["exp_avg_sq"][:, columns]
    square_CN.mul_(1.0 - (1.0 - BETA2) * weight_C1)
    square_CN.addcmul_(grads_CN, grads_CN, value=1.0 - BETA2)


def _adam(
    rows: PassState, columns: slice, steps_C1: torch.Tensor, update_CN: torch.Tensor
) -> torch.Tensor:
    """Write mean / (sqrt(square) + eps * c) to ``update_CN``; return the factor c / (1 - beta1^t).

    With c = sqrt(1 - beta2^t), that is Adam's corrected mean / (sqrt(corrected square) + eps).
    """
    steps_C1 = steps_C1.clamp(min=1.0)  # 0 of who never stepped: unused
    # 1 - beta^steps, without the cancellation.
    correction1_C1 = -torch.expm1(steps_C1 * math.log(BETA1))
    root_C1 = torch.expm1(steps_C1 * math.log(BETA2)).neg_().sqrt_()
    torch.sqrt(rows.moments["exp_avg_sq"][:, columns], out=update_CN)
    torch.div(rows.moments["exp_avg"][:, columns], update_CN.add_(EPS * root_C1), out=update_CN)
    return root_C1 / correction1_C1
