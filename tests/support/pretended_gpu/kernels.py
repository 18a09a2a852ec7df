"""Kernels that a GPU has and a CPU has not: there it takes several operations."""

from __future__ import annotations

from typing import Any

import torch

DTYPES_OF_FLASH = [torch.bfloat16, torch.float16]
"""What flash attention computes."""
_library = torch.library.Library("pretended_gpu", "DEF")
_library.define("fused_rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_library.define(
    "fused_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> Tensor"
)


def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.float()).to(x.dtype), scale


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    g, u = grad.float() * weight.float(), x.float() * scale
    return ((g - u * (g * u).mean(-1, keepdim=True)) * scale).to(x.dtype)


_library.define(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor starts, int back, int ahead, float scale)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse,"
    " Tensor starts, int back, int ahead, float scale) -> (Tensor, Tensor, Tensor)"
)


def _scores(
    q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor, back: int, ahead: int, scale: float
) -> torch.Tensor:
    """(heads, tokens, tokens) fp32, -inf where a token does not see another."""
    place = torch.arange(len(q))
    document = torch.bucketize(place, starts[1:], right=True)
    behind = place[:, None] - place
    seen = document[:, None] == document
    seen &= (behind <= back) if back >= 0 else torch.ones_like(seen)
    seen &= (-behind <= ahead) if ahead >= 0 else torch.ones_like(seen)
    shared = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("ihd,jhd->hij", q.float(), shared) * scale
    return scores.masked_fill(~seen, -torch.inf)


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    back: int,
    ahead: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(q, k, starts, back, ahead, scale)
    shared = v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    output = torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), shared)
    return output.to(q.dtype).contiguous(), scores.logsumexp(dim=-1)


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    starts: torch.Tensor,
    back: int,
    ahead: int,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    group, wide = q.shape[1] // k.shape[1], grad.float()
    keys, values = (one.float().repeat_interleave(group, dim=1) for one in (k, v))
    shares = (_scores(q, k, starts, back, ahead, scale) - lse[..., None]).exp()
    of_shares = torch.einsum("ihd,jhd->hij", wide, values)
    of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * scale
    grads = [
        torch.einsum("hij,jhd->ihd", of_scores, keys),
        torch.einsum("hij,ihd->jhd", of_scores, q.float()).unflatten(1, (-1, group)).sum(2),
        torch.einsum("hij,ihd->jhd", shares, wide).unflatten(1, (-1, group)).sum(2),
    ]
    return tuple(one.to(q.dtype).contiguous() for one in grads)


_library.impl("flash_attention", _flash, "CompositeExplicitAutograd")
_library.impl("flash_attention_backward", _flash_backward, "CompositeExplicitAutograd")


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        output, lse = torch.ops.pretended_gpu.flash_attention(*inputs)
        *tensors, back, ahead, scale = inputs
        ctx.save_for_backward(*tensors, lse)
        ctx.settings = back, ahead, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, starts, lse = ctx.saved_tensors
        kernel = torch.ops.pretended_gpu.flash_attention_backward
        return (*kernel(grads[0], q, k, v, lse, starts, *ctx.settings), *[None] * 4)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` is documented to compute, and to refuse."""
    assert all(one is None for one in (return_aux, seqused_k, block_table, num_splits))
    assert query.dtype in DTYPES_OF_FLASH
    assert query.dim() == 3 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    assert type(max_q) is int and max_q == max_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: torch.Tensor = _Varlen.apply(query, key, value, cu_seq_q, *window_size, scale)
    return output


_library.impl("fused_rms_norm", _forward, "CompositeExplicitAutograd")
_library.impl("fused_rms_norm_backward", _backward, "CompositeExplicitAutograd")


class RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if weight.requires_grad:
            raise NotImplementedError("the gradient of an RMSNorm's weight")
        output, scale = torch.ops.pretended_gpu.fused_rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, scale = ctx.saved_tensors
        made = torch.ops.pretended_gpu.fused_rms_norm_backward(grads[0], x, weight, scale)
        return made, None, None
