"""The rules of a device: what an operation starts, waits for, touches, and refuses."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from tests.support.pretended_gpu.report import Findings, trainer_place
from tests.support.pretended_gpu.storages import HOST, PINNED, Storages, is_gpu
from tests.support.pretended_gpu.streams import Order, Stream


class MixError(RuntimeError):
    """What CUDA or NCCL refuses."""


class Devices:
    """The pretended GPUs of a process."""

    def __init__(self, num_devices: int, *, races: bool) -> None:
        self.findings = Findings()
        self.order = Order(num_devices, self.note_wait)
        self.storages = Storages(self.findings, self.order, races=races)
        self.flags = threading.local()
        """``is_moving``: this thread makes the target of a copy, which is counted elsewhere;
        ``is_filling``: it sets items to a number."""
        self._main_thread = threading.get_ident()

    def place_of(self, device: Any) -> str:
        """``cuda:i`` for a device that is a pretended GPU; ``host`` for a CPU."""
        if isinstance(device, int):
            device = torch.device("cuda", device)
        device = torch.device(device)
        return f"cuda:{self.order.index_of(device)}" if device.type == "cuda" else HOST

    def stream_of(self, where: str) -> Stream:
        """The stream that this thread's work on a GPU goes to."""
        return self.order.current(int(where.removeprefix("cuda:")))

    def note_wait(self, kind: str) -> None:
        """The host waits for the device; other threads than the first may."""
        if threading.get_ident() == self._main_thread:
            self.findings.host_waits[kind, trainer_place()] += 1

    def wait(self, where: str, kind: str) -> None:
        """The host waits for what this thread has asked of a GPU."""
        self.order.host_waits(self.stream_of(where), kind)

    def refuse(self, what: str) -> MixError:
        """Note what CUDA would refuse, and give the error to raise."""
        self.findings.mixes[f"{what} at {trainer_place()}"] += 1
        return MixError(what)

    def launch(
        self,
        name: str,
        where: str,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
    ) -> None:
        """Start one kernel on this thread's stream of a GPU."""
        self.findings.launches[name.rpartition("::")[2]] += 1
        stream = self.stream_of(where)
        for tensor in reads:
            self.storages.by_stream(tensor, stream, writes=False)
        for tensor in writes:
            self.storages.by_stream(tensor, stream, writes=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor, *, non_blocking: bool) -> None:
        """A copy in which a GPU has a part; the places of both tensors are known.

        A copy from pageable memory returns when that memory has been read. One to pageable memory
        may return early, so the host may not read before it has waited for the stream.
        """
        of, to = self.storages.where(source), self.storages.where(target)
        if is_gpu(of) and is_gpu(to):
            self.launch("copy_", to, reads=[source], writes=[target])
            return
        gpu, host = (to, of) if is_gpu(to) else (of, to)
        stream = self.stream_of(gpu)
        if of == HOST:
            self.storages.by_host(source, writes=False)
        else:
            self.storages.by_stream(source, stream, writes=False)
        self.storages.by_stream(target, stream, writes=True)
        way = "copy to the device" if is_gpu(to) else "copy to the host"
        if not non_blocking:
            self.wait(gpu, way)
        elif host != PINNED:
            self.note_wait(f"{way}, non_blocking but pageable")
