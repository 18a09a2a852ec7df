"""silu(gate) * up in operations of torch."""

from __future__ import annotations

import torch
from torch.nn import functional


class PlainSwiglu:
    """See ``interface.Swiglu``. Hands silu(gate) from ``recompute`` to the gradients."""

    def __init__(self) -> None:
        self._silu: torch.Tensor | None = None

    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        return functional.silu(gate).mul_(up)

    def recompute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the same bits."""
        self._silu = functional.silu(gate)
        return self._silu * up

    def gradients(
        self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of gate and of up."""
        silu, self._silu = self._silu, None
        grad_up = (functional.silu(gate) if silu is None else silu).mul_(grad)
        grad_silu = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_silu)
        return grad_silu, grad_up
