"""Rotary position embedding (arXiv 2104.09864) in operations of torch, halves apart as in LLaMA."""

from __future__ import annotations

import torch


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """Rotate heads by their positions, or back; see ``interface.Rotary``.

    Of a head's two halves:  (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
    """
    output = x * cos
    (x1, x2), (y1, y2), (sin1, sin2) = (t.chunk(2, dim=-1) for t in (x, output, sin))
    first, second = (sin2, sin1) if back else (sin1, sin2)
    sign = -1.0 if back else 1.0
    y1.addcmul_(x2, first, value=-sign)
    y2.addcmul_(x1, second, value=sign)
    return output
