"""Compares an implementation with the plain one on small inputs, at the start of a run.

Sizes are odd and rows have strides, so that masks at the ends of blocks matter. Each function gives
the largest difference over its tolerance: right is at most 1, and NaN is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from sfed.kernels.interface import (
    Adamw,
    AdamwRows,
    ClientStep,
    Dropout,
    DropoutMask,
    FactorStep,
    Quantise,
    Rotary,
    Swiglu,
)
from sfed.kernels.plain import adamw as plain_adamw
from sfed.kernels.plain import dropout as plain_dropout
from sfed.kernels.plain import quantise as plain_quantise
from sfed.kernels.plain import rotary as plain_rotary
from sfed.kernels.plain.swiglu import PlainSwiglu

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5}
"""Of the largest number of a tensor: another order in fp32; four roundings to bf16 on both sides,
which are towards 0 in Triton's interpreter."""
_CLIENTS, _WIDTH, _PADDING = 3, 2053, 11


def excess(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The largest difference of tensors over its tolerance; NaN where a number is none.

    Args:
        pairs: of a tensor and what it should be.
    """
    ratios = [
        (found.float() - expected.float()).abs().max()
        / (TOLERANCES[expected.dtype] * expected.float().abs().max())
        for found, expected in pairs
    ]
    return float(torch.stack(ratios).max())


def adamw(kernel: Adamw, device: torch.device, dtype: torch.dtype) -> float:
    """Compare two steps of AdamW, the second of which one client does not make.

    Always in fp32, whatever the dtype. A bit of a client that does not step counts as infinity.
    """
    del dtype
    cut, rates_C = _WIDTH // 3, torch.tensor([1e-2, 3e-3, 1e-1])
    found, expected = (AdamwRows(*_rows(device)) for _ in range(2))
    for number in (1.0, 2.0):
        active_C = torch.tensor([True, number == 1.0, True])
        steps_CF = torch.full((_CLIENTS, 2), number, device=device)
        factors = [
            FactorStep(slice(0, cut), (rates_C * active_C).to(device), steps_CF[:, 0]),
            FactorStep(slice(cut, _WIDTH), (2.0 * rates_C * active_C).to(device), steps_CF[:, 1]),
        ]
        clip_C = torch.tensor([1.0, 0.5, 0.01], device=device)
        step = ClientStep(active_C.to(device), clip_C, 0.1)
        before = [rows[1].clone() for rows in found]
        kernel(found, factors, step)
        plain_adamw.adamw(expected, factors, step)
        gradients = torch.full_like(found.grads, -0.7)
        for rows in (found, expected):
            rows.grads.copy_(gradients)
    kept = [torch.equal(now[1], then) for now, then in zip(found, before, strict=True)]
    is_kept = kept[0] and kept[2] and kept[3]  # gradients may be used up
    return excess(zip(found, expected, strict=True)) if is_kept else float("inf")


def swiglu(made: Callable[[], Swiglu], device: torch.device, dtype: torch.dtype) -> float:
    """Compare the product, the product recomputed, and the gradients."""
    grad, gate, up = (_spread((5, 411), shift, device, dtype) for shift in (0.1, 0.5, 0.9))
    ours, plain = made(), PlainSwiglu()
    found, expected = (
        (one.product(gate, up), one.recompute(gate, up), *one.gradients(grad, gate, up))
        for one in (ours, plain)
    )
    return excess(zip(found, expected, strict=True))


def rotary(kernel: Rotary, device: torch.device, dtype: torch.dtype) -> float:
    """Compare both directions, on heads as attention's gradients have them."""
    x = _spread((2, 9, 5, 24), 0.3, device, dtype).transpose(1, 2)
    cos, sin = (_spread((1, 5, 1, 24), shift, device, dtype) for shift in (0.2, 0.7))
    directions = (False, True)
    return excess(
        (kernel(x, cos, sin, back), plain_rotary.rotary(x, cos, sin, back)) for back in directions
    )


def dropout(kernel: Dropout, device: torch.device, dtype: torch.dtype) -> float:
    """Compare what is dropped of vectors longer than a block; one number too many is infinite."""
    x, other = (_spread((2, 3, _WIDTH), shift, device, dtype).add_(4.0) for shift in (0.2, 0.7))
    keys_V = torch.tensor([0, -1, 2**40 + 7, -(2**62), 5, 2**31], device=device)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for probability in (0.05, 0.6):
        mask = DropoutMask(keys_V, probability, word=-0x61C8864680B583EB)
        for tensors in ((x,), (x, other)):
            plain = plain_dropout.dropout(mask, *tensors)
            pairs += zip(kernel(mask, *tensors), plain, strict=True)
    is_same = all(torch.equal(one == 0.0, other == 0.0) for one, other in pairs)
    return excess(pairs) if is_same else float("inf")


def quantise(kernel: Quantise, device: torch.device, dtype: torch.dtype) -> float:
    """Compare codes and scales of rows of all sizes, bit by bit: any difference is infinite."""
    rows = _spread((7, _WIDTH), 0.4, device, dtype)
    rows[1].add_(rows[1].sign())  # so that it has no subnormal numbers beside its smallest scale
    rows *= torch.tensor([0.0, 1e-36, 1e-20, 1e-3, 1.0, 1e10, 1e37], device=device)[:, None]
    rows[4, :1024] *= 1e-3  # subnormal codes
    (codes, scales), (plain_codes, plain_scales) = kernel(rows), plain_quantise.quantise(rows)
    same_codes = torch.equal(codes.view(torch.uint8), plain_codes.view(torch.uint8))
    rows[1, 3], rows[2, -1] = float("nan"), float("-inf")
    codes, scales_of_bad = kernel(rows)
    is_nan = (codes.float() * scales_of_bad).isnan().any(dim=1)
    is_right = same_codes and torch.equal(scales, plain_scales)
    is_right = is_right and is_nan.tolist() == [False, True, True, *[False] * 4]
    return 0.0 if is_right else float("inf")


BY_NAME: dict[str, Callable[[Any, torch.device, torch.dtype], float]] = {
    "adamw": adamw,
    "swiglu": swiglu,
    "rotary": rotary,
    "dropout": dropout,
    "quantise": quantise,
}


def _spread(
    shape: tuple[int, ...], shift: float, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Numbers between -3 and 3 without an order; no random state is touched."""
    count = torch.Size(shape).numel()
    numbers = torch.arange(count, dtype=torch.float32).mul_(0.61803).add_(shift).frac_()
    return numbers.mul_(6.0).sub_(3.0).view(shape).to(device, dtype)


def _rows(device: torch.device) -> Iterable[torch.Tensor]:
    """Values, gradients and moments; rows are longer than what is used of them."""
    shape = (_CLIENTS, _WIDTH + _PADDING)
    for shift in (0.1, 0.4, 0.6, 0.8):
        rows = _spread(shape, shift, device, torch.float32)
        yield (rows.abs_() if shift == 0.8 else rows)[:, :_WIDTH]
