"""Steps between the matrix products that save little for the backward pass.

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
from torch import nn
from torch.autograd import Function
from torch.nn import functional

# Modules of transformers that compute exactly what stands below; others stay as they are.
_SWIGLUS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
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


def make_lean(model: nn.Module) -> None:
    """Give the model's SwiGLUs and RMSNorms their lean forms, in place; weights stay theirs."""
    for module in model.modules():
        if type(module).__name__ in _SWIGLUS and _is_silu(module.act_fn):
            module.forward = _SwigluForward(module)
        elif type(module).__name__ in _RMS_NORMS:
            module.forward = _NormForward(module)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


class _SwigluForward:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self._module
        gate, up = module.gate_proj(x), module.up_proj(x)
        product: torch.Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
        setattr(product, _RECIPE, Recipe(_swiglu, (gate, up)))
        output: torch.Tensor = module.down_proj(product)
        return output


class _NormForward:
    """weight * x / rms(x)."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, eps = self._module.weight, self._module.variance_epsilon
        scale = torch.rsqrt(x.detach().float().pow(2).mean(-1, keepdim=True) + eps)
        output: torch.Tensor = _RmsNorm.apply(x, scale, weight)  # type: ignore[no-untyped-call]
        setattr(output, _RECIPE, Recipe(_rms_norm, (x, scale, weight)))
        return output


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


def _rms_norm(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x.float() * scale).to(x.dtype)


class _Swiglu(Function):
    """silu(gate) * up; saves the two and neither silu(gate) nor the product."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (grad,), (gate, up) = grads, ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad * functional.silu(gate)


class _RmsNorm(Function):
    """weight * x * scale; saves x as it is and not in fp32.

    With u = x * scale and g = weight * grad:  grad_x = scale * (g - u * mean(g * u)).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, weight)
        return _rms_norm(x, scale, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,), (x, scale, weight) = grads, ctx.saved_tensors
        g, u = (grad * weight).float(), x.float() * scale
        return (scale * (g - u * (g * u).mean(-1, keepdim=True))).to(x.dtype), None, None


def add_lora(
    y_CMO: torch.Tensor,
    x: torch.Tensor,
    a_CRI: torch.Tensor,
    b_COR: torch.Tensor,
    lora_scaling: float,
    recipe: Recipe | None,
) -> torch.Tensor:
    """Return y + gamma * B_c A_c x for the rows of client c, in one kernel.

    Shape suffixes as in ``layers``: C clients, M rows of one client, R LoRA rank, I in, O out.

    Args:
        y_CMO: the frozen layer's output.
        x: its input, in any shape of C * M rows.
        a_CRI: A in the dtype of x.
        b_COR: B likewise.
        lora_scaling: gamma.
        recipe: how to make x again; None = x is saved.
    """
    output: torch.Tensor = _AddLora.apply(  # type: ignore[no-untyped-call]
        y_CMO, x, a_CRI, b_COR, lora_scaling, recipe
    )
    return output


class _AddLora(Function):
    """Saves A x, and x or what it is made of."""

    @staticmethod
    def forward(
        ctx: Any,
        y_CMO: torch.Tensor,
        x: torch.Tensor,
        a_CRI: torch.Tensor,
        b_COR: torch.Tensor,
        lora_scaling: float,
        recipe: Recipe | None,
    ) -> torch.Tensor:
        x_CMI = x.reshape(len(a_CRI), -1, a_CRI.shape[2])
        xa_CMR = torch.bmm(x_CMI, a_CRI.transpose(1, 2))
        ctx.make = None if recipe is None else recipe.make
        ctx.lora_scaling = lora_scaling
        _, _, a_trains, b_trains, *_ = ctx.needs_input_grad
        kept = (x,) if recipe is None else recipe.inputs
        # A's gradient needs x again, B's needs A x.
        ctx.save_for_backward(
            a_CRI, b_COR, xa_CMR if b_trains else None, *(kept if a_trains else ())
        )
        return torch.baddbmm(y_CMO, xa_CMR, b_COR.transpose(1, 2), alpha=lora_scaling)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of y, x, A and B; gamma stands on the side that is r wide."""
        (grad_CMO,), (a_CRI, b_COR, xa_CMR, *kept) = grads, ctx.saved_tensors
        _, wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
        grad_xa_CMR = torch.bmm(grad_CMO, b_COR).mul_(ctx.lora_scaling)
        grad_x = grad_a_CRI = grad_b_COR = None
        if wants_a:
            x = kept[0] if ctx.make is None else ctx.make(*kept)
            x_CMI = x.reshape(len(a_CRI), -1, a_CRI.shape[2])
            grad_a_CRI = torch.bmm(grad_xa_CMR.transpose(1, 2), x_CMI)
        if wants_b:
            grad_b_COR = torch.bmm(grad_CMO.transpose(1, 2), xa_CMR).mul_(ctx.lora_scaling)
        if wants_x:
            grad_x = torch.bmm(grad_xa_CMR, a_CRI)
        return grad_CMO, grad_x, grad_a_CRI, grad_b_COR, None, None
