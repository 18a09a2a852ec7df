"""Whether two tensors are equal, told by one number each."""

from __future__ import annotations

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_AT_A_TIME = 2**24  # whole numbers of eight bytes are made of them


def bit_sum(values: torch.Tensor) -> int:
    """The sum of all elements, read as whole numbers, modulo 2^64: any single bit changes it.

    Args:
        values: of any shape and number format, on any device.
    """
    whole = values.detach().contiguous().view(-1).view(_INTEGERS[values.element_size()])
    sums = [part.sum(dtype=torch.int64) for part in torch.split(whole, _MOST_AT_A_TIME)]
    return sum(int(one) for one in sums) % 2**64
