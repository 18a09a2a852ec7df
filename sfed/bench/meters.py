"""Instruments that read a CPU or a GPU: seconds, peak memory, launches, host synchronisations."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sfed.bench.measure import Operations
from sfed.memory.live_bytes import LiveBytes

Work = Callable[[], object]

# Operations that hand a number or a size to the host, so that it waits for the device.
_WAITING = (
    "aten._local_scalar_dense",
    "aten.is_nonzero",
    "aten.nonzero",
    "aten.masked_select",
    "aten.equal",
    "aten._unique2",
)
_MOST_PLACES = 20


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, work: Work, times: int = 1) -> float:
    """Seconds of one of several repetitions, all of them on the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / times


def host_seconds_of(device: torch.device, work: Work, times: int = 1) -> float:
    """Seconds in which the host has issued the work, without waiting for the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    seconds = (time.perf_counter() - start) / times
    synchronize(device)
    return seconds


def peak_bytes_of(device: torch.device, work: Work) -> int:
    """Peak memory of the work beyond what is there before it.

    On a GPU by torch's allocator, on a CPU by the tensors that operations return.
    """
    if device.type == "cpu":
        live = LiveBytes()
        with live:
            work()
        return live.peak
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device)
    return peak - before


class _Named(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by name; views are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func).rpartition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def operations_of(work: Work) -> int:
    """Operations that the dispatcher sends to the device."""
    seen = Operations()
    with seen:
        work()
    return seen.count


def kernels_of(device: torch.device, work: Work) -> dict[str, Any]:
    """Kernels of the work on a GPU: their number, their time, and those that take most of it."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
        synchronize(device)
    microseconds: Counter[str] = Counter()
    count = 0
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem"):
            microseconds[event.name[:90]] += event.time_range.elapsed_us()
            count += 1
    top = {name: round(us / 1e3, 3) for name, us in microseconds.most_common(12)}
    return {"kernels": count, "busy_ms": microseconds.total() / 1e3, "top_kernels_ms": top}


@contextmanager
def host_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count what makes the host wait for the device, by place in the code.

    On a GPU this is torch's own report of each synchronisation. A CPU never waits: there the
    operations are counted that would make it wait, which leaves out blocking copies of data.
    """
    found: Counter[str] = Counter()
    if device.type == "cpu":
        with _Named() as seen:
            yield found
        found.update({name: count for name, count in seen.counts.items() if name in _WAITING})
        return

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            found[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    """The innermost lines of the trainer and of transformers that are being run."""
    frames = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if "/sfed/" in frame.filename or "/transformers/" in frame.filename
    ]
    return " < ".join(reversed(frames[-3:]))


def most_common(counts: Counter[str]) -> dict[str, int]:
    """The places that count most."""
    return dict(counts.most_common(_MOST_PLACES))
