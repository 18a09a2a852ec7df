"""Where each storage is said to lie, and who has touched it.

All memory is the host's. A storage without a record is ordinary (pageable) host memory that no
stream has touched.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field

import torch

from tests.support.pretended_gpu.clock import HOST_WORKER, Access, Clock, History
from tests.support.pretended_gpu.report import Findings, place
from tests.support.pretended_gpu.streams import Order, Stream

HOST, PINNED = "host", "pinned"
_true_device = torch._C.TensorBase.device.__get__


def is_gpu(where: str) -> bool:
    """Whether this names a pretended GPU."""
    return where.startswith("cuda")


def is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory: neither a meta nor a fake one."""
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().device.type == "cpu"


@dataclass
class _Record:
    """What is known of a storage."""

    where: str
    num_bytes: int
    made_at: str
    owner: Stream
    """On whose order its memory is given out again."""
    history: History = field(default_factory=History)
    guards: set[int] = field(default_factory=set)
    """Streams that torch waits for before it gives the memory out again."""


class Storages:
    """The records of all storages."""

    def __init__(self, findings: Findings, order: Order, *, races: bool) -> None:
        self._findings, self._order, self._races = findings, order, races
        self._records: dict[int, _Record] = {}
        self._lock = threading.RLock()
        self.now_bytes = [0] * order.num_devices
        self.peak_bytes = [0] * order.num_devices

    def stop(self) -> None:
        """Note no race any more: nobody looks at the streams."""
        self._races = False

    def where(self, tensor: torch.Tensor) -> str:
        """``host``, ``pinned`` or ``cuda:i``; of a tensor that has memory."""
        record = self._records.get(tensor.untyped_storage()._cdata)
        return HOST if record is None else record.where

    def device(self, tensor: torch.Tensor) -> torch.device:
        """What ``tensor.device`` says."""
        with torch._C.DisableTorchFunction():
            if not is_real(tensor):
                return _true_device(tensor)
            where = self.where(tensor)
        return torch.device(where if is_gpu(where) else "cpu")

    def put(self, tensor: torch.Tensor, where: str) -> None:
        """Say that a tensor's memory lies there."""
        if not is_real(tensor):
            return
        storage = tensor.untyped_storage()
        record = self._records.get(storage._cdata)
        if record is None:
            made_at = place() if self._races else ""
            owner = self._order.current(where if is_gpu(where) else None)
            record = _Record(where, storage.nbytes(), made_at, owner)
            self._records[storage._cdata] = record
            weakref.finalize(storage, self._free, storage._cdata).atexit = False
        else:
            self._count(record, -record.num_bytes)
            record.where = where
        self._count(record, record.num_bytes)

    def guard(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Keep a tensor's memory until that stream is done with it, as ``record_stream`` does."""
        record = self._records.get(tensor.untyped_storage()._cdata)
        if record is not None:
            record.guards.add(stream.stream_id)

    def by_host(self, tensor: torch.Tensor, *, writes: bool) -> None:
        """The host touches memory, which matters where a stream may touch it, too."""
        if not self._races or not is_real(tensor):
            return
        record = self._records.get(tensor.untyped_storage()._cdata)
        if record is not None and not is_gpu(record.where):
            known, time = self._order.host_acts()
            self._touch(record, tensor, HOST_WORKER, (known, time), writes=writes)

    def by_stream(self, tensor: torch.Tensor, stream: Stream, *, writes: bool) -> None:
        """Work on a stream touches memory."""
        if not self._races:
            return
        if tensor.untyped_storage()._cdata not in self._records:
            self.put(tensor, HOST)
        record = self._records[tensor.untyped_storage()._cdata]
        self._touch(record, tensor, stream.stream_id, stream.acts(), writes=writes)

    def _touch(
        self,
        record: _Record,
        tensor: torch.Tensor,
        worker: int,
        moment: tuple[Clock, int],
        *,
        writes: bool,
    ) -> None:
        known, time = moment
        start, end = _bytes_of(tensor)
        if start == end:
            return
        access = Access(worker, time, start, end, place())
        with self._lock:
            found = record.history.add(access, known, writes=writes)
        for old in found:
            what = "writes" if writes else "reads"
            self._findings.races[
                f"{_worker(worker)} {what} {record.where} memory at {access.place}, not ordered "
                f"after its use by {_worker(old.worker)} at {old.place}"
            ] += 1

    def _free(self, key: int) -> None:
        record = self._records.pop(key, None)
        if record is None:
            return
        self._count(record, -record.num_bytes)
        # Pinned memory is kept by torch's own events until its copies are done.
        if not self._races or not is_gpu(record.where):
            return
        known = Clock(record.owner.clock)
        known.join(self._order.host)
        for access in record.history.pending(known):
            if access.worker not in (HOST_WORKER, record.owner.stream_id, *record.guards):
                self._findings.races[
                    f"memory made at {record.made_at} is freed while {_worker(access.worker)} uses "
                    f"it at {access.place}: record_stream or a wait is missing"
                ] += 1

    def _count(self, record: _Record, num_bytes: int) -> None:
        if is_gpu(record.where):
            index = int(record.where.removeprefix("cuda:"))
            self.now_bytes[index] += num_bytes
            self.peak_bytes[index] = max(self.peak_bytes[index], self.now_bytes[index])


def _worker(number: int) -> str:
    return "the host" if number == HOST_WORKER else f"stream {number}"


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of its storage that a tensor may touch, and the end."""
    if tensor.numel() == 0:
        return 0, 0
    start, size = tensor.storage_offset(), tensor.element_size()
    last = start + sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start * size, (last + 1) * size
