"""silu(gate) * up in one launch, forward and recomputed, and both of its gradients in another.

Three of these tensors are read or written by a product, five by the gradients. Computed in fp32;
silu(gate) is rounded to the dtype of the tensors, as the plain operations round it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
"""Numbers of one program."""


class FusedSwiglu:
    """See ``interface.Swiglu``. Nothing is kept between calls."""

    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        gate, up = gate.contiguous(), up.contiguous()
        output, count = torch.empty_like(gate), gate.numel()
        product_kernel[(triton.cdiv(count, _BLOCK),)](gate, up, output, count, BLOCK=_BLOCK)
        return output

    recompute = product

    def gradients(
        self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of gate and of up."""
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        grad_gate, grad_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        gradients_kernel[(triton.cdiv(count, _BLOCK),)](
            grad, gate, up, grad_gate, grad_up, count, BLOCK=_BLOCK
        )
        return grad_gate, grad_up


@triton.jit
def product_kernel(gate, up, output, count, BLOCK: tl.constexpr):
    """Write silu(gate) * up of ``count`` numbers to the output."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    dtype: tl.constexpr = output.dtype.element_ty
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(dtype).to(tl.float32)
    tl.store(output + place, (silu * u).to(dtype), mask=inside)


@triton.jit
def gradients_kernel(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    """The gradients of gate and up; silu'(g) = s + g s (1 - s) with s = sigmoid(g)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    dtype: tl.constexpr = grad_up.dtype.element_ty
    d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = (g * s).to(dtype).to(tl.float32)
    tl.store(grad_up + place, (silu * d).to(dtype), mask=inside)
    grad_silu = (d * u).to(dtype).to(tl.float32)
    tl.store(grad_gate + place, (grad_silu * s * (1.0 + g * (1.0 - s))).to(dtype), mask=inside)
