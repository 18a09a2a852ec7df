"""Measuring instruments: a clock, repeated timings with spread, saved bytes, operations, rates."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from sfed.utils import versions

# Dense bf16 FLOP/s of the datasheet, by a part of the device's name; the first that fits.
_DATASHEET_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
# Side of the square matrices whose product shows what the device can do.
_MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
# One product on a GPU takes little longer than to launch it and to wait for it.
_MATMUL_PRODUCTS = {"cuda": 10, "cpu": 1}
# The shared start of the names of operations that only look at memory in another way.
_RELABELLING = ("aten._unsafe_view",)


@dataclass(frozen=True)
class Clock:
    """Reads the time when the device has nothing left to do."""

    device: torch.device

    def read(self) -> float:
        """Seconds since some moment, after all work that was handed to the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds_of(self, work: Callable[[], object]) -> float:
        """Seconds that a piece of work takes."""
        start = self.read()
        work()
        return self.read() - start


@dataclass(frozen=True)
class Spread:
    """The median of some repetitions, the lowest and the highest."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Return the spread of at least one sample."""
        return Spread(statistics.median(samples), min(samples), max(samples), len(samples))

    def as_json(self) -> dict[str, float]:
        """Return the values by name."""
        return {"median": self.median, "min": self.low, "max": self.high, "count": self.count}


def interleaved(
    tasks: Mapping[str, Callable[[], float]], repeat: int, budget_seconds: float | None
) -> dict[str, list[float]]:
    """Time tasks in turns, a b c a b c ..., so that a busy minute of the machine meets all alike.

    The first turn warms up and is not counted.

    Args:
        tasks: by name; each does its work and returns the seconds that count.
        repeat: counted turns.
        budget_seconds: begin no further turn after this long, but count at least one; None = never
            end early.
    """
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    start = time.monotonic()
    for turn in range(repeat + 1):
        late = budget_seconds is not None and time.monotonic() - start > budget_seconds
        if late and turn > 1:
            break
        for name, task in tasks.items():
            seconds = task()
            if turn:
                samples[name].append(seconds)
    return samples


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the ratio turn by turn: what disturbs a whole turn cancels."""
    return Spread.of([one / other for one, other in zip(numerators, denominators, strict=True)])


class SavedBytes:
    """Counts what autograd keeps of a forward pass for the backward pass.

    A context for one forward pass. Every storage counts once and whole, however many tensors look
    at it; storages of the excluded tensors, such as frozen weights, count nothing.
    """

    def __init__(self, excluded: Iterable[torch.Tensor]) -> None:
        self.total = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in excluded}
        # Kept alive, so that no later storage gets the address of one that has gone.
        self._kept: list[torch.UntypedStorage] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda kept: kept)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(storage)
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._kept.clear()  # or a peak that is measured next would hold them


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that the dispatcher sends to the device: all but views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count one operation and do it."""
        if not func.is_view and not str(func).startswith(_RELABELLING):
            self.count += 1
        return func(*args, **(kwargs or {}))


class Matmul:
    """Large square matrix products: the rate that this machine reaches at its best.

    Of random numbers: constant ones switch fewer transistors, so that a GPU clocks higher than it
    does on real weights and activations.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        side = _MATMUL_SIDE[device.type]
        self._products = _MATMUL_PRODUCTS[device.type]
        self.flops = 2.0 * side**3 * self._products
        generator = torch.Generator(device).manual_seed(0)
        self._one, self._other = (
            torch.randn(side, side, device=device, dtype=dtype, generator=generator)
            for _ in range(2)
        )
        self._out = torch.empty_like(self._one)

    def run(self) -> None:
        """Compute the products of one reading, one after another."""
        for _ in range(self._products):
            torch.mm(self._one, self._other, out=self._out)


def datasheet_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the datasheet promises; None where it is not known here."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _DATASHEET_BF16.items() if part in name), None)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as far as they bear on a figure."""
    known: dict[str, Any] = {
        "device": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions.installed(*versions.LIBRARIES, "numpy"),
    }
    if device.type == "cuda":
        known["cpu"] = known["device"]
        known["device"] = torch.cuda.get_device_name(device)
        known["device_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        known["cuda"] = torch.version.cuda
    return known


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The dimensions of a model that bear on a figure."""
    keys = (
        "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads vocab_size tie_word_embeddings"
    )
    return {key: getattr(config, key, None) for key in keys.split()}


def _cpu_name() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
