"""Every operation that reaches torch's dispatcher, under the rules of the devices."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.pretended_gpu.device import Devices
from tests.support.pretended_gpu.storages import HOST, PINNED, is_gpu, is_real

# Operations whose result the host needs, or whose shape depends on values.
_WAITS = {
    "aten::_local_scalar_dense": "item",
    "aten::_unique2": "unique",
    "aten::bincount": "bincount",
    "aten::equal": "equal",
    "aten::is_nonzero": "bool",
    "aten::masked_select": "masked_select",
    "aten::nonzero": "nonzero",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim": "unique",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Memory and bookkeeping, no kernel.
_NO_LAUNCH = {
    "aten::_local_scalar_dense",  # a copy
    "aten::_unsafe_view",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::set_",
}
_MOST_FLOPS = 1e11
"""A matrix product beyond this is launched and not computed: it is there to be timed."""


class Operations(TorchDispatchMode):
    """Looks at each operation of one thread."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices, self._storages = devices, devices.storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():
            if getattr(self._devices.flags, "is_moving", False) or any(
                issubclass(kind, FakeTensor) for kind in types
            ):
                return func(*args, **kwargs)
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [tensor for tensor in tensors_in((args, kwargs)) if is_real(tensor)]
        name = func._schema.name
        if name.startswith("c10d"):
            return func(*args, **kwargs)  # see collectives.py
        gpus = {where for where in map(self._storages.where, tensors) if is_gpu(where)}
        if gpus:
            return self._on_gpu(func, args, kwargs, tensors, min(gpus))
        made_at = self._asked_for(kwargs)
        if made_at != HOST:
            return self._made_at(made_at, func, args, kwargs)
        if not func.is_view:
            written = written_by(func, args, kwargs)
            for tensor in tensors:
                self._storages.by_host(tensor, writes=_is_in(tensor, written))
        return func(*args, **kwargs)

    def _asked_for(self, kwargs: dict[str, Any]) -> str:
        """Where a new tensor shall lie; the real one is made in ordinary memory."""
        is_pinned = bool(kwargs.pop("pin_memory", False))
        device = kwargs.get("device")
        if device is None or device.type == "meta":
            return PINNED if is_pinned else HOST
        kwargs["device"] = torch.device("cpu")
        place = self._devices.place_of(device)
        return PINNED if place == HOST and is_pinned else place

    def _made_at(self, where: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        made = func(*args, **kwargs)
        for tensor in tensors_in(made):
            self._storages.put(tensor, where)
            if is_gpu(where) and func._schema.name not in _NO_LAUNCH:
                self._devices.launch(func._schema.name, where, writes=[tensor])
        return made

    def _on_gpu(
        self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], gpu: str
    ) -> Any:
        name, devices = func._schema.name, self._devices
        self._asked_for(kwargs)  # what is made from a tensor lies where the tensor lies
        if name == "aten::copy_" and not self._is_fill(tensors):
            non_blocking = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
            devices.copy(tensors[1], tensors[0], non_blocking=non_blocking)
            return func(*args, **kwargs)
        self._refuse_mixes(name, tensors, gpu)
        is_kernel = not func.is_view and name not in _NO_LAUNCH
        written = written_by(func, args, kwargs)
        on_gpu = [tensor for tensor in tensors if is_gpu(self._storages.where(tensor))]
        if is_kernel:
            reads = [tensor for tensor in on_gpu if not _is_in(tensor, written)]
            devices.launch(name, gpu, reads=reads, writes=written)
        self._wait_where_needed(name, args, kwargs, gpu)
        before = {tensor.untyped_storage()._cdata for tensor in tensors}
        if _is_only_timed(name, tensors) and written:
            return written[0]
        result = func(*args, **kwargs)
        for made in tensors_in(result):
            if is_real(made) and made.untyped_storage()._cdata not in before:
                self._storages.put(made, gpu)
                if is_kernel:
                    self._storages.by_stream(made, devices.stream_of(gpu), writes=True)
        return result

    def _is_fill(self, tensors: list[torch.Tensor]) -> bool:
        """Whether ``x[...] = number`` is what comes as a copy; a GPU gets the number by value."""
        return getattr(self._devices.flags, "is_filling", False) and tensors[1].dim() == 0

    def _refuse_mixes(self, name: str, tensors: list[torch.Tensor], gpu: str) -> None:
        """Raise where tensors lie on two devices; a 0-dim host tensor is a number."""
        where = self._storages.where
        strangers = [t for t in tensors if where(t) != gpu and (t.dim() or is_gpu(where(t)))]
        if not strangers:
            return
        indices_alone = name in _INDEXING and where(tensors[0]) == gpu
        if indices_alone and not any(is_gpu(where(t)) for t in strangers):
            self._devices.wait(gpu, "indices on the host")
            return
        kinds = ", ".join(f"{tuple(t.shape)} on {where(t)}" for t in tensors)
        raise self._devices.refuse(f"{name}: tensors on several devices: {kinds}")

    def _wait_where_needed(self, name: str, args: Any, kwargs: dict[str, Any], gpu: str) -> None:
        kind = _WAITS.get(name)
        if name in _INDEXING and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        ):
            kind = "index by a mask"
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            kind = "repeat_interleave"
        if kind is not None:
            self._devices.wait(gpu, kind)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that an operation writes to."""
    found: list[torch.Tensor] = []
    for position, name in _written_arguments(func):
        found += tensors_in(args[position] if position < len(args) else kwargs.get(name))
    return found


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Positions and names, by the schema."""
    arguments = enumerate(func._schema.arguments)
    return [(position, argument.name) for position, argument in arguments if argument.is_write]


def _is_in(tensor: torch.Tensor, some: list[torch.Tensor]) -> bool:
    return any(tensor is one for one in some)


def _is_only_timed(name: str, tensors: list[torch.Tensor]) -> bool:
    if name != "aten::mm":
        return False
    one, other = tensors[:2]
    return 2.0 * one.shape[0] * one.shape[1] * other.shape[1] > _MOST_FLOPS
