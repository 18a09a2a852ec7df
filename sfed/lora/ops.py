"""Steps between the matrix products: few operations, and little saved for the backward pass.

A trained layer needs its input x once more, for the gradient of A. Where x is cheap to make again
from tensors that are kept anyway, they are kept in its place: the output of a SwiGLU from its gate
and up, the output of an RMSNorm from the residual stream. On LLaMA-2-7B's dimensions that is about
half of what a layer saves. The results are those of the plain modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function
from torch.nn import functional

from sfed.kernels.choice import PLAIN, Kernels
from sfed.kernels.interface import Rotary, Swiglu

_RECIPE = "_sfed_recipe"


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again, bit by bit."""

    make: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    """Tensors that the backward pass keeps anyway."""


def recipe_of(x: torch.Tensor) -> Recipe | None:
    """How to make this tensor again; None where nobody said."""
    recipe: Recipe | None = getattr(x, _RECIPE, None)
    return recipe


# --- weight * x / rms(x) -------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension, with a recipe.

    Args:
        x: (..., D).
        weight: (D,).
        eps: one fp32 number, on the host.
    """
    if x.device.type != "cpu":  # one kernel there and one back; saves x and 1 / rms(x)
        normed = _norm_by_kernel(x, weight, eps)
        setattr(normed, _RECIPE, Recipe(_norm_by_kernel, (x, weight, eps)))
        return normed
    norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    output: torch.Tensor = _RmsNorm.apply(x, scale, weight)  # type: ignore[no-untyped-call]
    setattr(output, _RECIPE, Recipe(_scaled, (x, scale, weight)))
    return output


def _norm_by_kernel(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps.item())


def _scaled(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x * weight).mul_(scale)


class _RmsNorm(Function):
    """weight * x * scale, scale = mean_square^(-1/2); saves x as it is and not in fp32.

    With u = scale * x and g = weight * grad:  grad_x = scale * (g - u * mean(g * u)).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, weight)
        return _scaled(x, scale, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (x, scale, weight) = grads, ctx.saved_tensors
        g, u = grad * weight, x * scale
        dot = (g * u).sum(-1, keepdim=True)
        return g.addcmul_(u, dot, value=-1.0 / x.shape[-1]).mul_(scale), None, None


# --- silu(gate) * up -----------------------------------------------------------------------------


def swiglu(gate: torch.Tensor, up: torch.Tensor, kernels: Kernels = PLAIN) -> torch.Tensor:
    """Return silu(gate) * up, with a recipe."""
    arithmetic = kernels.swiglu()
    product: torch.Tensor = _Swiglu.apply(gate, up, arithmetic)  # type: ignore[no-untyped-call]
    setattr(product, _RECIPE, Recipe(arithmetic.recompute, (gate, up)))
    return product


class _Swiglu(Function):
    """silu(gate) * up; saves the two and neither silu(gate) nor the product."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, arithmetic: Swiglu) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.arithmetic = arithmetic
        return arithmetic.product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.arithmetic.gradients(grads[0], *ctx.saved_tensors), None


# --- rotary position embedding -------------------------------------------------------------------


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kernels: Kernels = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions (arXiv 2104.09864), halves apart as in LLaMA.

    Of a head's two halves:  (q1, q2) -> (q1 cos - q2 sin, q2 cos + q1 sin).

    Args:
        q: (rows, T, heads, D).
        k: (rows, T, heads of keys, D).
        cos: (rows or 1, T, D).
        sin: likewise.
        kernels: that rotate them.
    """
    angles = (cos.unsqueeze(2), sin.unsqueeze(2), kernels.rotary)
    return (
        _Rotary.apply(q, *angles),  # type: ignore[no-untyped-call]
        _Rotary.apply(k, *angles),  # type: ignore[no-untyped-call]
    )


class _Rotary(Function):
    """Saves the angles alone; the gradient is turned back by them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary: Rotary
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotary = rotary
        return rotary(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.rotary(grads[0], *ctx.saved_tensors, True), None, None, None
