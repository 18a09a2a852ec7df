"""Frozen linear layers that keep their weight alone for the backward pass.

torch's own function keeps a view of the weight's memory, which ZeRO-3 could then not release, and
DeepSpeed's keeps the weight and the input. The gradient of a frozen layer's input needs the weight
only. Kept as the parameter itself, it is wherever ZeRO-3 has gathered it by then.
"""

from __future__ import annotations

from collections.abc import Callable
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
        return product(x, self._module.weight, self._module.bias)


def product(
    x: torch.Tensor,
    stored: torch.Tensor,
    bias: torch.Tensor | None,
    read: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return W x + b of frozen W and b; the backward pass keeps what is stored and nothing else.

    Args:
        x: (..., in).
        stored: W, (out, in), or what it is made of.
        bias: (out,).
        read: makes W of what is stored, in each pass; None = it is W.
    """
    output: torch.Tensor = _FrozenLinear.apply(x, stored, bias, read)  # type: ignore[no-untyped-call]
    return output


class _FrozenLinear(Function):
    """Saves what W is made of; grad x = grad W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stored: torch.Tensor,
        bias: torch.Tensor | None,
        read: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(stored)
        ctx.read = read
        return functional.linear(x, stored if read is None else read(stored), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (weight,) = grads, ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight = weight if ctx.read is None else ctx.read(weight)
        return grad.matmul(weight), None, None, None
