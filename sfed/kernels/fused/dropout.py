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


def dropout(mask: DropoutMask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Drop the same numbers of tensors; see ``interface.Dropout``."""
    inputs = [x.contiguous() for x in tensors]
    outputs = [torch.empty_like(x) for x in inputs]
    count, width = len(mask.keys), inputs[0].shape[-1]
    if not count:
        return tuple(outputs)
    grid = (count, triton.cdiv(width, _BLOCK))
    constants = {"WEYL": plain.WEYL, "FIRST": plain.FIRST, "SECOND": plain.SECOND}
    of_mask = {"word": mask.word, "threshold": mask.threshold, "scale": mask.scale}
    memory = (inputs[0], outputs[0], inputs[-1], outputs[-1], mask.keys.contiguous())
    is_pair = len(inputs) == 2
    dropout_kernel[grid](*memory, width, **of_mask, **constants, PAIR=is_pair, BLOCK=_BLOCK)
    return tuple(outputs)


@triton.jit(do_not_specialize=["word", "threshold"])
def dropout_kernel(
    x,
    output,
    other,
    other_output,
    keys,
    width,
    word,
    threshold,
    scale,
    WEYL: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the numbers of a block, times 0 or 1, times the scale; of two tensors if PAIR."""
    vector = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    key = tl.load(keys + vector) ^ word
    z = place * WEYL + key.to(tl.int32)
    z = (z ^ ((z >> 16) & 0xFFFF)) * FIRST
    z = z ^ (key >> 32).to(tl.int32)
    z = (z ^ ((z >> 13) & 0x7FFFF)) * SECOND
    kept, here = tl.where(z < threshold, 0.0, scale), vector * width + place
    numbers = tl.load(x + here, mask=inside, other=0.0).to(tl.float32) * kept
    tl.store(output + here, numbers.to(output.dtype.element_ty), mask=inside)
    if PAIR:
        numbers = tl.load(other + here, mask=inside, other=0.0).to(tl.float32) * kept
        tl.store(other_output + here, numbers.to(output.dtype.element_ty), mask=inside)
