"""Frozen linear layers that keep their weight alone for the backward pass.

torch's own function keeps a view of the weight's memory, which ZeRO-3 could then not release, and
DeepSpeed's keeps the weight and the input. The gradient of a frozen layer's input needs the weight
only. Kept as the parameter itself, it is wherever ZeRO-3 has gathered it by then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional


def keep_weights_alone(model: nn.Module) -> None:
    """Let every frozen layer that is torch's linear one keep nothing but its weight, in place."""
    for module in model.modules():
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            continue
        if not any(weight.requires_grad for weight in module.parameters()):
            vars(module)["forward"] = _FrozenForward(module)


class _FrozenForward:
    """W x + b."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _FrozenLinear.apply(  # type: ignore[no-untyped-call]
            x, self._module.weight, self._module.bias
        )
        return output


class _FrozenLinear(Function):
    """Saves W; grad x = grad W."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (weight,) = grads, ctx.saved_tensors
        return grad.matmul(weight) if ctx.needs_input_grad[0] else None, None, None
