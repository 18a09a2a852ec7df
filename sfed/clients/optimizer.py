"""One optimizer step for all clients of a pass, each as if it were alone.

Learning rate, clipping, weight decay and bias correction are per client; a client that does not
step keeps every bit of its row and of its moments. What is done to the numbers then is in
``kernels.plain.adamw``. Shape suffixes: C clients, N parameters of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sfed.clients.state import FACTORS, MOMENTS, PassState
from sfed.config.sections.train import TrainSection
from sfed.kernels.choice import PLAIN, Kernels
from sfed.kernels.interface import AdamwRows, ClientStep, FactorStep
from sfed.kernels.plain.adamw import sgd
from sfed.lora.layout import Layout


@dataclass(frozen=True)
class StackedOptimizer:
    """AdamW or SGD for the clients of a pass at once, in place; it holds no state of its own."""

    section: TrainSection
    layout: Layout
    """Layout of a client's row."""
    trained: tuple[str, ...]
    """Factors that move."""
    kernels: Kernels = PLAIN

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
        section, clip_C = self.section, None
        if section.max_grad_norm is not None:
            clip_C = (section.max_grad_norm / (norms_C + 1e-6)).clamp(max=1.0)
        step = ClientStep(active_C, clip_C, section.weight_decay)
        rates_C = lr_C * active_C
        factors = [self._step_of(rows, factor, rates_C, active_C) for factor in self.trained]
        if section.optimizer == "adamw":
            moments = (rows.moments[name] for name in MOMENTS)
            self.kernels.adamw(AdamwRows(rows.values, rows.grads, *moments), factors, step)
        else:
            sgd(rows.values, rows.grads, factors, step)

    def _step_of(
        self, rows: PassState, factor: str, rates_C: torch.Tensor, active_C: torch.Tensor
    ) -> FactorStep:
        """Count a factor's step; returns where the factor is, and its rates."""
        steps_C = rows.optimizer_steps[:, FACTORS.index(factor)]
        steps_C.add_(active_C)
        if factor == "B":
            rates_C = rates_C * self.section.loraplus_ratio
        return FactorStep(self.layout.columns(factor), rates_C, steps_C)
