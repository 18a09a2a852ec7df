"""Rows rounded to FP8 (e4m3) with a scale each, in operations of torch."""

from __future__ import annotations

import torch

from sfed.kernels.interface import Quantised

CODES = torch.float8_e4m3fn
LARGEST = torch.finfo(CODES).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""So a row of zeros, or of the smallest numbers, has a scale that it can be divided by."""


def quantise(rows: torch.Tensor) -> Quantised:
    """Round each row to e4m3 with a scale of its own; see ``interface.Quantise``.

    scale = max |x| / 448, at least the smallest normal number;  code = e4m3(x / scale).
    """
    least, most = torch.aminmax(rows, dim=-1, keepdim=True)
    largest = torch.maximum(most, least.neg()).float()
    # By a tensor of the device: by a number of the host a GPU multiplies with its inverse.
    scales = (largest / largest.new_full((), LARGEST)).clamp(min=SMALLEST_SCALE)
    return (rows / scales).to(CODES).contiguous(), scales
