"""What a server step is: a pure function of what the clients of a round sent of one layer.

The weighted mean needs none of this: it is a sum, one ``all_reduce`` (``aggregation``). A step that
must see each client's own factors, such as a median, is a function ``SentLayer -> CommonLayer``;
``by_layer`` calls it, on one process for each layer. Needs no torch when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SentLayer:
    """What n clients sent of one adapted layer, fp32 on the device of the process that has it."""

    layer: str
    """Full name of the layer in the model."""
    clients: tuple[int, ...]
    """Numbers of the n clients, in ascending order."""
    factors: Mapping[str, torch.Tensor]
    """The sent factors: "A" (n, r, in), "B" (n, out, r), with r the largest LoRA rank of all N
    clients. A client of a smaller rank has zeros in its last rows of A and columns of B."""
    weights: torch.Tensor
    """(n,) fp64: p_i of the clients, above 0, with the sum 1."""
    gammas: torch.Tensor
    """(n,) fp64: the factor of B A x of each client."""
    ranks: tuple[int, ...]
    """(n,) LoRA rank of each client."""
    before: Mapping[str, torch.Tensor]
    """What was common of the sent factors before the round: "A" (r, in), "B" (out, r)."""
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What the step returned as its state of this layer in the round before; at first nothing."""
    seed: int = 0
    """For what the step draws at random: a function of the run's seed, the round and the layer."""
    common_gamma: float = 1.0
    """Gamma of the clients of the largest rank, whether they sent or not."""

    @property
    def gamma(self) -> float:
        """The factor of B A x, of a step that takes clients of one LoRA rank only.

        Raises:
            ValueError: where the clients have different factors.
        """
        if bool((self.gammas != self.gammas[0]).any()):
            raise ValueError("the clients have different gammas; use gammas")
        return float(self.gammas[0])


@dataclass(frozen=True)
class CommonLayer:
    """What all clients hold of the layer from now on."""

    factors: Mapping[str, torch.Tensor]
    """Each of the sent factors: "A" (r, in), "B" (out, r)."""
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of any shape that the step wants to see again in the next round."""
    base_change: tuple[torch.Tensor, torch.Tensor] | None = None
    """U (out, q) and V (q, in): the frozen weight of the layer becomes W + U V on all processes.
    Only of a method whose record says ``changes_base``."""


ClientMeasure = Callable[[Mapping[str, Mapping[str, "torch.Tensor"]]], float]
"""A number >= 0 of a client from its "A" (r, in) and "B" (out, r) of each layer."""

ServerStep = Callable[[SentLayer], CommonLayer]
"""Depends on its argument alone, and not on the order of the clients."""
