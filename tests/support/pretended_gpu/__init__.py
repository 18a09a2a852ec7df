"""Pretended GPUs: the real trainer with real numbers on a CPU, under the rules of CUDA.

    with PretendedGpu(devices=1, races=True) as gpu:
        session.run_session(config)
    assert not gpu.mixes and not gpu.races

Every tensor is made and computed on the CPU. Each storage has a mark that says where it lies: in
host memory, in pinned host memory or on ``cuda:i``. ``tensor.device``, ``.to()``, ``device=``,
``torch.cuda`` and ``torch.distributed`` follow the marks, so that code takes the branches that it
takes on a GPU. Noted are

- ``mixes``: what CUDA and NCCL refuse, which raises here, too;
- ``races`` (where asked for): accesses of two streams, or of a stream and the host, that nothing
  orders, and memory that is freed while another stream uses it;
- ``host_waits``: what makes the main thread wait for the device, by kind and place;
- ``launches``: operations that start a kernel, by name;
- ``collectives``: by kind and device.

Not shown: how kernels round, how long they take, which kernel a GPU would choose, the allocator,
and NCCL itself. Memory counts what tensors hold. One instance at a time; it holds for the thread
that entered it and for threads that are started within it, not for processes that are started.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

# PEFT imports it. Where a GPU seems to be there, it asks torch for functions that a CPU's lacks.
import bitsandbytes  # noqa: F401
import torch

from tests.support.pretended_gpu import cuda_api
from tests.support.pretended_gpu.calls import Calls
from tests.support.pretended_gpu.collectives import Collectives
from tests.support.pretended_gpu.device import Devices, MixError
from tests.support.pretended_gpu.operations import Operations

__all__ = ["MixError", "PretendedGpu"]


class PretendedGpu:
    """Within it, some GPUs seem to be there."""

    def __init__(self, devices: int = 1, *, races: bool = False) -> None:
        """Pretend nothing yet.

        Args:
            devices: how many.
            races: look for missing order between streams, which takes most of the time.
        """
        self._devices = Devices(devices, races=races)
        self._findings = self._devices.findings
        self._modes = threading.local()
        self._stack = ExitStack()

    @property
    def launches(self) -> Counter[str]:
        """Kernel launches by operation."""
        return self._findings.launches

    @property
    def host_waits(self) -> Counter[tuple[str, str]]:
        """Waits of the main thread for the device, by (kind, place)."""
        return self._findings.host_waits

    @property
    def mixes(self) -> Counter[str]:
        """What CUDA or NCCL would refuse."""
        return self._findings.mixes

    @property
    def races(self) -> Counter[str]:
        """Accesses that nothing orders."""
        return self._findings.races

    @property
    def collectives(self) -> Counter[tuple[str, str]]:
        """Collectives by (kind, device)."""
        return self._findings.collectives

    def reset(self) -> None:
        """Count from here."""
        self._findings.reset()

    def as_json(self) -> dict[str, Any]:
        """Everything that was noted."""
        return self._findings.as_json()

    def __enter__(self) -> PretendedGpu:
        with ExitStack() as stack:

            def put(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(mock.patch.object(owner, name, value, create=True))

            cuda_api.patch(put, self._devices)
            Collectives(self._devices).patch(put)
            put(threading.Thread, "run", self._in_threads(threading.Thread.run))
            run_backward = self._in_backward(torch.autograd._engine_run_backward)
            put(torch.autograd, "_engine_run_backward", run_backward)
            put(torch.autograd.graph, "_engine_run_backward", run_backward)
            self._enter_modes(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._devices.storages.stop()
        self._stack.__exit__(*error)

    def _enter_modes(self, stack: ExitStack) -> None:
        """Look at what this thread does."""
        self._modes.calls = Calls(self._devices)
        stack.enter_context(Operations(self._devices))
        stack.enter_context(self._modes.calls)

    def _in_threads(self, run: Any) -> Any:
        def run_looked_at(thread: threading.Thread) -> None:
            with ExitStack() as stack:
                self._enter_modes(stack)
                run(thread)

        return run_looked_at

    def _in_backward(self, run_backward: Any) -> Any:
        """torch leaves the mode while it runs ``Tensor.backward``, and all that this calls."""

        def run_looked_at(*args: Any, **options: Any) -> Any:
            calls = getattr(self._modes, "calls", None)
            if calls is None or torch.overrides._get_current_function_mode() is not None:
                return run_backward(*args, **options)
            with calls:
                return run_backward(*args, **options)

        return run_looked_at
