"""What there is of each kind of arithmetic, whoever computes it; C: the clients of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class AdamwRows(NamedTuple):
    """The rows of the clients: (C, parameters) fp32 each, the parameters next to each other."""

    values: torch.Tensor
    grads: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    def at(self, columns: slice) -> AdamwRows:
        """The same columns of all four, as views."""
        return AdamwRows(*(rows[:, columns] for rows in self))


class FactorStep(NamedTuple):
    """How one factor steps: its columns, and for each client rate and number of the step."""

    columns: slice
    rates: torch.Tensor
    """(C,) fp32 learning rates; 0 of who does not step."""
    steps: torch.Tensor
    """(C,) fp32, whole numbers: steps that the factor has made, with this one."""


@dataclass(frozen=True)
class ClientStep:
    """What holds for all factors of a client."""

    active: torch.Tensor
    """(C,) bool: who steps. The gradients of the others may hold anything."""
    clip: torch.Tensor | None
    """(C,) fp32 factors of the gradients; None = 1."""
    weight_decay: float
    """Decoupled: times the learning rate."""


Adamw = Callable[[AdamwRows, Sequence[FactorStep], ClientStep], None]
"""A step of AdamW in place, of all clients. Uses the gradients up; waits for no device."""

Rotary = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""rotary(x, cos, sin, back): heads rotated by their positions, or back. Allocates its result.

x is (rows, T, heads, D); cos and sin are (rows or 1, T, 1, D).
"""

Quantised = tuple[torch.Tensor, torch.Tensor]
"""(M, width) float8_e4m3fn codes and (M, 1) fp32 scales, above 0."""

Quantise = Callable[[torch.Tensor], Quantised]
"""Round each row of (M, width), bf16 or fp32, to FP8 with a scale of its own; width is not 0.

A row with a number that is infinite or none (NaN) is NaN as code times scale: all of it, or where
it is not 0. Waits for no device.
"""


class DropoutMask(NamedTuple):
    """Which numbers of V vectors are dropped: a function of these values and nothing else."""

    keys: torch.Tensor
    """(V,) int64, of each vector: all bits as if by chance, as ``utils.rng.mix`` makes them."""
    probability: float
    """At least 0, less than 1."""
    word: int = 0
    """A signed word of 64 bits that all keys are combined with, by exclusive or."""

    @property
    def threshold(self) -> int:
        """Of signed words of 32 bits, so many are dropped: those below."""
        return min(round(self.probability * 2**32) - 2**31, 2**31 - 1)

    @property
    def scale(self) -> float:
        """What is kept is multiplied by it."""
        return 1.0 / (1.0 - self.probability)


class Dropout(Protocol):
    """Drops the same numbers of tensors, and scales the others."""

    def __call__(self, mask: DropoutMask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors with numbers dropped: each times 0 or 1, times the scale.

        The mask is made once for all. Allocates its results; waits for no device.

        Args:
            mask: of V vectors.
            tensors: one or two of V vectors, in any shapes, of one width and dtype.
        """


class Swiglu(Protocol):
    """silu(gate) * up of one call, recomputed in its backward pass, and its gradients."""

    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, in the dtype and shape of both."""

    def recompute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the same bits; the gradients may be asked for next."""

    def gradients(
        self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of gate and of up, where ``grad`` is that of the product."""
