"""Streams and events: they compute nothing, they only say what is ordered before what."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from tests.support.pretended_gpu.clock import HOST_WORKER, Clock


class Order:
    """What the host and the streams of all devices know of each other's work.

    The threads of the process count as one host: an order between two of them is not checked.
    """

    def __init__(self, num_devices: int, note_wait: Callable[[str], None]) -> None:
        self.num_devices = num_devices
        self.device_index = 0
        self.host = Clock()
        self.note_wait = note_wait
        self.streams: list[Stream] = []
        # torch.cuda.Stream and torch.cuda.Event while the GPU is pretended.
        self.stream_class = type("Stream", (Stream,), {"order": self})
        self.event_class = type("Event", (Event,), {"order": self})
        self._default = [self.stream_class(index) for index in range(num_devices)]
        self._entered = threading.local()

    def default(self, device: Any = None) -> Stream:
        """The default stream of a device."""
        return self._default[self.index_of(device)]

    def current(self, device: Any = None) -> Stream:
        """The stream that work of this thread goes to."""
        index = self.index_of(device)
        entered = getattr(self._entered, "streams", ())
        return next((s for s in reversed(entered) if s.device.index == index), self._default[index])

    @contextmanager
    def entered(self, stream: Stream | None) -> Iterator[None]:
        """Let work go to a stream."""
        if stream is None:
            yield
            return
        before = getattr(self._entered, "streams", ())
        self._entered.streams = (*before, stream)
        try:
            yield
        finally:
            self._entered.streams = before

    def index_of(self, device: Any) -> int:
        """The number of a device; the current one where none is named."""
        if device is None:
            return self.device_index
        index = device if isinstance(device, int) else torch.device(device).index
        index = self.device_index if index is None else index
        if not 0 <= index < self.num_devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return index

    def host_acts(self) -> tuple[Clock, int]:
        """The host touches memory: its clock, and the number of the access."""
        return self.host, self.host.tick(HOST_WORKER)

    def host_waits(self, stream: Stream, kind: str) -> None:
        """The host waits for all work of a stream."""
        self.note_wait(kind)
        self.host.join(stream.clock)

    def synchronize(self, device: Any = None) -> None:
        """The host waits for a device."""
        index = self.index_of(device)
        self.note_wait("synchronize")
        for stream in self.streams:
            if stream.device.index == index:
                self.host.join(stream.clock)


class Stream:
    """Work in the order in which the host asks for it."""

    order: ClassVar[Order]

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", self.order.index_of(device))
        self.order.streams.append(self)
        self.stream_id = self.cuda_stream = len(self.order.streams)
        self.priority = priority
        self.clock = Clock()

    def acts(self) -> tuple[Clock, int]:
        """Ask for one piece of work: what it comes after, and its number."""
        self.clock.join(self.order.host)
        return self.clock, self.clock.tick(self.stream_id)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        self.clock.join(event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = self.order.event_class() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.order.host_waits(self, "stream.synchronize")

    def query(self) -> bool:
        self.order.host.join(self.clock)  # it says yes, so the host may rely on it
        return True

    def __enter__(self) -> Stream:
        self._block = self.order.entered(self)
        self._block.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)


class Event:
    """A point in the work of a stream."""

    order: ClassVar[Order]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock = Clock()

    def record(self, stream: Stream | None = None) -> None:
        stream = self.order.current() if stream is None else stream
        self.clock = Clock(stream.clock)
        self.clock.join(self.order.host)

    def wait(self, stream: Stream | None = None) -> None:
        (self.order.current() if stream is None else stream).wait_event(self)

    def synchronize(self) -> None:
        self.order.note_wait("event.synchronize")
        self.order.host.join(self.clock)

    def query(self) -> bool:
        self.order.host.join(self.clock)
        return True

    def elapsed_time(self, _end: Event) -> float:
        return 1.0
