"""Whole runs under pretended GPUs, in processes of their own, and what was noted of each."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sfed.clients.offload import HostOffload
from sfed.federated.local import LocalSteps
from tests.support import runs
from tests.support.pretended_gpu import PretendedGpu
from tests.support.processes import on_processes

Settings = dict[str, Any]
Places = Counter[tuple[str, str]]
ENVIRONMENT = {"DS_ACCELERATOR": "cuda"}


@dataclass
class StepCounts:
    """One optimizer step of the clients of a pass."""

    host_waits: Places = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    forward_launches: Counter[str] = field(default_factory=Counter)
    """Those before the first backward pass."""
    earlier_collectives: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Those of the run before this step."""


@dataclass
class Seen:
    """What was noted of a run."""

    error: str
    """Traceback; "" = it came to its end."""
    mixes: Counter[str]
    races: Counter[str]
    host_waits: Places
    launches: Counter[str]
    collectives: Counter[tuple[str, str]]
    steps: list[StepCounts]

    def require_clean(self) -> None:
        """It came to its end on a GPU, and CUDA would have nothing against it."""
        assert not self.error, self.error
        assert not self.mixes, self.mixes
        assert not self.races, self.races
        assert self.launches.total() > 1000 and self.host_waits, "the run saw no GPU"


def watched(
    all_settings: Mapping[str, Settings],
    *,
    num_processes: int = 1,
    devices: int = 1,
    broken: Mapping[str, str] | None = None,
) -> list[dict[str, Seen]]:
    """Run some settings one after another on fresh processes, and return what each process saw.

    What uses ZeRO-3 comes last: DeepSpeed changes torch for good.

    Args:
        all_settings: by name of the run.
        num_processes: of each run.
        devices: GPUs of the machine.
        broken: by name of the run, a method of ``HostOffload`` that orders nothing in it.
    """
    todo = (all_settings, devices, broken or {})
    return on_processes(num_processes, _watch_all, *todo, environment=ENVIRONMENT)


def _watch_all(
    all_settings: Mapping[str, Settings], devices: int, broken: Mapping[str, str]
) -> dict[str, Seen]:
    found = {}
    for name, settings in all_settings.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            if name in broken:
                method = broken[name]
                monkeypatch.setattr(HostOffload, method, WITHOUT_ORDER[method])
            found[name] = watch(settings, devices)
    return found


def watch(settings: Settings, devices: int) -> Seen:
    """Run settings in this process under pretended GPUs."""
    error, steps = "", []
    with PretendedGpu(devices, races=True) as gpu, counted_steps(gpu, steps):
        try:
            runs.train_settings(settings)
        except Exception:  # noqa: BLE001  (the test shows it beside what was noted)
            error = traceback.format_exc()
    total = StepCounts(gpu.host_waits, gpu.launches)
    for step in steps:
        total.host_waits += step.host_waits
        total.launches += step.launches
    return Seen(
        error, gpu.mixes, gpu.races, total.host_waits, total.launches, gpu.collectives, steps
    )


@contextmanager
def counted_steps(gpu: PretendedGpu, steps: list[StepCounts]) -> Iterator[None]:
    """Take what each optimizer step starts and waits for out of the counters of the run."""
    make, backward = LocalSteps.make, torch.autograd.backward
    forward: list[Counter[str]] = []

    def counted_backward(*args: Any, **options: Any) -> None:
        forward.append(Counter(gpu.launches))
        backward(*args, **options)

    def counted_make(self: LocalSteps, step: int) -> None:
        before = Counter(gpu.host_waits), Counter(gpu.launches)
        collectives = Counter(gpu.collectives)
        gpu.host_waits.clear()
        gpu.launches.clear()
        forward.clear()
        make(self, step)
        counts = StepCounts(Counter(gpu.host_waits), Counter(gpu.launches), forward[0], collectives)
        steps.append(counts)
        for counter, earlier in zip((gpu.host_waits, gpu.launches), before, strict=True):
            counter.clear()
            counter.update(earlier)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(LocalSteps, "make", counted_make)
        monkeypatch.setattr(torch.autograd, "backward", counted_backward)
        yield


@contextmanager
def _aside_at_once(self: HostOffload) -> Iterator[None]:
    """Copies do not wait for the passes before them."""
    with torch.cuda.stream(self._stream):
        yield


WITHOUT_ORDER: dict[str, Callable[..., Any]] = {
    "aside": _aside_at_once,
    "wait": lambda self, mark: None,  # passes do not wait for the copies
    "finish": lambda self: None,  # the host does not
}
