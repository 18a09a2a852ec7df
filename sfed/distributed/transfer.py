"""From host memory to the device in one copy, for which the host does not wait."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from sfed.utils.text import one_line

_ALIGNMENT = 16
"""Bytes; a multiple of the size of every dtype."""


def to_device(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Move small tensors to a device: one block of pinned memory, one copy, views of the result.

    A copy of its own for each tensor would start a transfer and wait for the device each time. The
    views keep the whole block alive.

    Args:
        tensors: on the host, of any shapes and dtypes.
        device: where they go; the CPU gets the tensors themselves.

    Returns:
        The same names, shapes and dtypes.
    """
    if device.type == "cpu":
        return dict(tensors)
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
    block = _host_memory(sum(sizes))
    for part, tensor in zip(torch.split(block, sizes), tensors.values(), strict=True):
        _like(part, tensor).copy_(tensor)
    parts = torch.split(block.to(device, non_blocking=True), sizes)
    pairs = zip(tensors.items(), parts, strict=True)
    return {name: _like(part, tensor) for (name, tensor), part in pairs}


def _like(part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a part as a tensor of the dtype and shape of another."""
    return part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _host_memory(size: int) -> torch.Tensor:
    """Bytes of host memory, pinned where the system does not refuse."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        warnings.warn(
            f"the system refuses pinned host memory for batches ({one_line(error, 200)}); the host "
            "waits for each copy to the GPU",
            stacklevel=2,
        )
        return torch.empty(size, dtype=torch.uint8)
