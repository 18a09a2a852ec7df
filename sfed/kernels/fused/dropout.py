"""Dropout whose masks are a function of keys, in one launch: the mask is never in memory.

A program has a block of one vector. The arithmetic is that of ``plain.dropout``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sfed.kernels.interface import DropoutMask
from sfed.kernels.plain import dropout as plain

_BLOCK = 1024
"""Numbers of one program."""


def dropout(x: torch.Tensor, mask: DropoutMask) -> torch.Tensor:
    """Drop numbers of vectors; see ``interface.Dropout``."""
    x = x.contiguous()
    output, count, width = torch.empty_like(x), len(mask.keys), x.shape[-1]
    if not count:
        return output
    grid = (count, triton.cdiv(width, _BLOCK))
    constants = {"WEYL": plain.WEYL, "FIRST": plain.FIRST, "SECOND": plain.SECOND}
    of_mask = {"word": mask.word, "threshold": mask.threshold, "scale": mask.scale}
    keys_V = mask.keys.contiguous()
    dropout_kernel[grid](x, output, keys_V, width, **of_mask, **constants, BLOCK=_BLOCK)
    return output


@triton.jit(do_not_specialize=["word", "threshold"])
def dropout_kernel(
    x,
    output,
    keys,
    width,
    word,
    threshold,
    scale,
    WEYL: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the numbers of a block that are kept, scaled, and 0 for the others."""
    vector = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    key = tl.load(keys + vector) ^ word
    z = place * WEYL + key.to(tl.int32)
    z = (z ^ ((z >> 16) & 0xFFFF)) * FIRST
    z = z ^ (key >> 32).to(tl.int32)
    z = (z ^ ((z >> 13) & 0x7FFFF)) * SECOND
    numbers = tl.load(x + vector * width + place, mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(z < threshold, 0.0, numbers * scale)
    tl.store(output + vector * width + place, kept.to(output.dtype.element_ty), mask=inside)
