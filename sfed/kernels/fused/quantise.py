"""Rows rounded to FP8 (e4m3) with a scale each, in one launch: a program for each row.

The row is read twice, the second time from the cache, and its codes are written once. The rounding
is done on the bits of fp32 numbers, so that all devices and the interpreter give the same codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sfed.kernels.interface import Quantised
from sfed.kernels.plain.quantise import CODES, LARGEST, SMALLEST_SCALE

_BLOCK = 2048
"""Numbers that a program has in registers at once."""


def quantise(rows: torch.Tensor) -> Quantised:
    """Round each row; see ``interface.Quantise``."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    count, width = rows.shape
    codes = torch.empty(count, width, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    if count:
        block = min(_BLOCK, triton.next_power_of_2(width))
        limits = {"LARGEST": LARGEST, "SMALLEST": SMALLEST_SCALE}
        quantise_kernel[(count,)](rows, codes, scales, rows.stride(0), width, **limits, BLOCK=block)
    return codes.view(CODES), scales


@triton.jit
def quantise_kernel(
    rows,
    codes,
    scales,
    row_stride,
    width,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the codes of one row and its scale, which is NaN where a number is not finite."""
    row = tl.program_id(0).to(tl.int64)
    rows += row * row_stride
    codes += row * width
    largest = tl.zeros([BLOCK], tl.float32)
    nothing = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(rows + place, mask=place < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        nothing += x * 0.0  # NaN of what is not finite, which a maximum does not show
    scale = tl.maximum(tl.math.div_rn(tl.max(largest, 0), LARGEST), SMALLEST) + tl.sum(nothing, 0)
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(rows + place, mask=place < width, other=0.0).to(tl.float32)
        tl.store(codes + place, _code(tl.math.div_rn(x, scale)), mask=place < width)


@triton.jit
def _code(value):
    """The code of the nearest number of e4m3, of two equally near ones the even; |value| <= 448."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 3 of 23 bits of the mantissa are kept; the exponent counts from -7 and not from -127.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are 2^-9 apart, as fp32 numbers from 2^14 on are: the addition rounds.
    subnormal = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
