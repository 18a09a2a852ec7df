"""Optimizers of the server: what becomes of an averaged factor (arXiv 2003.00295).

    D = sum_i p_i w_i - w                the mean of the clients' changes; w: before the round
    FedAvgM     m = b1 m + D             w += lr m
    the others  m = b1 m + (1 - b1) D    w += lr m / (sqrt(v) + tau)
    FedAdagrad  v = v + D^2
    FedYogi     v = v - (1 - b2) D^2 sign(v - D^2)
    FedAdam     v = b2 v + (1 - b2) D^2

At the start m = 0 and v = tau^2; there is no bias correction. Every process computes it from the
same mean, so it sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sfed.config.sections.federated import SERVER_KEYS, FederatedSection

_SecondMoment = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
_SECOND_MOMENTS: dict[str, _SecondMoment] = {
    "fedadagrad": lambda v, square, _: v + square,
    "fedyogi": lambda v, square, beta2: v - (1 - beta2) * square * torch.sign(v - square),
    "fedadam": lambda v, square, beta2: beta2 * v + (1 - beta2) * square,
}
"""v of the next round from v, D^2 and b2."""


@dataclass(frozen=True)
class ServerOptimizer:
    """One of them with its constants."""

    kind: str
    lr: float
    beta1: float
    beta2: float
    tau: float

    @staticmethod
    def of(section: FederatedSection) -> ServerOptimizer | None:
        """The configured one; None where the mean itself is taken."""
        kind, lr = section.server_optimizer, section.server_lr
        if kind == "none":
            return None
        if lr is None:
            lr = 1.0 if kind == "fedavgm" else 1e-3
        return ServerOptimizer(
            kind, lr, section.server_beta1, section.server_beta2, section.server_tau
        )

    @property
    def line(self) -> str:
        """It and the constants that it reads, for persons."""
        values = [
            f"{key} {getattr(self, key.removeprefix('server_')):g}"
            for key in SERVER_KEYS[self.kind]
        ]
        return f"server: {self.kind} on the mean ({', '.join(values)})"

    def initial(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """What m or v is before the first step, in the shape of another tensor."""
        return torch.full_like(like, self.tau**2 if name == "v" else 0.0)

    def step(
        self, before: torch.Tensor, mean: torch.Tensor, state: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Step from the values before the round along the mean of the clients' changes.

        Args:
            before: w, of any shape.
            mean: sum_i p_i w_i of the clients of the round, of the same shape.
            state: m and, but for FedAvgM, v, as this returned them in the round before; at first
                nothing.

        Returns:
            w after the round, and the state; new tensors.
        """
        change = mean - before
        m = self.beta1 * state.get("m", self.initial("m", change))
        if self.kind == "fedavgm":
            m = m + change
            return before + self.lr * m, {"m": m}
        m = m + (1 - self.beta1) * change
        v = state.get("v", self.initial("v", change))
        v = _SECOND_MOMENTS[self.kind](v, change.square(), self.beta2)
        return before + self.lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}
