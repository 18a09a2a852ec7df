"""What a local term is: a function of what clients hold of one layer, to the term's gradient.

A method may name one. Needs no torch when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LocalLayer:
    """What n clients that share a pass hold of one adapted layer before a step, fp32."""

    layer: str
    """Full name of the layer in the model."""
    factors: Mapping[str, torch.Tensor]
    """"A" (n, r, in) and "B" (n, out, r), also a factor that does not train. Not to be changed."""
    received: Mapping[str, torch.Tensor]
    """"A" (r, in), "B" (out, r) at the start of the round: those that train and were the same on
    all clients."""
    gamma: float
    """The factor of B A x."""


LocalTerm = Callable[[LocalLayer], "Mapping[str, torch.Tensor]"]
"""Gradient of a further term of each client's loss: of some or all factors that train, in their
shapes. It depends on its argument alone, and the gradient of a client on that client alone."""
