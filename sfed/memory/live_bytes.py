"""Counts the bytes that tensors hold, operation by operation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that tensors made within it hold: now, and at most so far.

    A view shares the storage of its tensor and counts nothing. Neither do tensors that were there
    before, nor what an operation needs inside itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and count what is new in its results."""
        result = func(*args, **(kwargs or {}))
        made = _storages(result)
        known = {storage._cdata for storage in _storages((args, kwargs))} if made else set()
        for storage in made:
            if storage._cdata not in known:
                known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if torch.is_tensor(leaf)]
