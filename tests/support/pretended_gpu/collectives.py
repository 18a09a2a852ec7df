"""``torch.distributed`` as with NCCL: gloo carries, under NCCL's rules.

A collective begins on a stream of its own, after the work of the current stream; who waits for it
lets the current stream come after it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from tests.support.collective_kinds import KINDS
from tests.support.pretended_gpu.cuda_api import Put
from tests.support.pretended_gpu.device import Devices
from tests.support.pretended_gpu.operations import tensors_in
from tests.support.pretended_gpu.storages import is_gpu
from tests.support.pretended_gpu.streams import Event, Stream

_ASYNC_END = "_end_coalescing"


class Collectives:
    """The process groups of this process."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._backend: str | None = None
        self._carriers: dict[int, Stream] = {}
        self._ends: weakref.WeakKeyDictionary[Any, Event] = weakref.WeakKeyDictionary()

    def patch(self, put: Put) -> None:
        """Let torch.distributed say that it uses NCCL where that is asked for."""
        for module in (dist, c10d):
            put(module, "init_process_group", self._init(dist.init_process_group))
            put(module, "new_group", self._new_group(dist.new_group))
            put(module, "get_backend", self._get_backend(dist.get_backend))
            put(module, "is_nccl_available", lambda: True)
        put(c10d, "ProcessGroupNCCL", type("ProcessGroupNCCL", (), {}))
        put(c10d, "_abort_process_group", lambda group=None: dist.destroy_process_group(group))
        functions = torch._C._distributed_c10d
        put(functions, "_dump_nccl_trace_json", functions._dump_fr_trace_json)
        for kind in (*KINDS, _ASYNC_END):
            if hasattr(dist.ProcessGroup, kind):
                put(dist.ProcessGroup, kind, self._watched(kind))
        put(dist.Work, "wait", self._wait(dist.Work.wait))

    def _init(self, init: Callable[..., None]) -> Callable[..., None]:
        def init_process_group(backend: str | None = None, *args: Any, **options: Any) -> None:
            options.pop("device_id", None)
            init("gloo" if backend == "nccl" else backend, *args, **options)
            self._backend = backend

        return init_process_group

    def _new_group(self, new: Callable[..., Any]) -> Callable[..., Any]:
        def new_group(*args: Any, backend: str | None = None, **options: Any) -> Any:
            options.pop("device_id", None)
            return new(*args, backend="gloo" if backend == "nccl" else backend, **options)

        return new_group

    def _get_backend(self, get: Callable[..., str]) -> Callable[..., str]:
        def get_backend(group: Any = None) -> str:
            found = get(group)
            return "nccl" if self._backend == "nccl" else found

        return get_backend

    def _watched(self, kind: str) -> Callable[..., Any]:
        original = getattr(dist.ProcessGroup, kind)

        @functools.wraps(original)
        def begin(group: Any, *args: Any, **options: Any) -> Any:
            tensors = list(tensors_in((args, options)))
            with torch._C.DisableTorchFunction():
                self._note(kind, tensors)
            work = original(group, *args, **options)
            if work is not None:
                carrier = self._carrier()
                self._ends[work] = carrier.record_event()
            return work

        return begin

    def _note(self, kind: str, tensors: list[torch.Tensor]) -> None:
        devices, storages = self._devices, self._devices.storages
        places = sorted({storages.where(tensor) for tensor in tensors})
        if places:
            devices.findings.collectives[kind, ", ".join(places)] += 1
        if self._backend == "nccl" and not all(map(is_gpu, places)):
            raise devices.refuse(f"NCCL: {kind} of tensors on {', '.join(places)}")
        carrier = self._carrier()
        carrier.wait_stream(devices.order.current())
        for tensor in tensors:
            if is_gpu(storages.where(tensor)):
                storages.by_stream(tensor, carrier, writes=True)
                storages.guard(tensor, carrier)  # torch keeps it until the wait

    def _carrier(self) -> Stream:
        order = self._devices.order
        index = order.device_index
        if index not in self._carriers:
            self._carriers[index] = order.stream_class(index)
        return self._carriers[index]

    def _wait(self, original: Callable[..., bool]) -> Callable[..., bool]:
        def wait(work: Any, *args: Any, **options: Any) -> bool:
            end = self._ends.get(work)
            if end is not None:
                self._devices.order.current().wait_event(end)
            return original(work, *args, **options)

        return wait
