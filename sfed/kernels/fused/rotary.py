"""Rotary position embedding in one launch: heads are read once and written once.

Any strides of rows, tokens and heads are read, such as those of attention's gradients, and the
result is contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HEADS = 8
"""Heads of one program, which share its angles."""


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """Rotate heads by their positions, or back; see ``interface.Rotary``."""
    rows, tokens, heads, width = x.shape
    x, cos, sin = (one if one.stride(-1) == 1 else one.contiguous() for one in (x, cos, sin))
    output = x.new_empty(x.shape)
    rotary_kernel[(rows * tokens, triton.cdiv(heads, _HEADS))](
        x,
        cos,
        sin,
        output,
        tokens,
        heads,
        width // 2,
        *x.stride()[:3],
        *(_row_and_token(cos)),
        *(_row_and_token(sin)),
        BACK=back,
        HEADS=_HEADS,
        BLOCK=triton.next_power_of_2(width // 2),
    )
    return output


def _row_and_token(angles: torch.Tensor) -> tuple[int, int]:
    """The strides of rows and tokens; all rows have the same angles where these have one row."""
    return 0 if len(angles) == 1 else angles.stride(0), angles.stride(1)


@triton.jit
def rotary_kernel(
    x,
    cos,
    sin,
    output,
    tokens,
    heads,
    half,
    x_row,
    x_token,
    x_head,
    cos_row,
    cos_token,
    sin_row,
    sin_token,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some heads of one token: (x1, x2) -> (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), or back."""
    place = tl.program_id(0).to(tl.int64)
    row, token = place // tokens, place % tokens
    at = tl.arange(0, BLOCK)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    within = at < half
    inside = (head < heads)[:, None] & within[None, :]
    cos += row * cos_row + token * cos_token + at
    sin += row * sin_row + token * sin_token + at
    cos1 = tl.load(cos, mask=within, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + half, mask=within, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin, mask=within, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + half, mask=within, other=0.0).to(tl.float32)[None, :]
    x += row * x_row + token * x_token + head[:, None] * x_head + at[None, :]
    x1 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    output += (place * heads + head[:, None]) * (2 * half) + at[None, :]
    tl.store(output, y1.to(output.dtype.element_ty), mask=inside)
    tl.store(output + half, y2.to(output.dtype.element_ty), mask=inside)
