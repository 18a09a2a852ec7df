"""Copies between the device and host memory, beside the training that goes on.

On a GPU they run on a stream of their own, from and to pinned memory, so that neither the host nor
the passes wait for them. On a CPU the same calls copy at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sfed.utils.text import one_line


class HostOffload:
    """Carries tensors between one device and host memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
        self._pins = self._stream is not None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Copy in the body behind what has been asked of the device so far, not before it."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """A point after the copies that were asked for so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Make the device wait for the copies before an event; the host does not wait."""
        if self._stream is not None and mark is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(mark)

    def finish(self) -> None:
        """Wait for all copies: the host may read what they brought."""
        if self._stream is not None:
            self._stream.synchronize()

    def bring(self, place: torch.Tensor, held: torch.Tensor | None) -> None:
        """Fill a place on the device from host memory, with zeros where nothing is held."""
        if held is None:
            place.zero_()
        else:
            place.copy_(held, non_blocking=True)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy into new host memory; to be read after ``finish``."""
        return self._empty(tensor).copy_(tensor, non_blocking=True)

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        """Host memory, pinned where the device is a GPU and the system does not refuse."""
        if self._pins:
            try:
                return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pins = False
                warnings.warn(
                    "the system refuses pinned host memory for resting clients "
                    f"({one_line(error, 200)}); theirs is pageable from now on, and "
                    "copies to and from the GPU are slower",
                    stacklevel=2,
                )
        return torch.empty(like.shape, dtype=like.dtype)
