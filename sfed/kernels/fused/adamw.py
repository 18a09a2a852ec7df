"""AdamW over the rows of all clients, one launch for each factor.

Reads values, gradient and moments once and writes values and moments once: 28 bytes a number.
Nothing of a client that does not step is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sfed.kernels.interface import AdamwRows, ClientStep, FactorStep
from sfed.kernels.plain.adamw import BETA1, BETA2, EPS

_BLOCK = 1024
"""Numbers of one program."""


def adamw(rows: AdamwRows, factors: Sequence[FactorStep], step: ClientStep) -> None:
    """Make a step of AdamW; see ``interface.Adamw``."""
    for columns, rates_C, steps_C in factors:
        own = rows.at(columns)
        clients, width = own.values.shape
        blocks = triton.cdiv(width, _BLOCK)
        adamw_kernel[(clients * blocks,)](
            *own,
            *(part.stride(0) for part in own),
            width,
            blocks,
            step.active,
            rates_C,
            steps_C,
            steps_C.stride(0),
            step.clip if step.clip is not None else rates_C,
            step.weight_decay,
            HAS_CLIP=step.clip is not None,
            BETA1=BETA1,
            BETA2=BETA2,
            LOG_BETA1=math.log(BETA1),
            LOG_BETA2=math.log(BETA2),
            EPS=EPS,
            BLOCK=_BLOCK,
        )
    # Torch does not see what a kernel writes; lora.factors tells by it that a copy is too old.
    torch.autograd.graph.increment_version((rows.values, rows.exp_avg, rows.exp_avg_sq))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) of x <= 0, without the cancellation: by the series where x is small."""
    series = 1.0 + x / 8.0
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def adamw_kernel(
    values,
    grads,
    exp_avg,
    exp_avg_sq,
    values_row,
    grads_row,
    exp_avg_row,
    exp_avg_sq_row,
    width,
    blocks,
    active_C,
    rates_C,
    steps_C,
    steps_stride,
    clip_C,
    weight_decay,
    HAS_CLIP: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some numbers of one client: program = client * blocks + block; *_row are strides of rows."""
    client = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = (column < width) & (tl.load(active_C + client) != 0)
    values += client * values_row + column
    grads += client * grads_row + column
    exp_avg += client * exp_avg_row + column
    exp_avg_sq += client * exp_avg_sq_row + column
    gradient = tl.load(grads, mask=own, other=0.0)
    if HAS_CLIP:
        gradient *= tl.load(clip_C + client)
    mean = tl.load(exp_avg, mask=own, other=0.0)
    mean += (gradient - mean) * (1.0 - BETA1)
    square = tl.load(exp_avg_sq, mask=own, other=0.0) * BETA2 + gradient * gradient * (1.0 - BETA2)
    # As of plain.adamw: c = sqrt(1 - beta2^t), and the step is mean / (sqrt(square) + eps * c).
    steps = tl.maximum(tl.load(steps_C + client * steps_stride), 1.0)
    root = tl.sqrt(one_minus_exp(steps * LOG_BETA2))
    rate = tl.load(rates_C + client)
    update = mean / (tl.sqrt(square) + EPS * root) * (root / one_minus_exp(steps * LOG_BETA1))
    value = tl.load(values, mask=own, other=0.0) * (1.0 - rate * weight_decay) - rate * update
    tl.store(exp_avg, mean, mask=own)
    tl.store(exp_avg_sq, square, mask=own)
    tl.store(values, value, mask=own)
