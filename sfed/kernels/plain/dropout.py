"""Dropout whose masks are a function of keys, in operations of torch.

Number i of a vector whose key, with the mask's word, is (k0, k1), two words of 32 bits, is dropped
with probability p:

    z = k0 + i * 0x9E3779B9
    z = (z ^ z >> 16) * 0x85EBCA6B
    z = (z ^ k1 ^ (z ^ k1) >> 13) * 0xC2B2AE35        dropped where z, signed, < p * 2^32 - 2^31

The steps are those of MurmurHash3's finalizer, over a Weyl sequence, with the second half of the
key between them. All is arithmetic of 32 bits that wraps around, the same on every device.
"""

from __future__ import annotations

import torch

from sfed.kernels.interface import DropoutMask

WEYL, FIRST, SECOND = -0x61C88647, -0x7A143595, -0x3D4D51CB
"""The constants above as signed words."""
_NUMBERS_AT_A_TIME = {"cpu": 2**17}  # so that they stay in the cache
_MOST_NUMBERS = 2**22


def dropout(mask: DropoutMask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Drop the same numbers of tensors; see ``interface.Dropout``."""
    first, vectors = tensors[0], [x.reshape(-1, x.shape[-1]) for x in tensors]
    count, width = vectors[0].shape
    outputs = [torch.empty_like(x) for x in vectors]
    words = (mask.keys ^ mask.word).view(torch.int32).view(count, 2)
    weyl = torch.arange(width, dtype=torch.int32, device=first.device) * WEYL
    some = max(1, _NUMBERS_AT_A_TIME.get(first.device.type, _MOST_NUMBERS) // width)
    is_kept = first.new_empty(min(some, count), width)  # as 0 and 1: a mask of bools is slower
    for start in range(0, count, some):
        here = slice(start, min(start + some, count))
        kept = is_kept[: here.stop - start]
        torch.ge(_hashed(words[here], weyl), mask.threshold, out=kept)
        for x, output in zip(vectors, outputs, strict=True):
            torch.mul(x[here], mask.scale, out=output[here]).mul_(kept)
    return tuple(output.view(x.shape) for output, x in zip(outputs, tensors, strict=True))


def _hashed(words: torch.Tensor, weyl: torch.Tensor) -> torch.Tensor:
    """Make z of the definition above: (vectors, width) int32, of (vectors, 2) and (width,)."""
    z = words[:, :1] + weyl
    z = z.bitwise_xor_((z >> 16).bitwise_and_(0xFFFF)).mul_(FIRST).bitwise_xor_(words[:, 1:])
    return z.bitwise_xor_((z >> 13).bitwise_and_(0x7FFFF)).mul_(SECOND)
