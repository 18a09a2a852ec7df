"""``torch.cuda`` and what else of torch answers for a device."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import varlen

from tests.support.pretended_gpu import kernels
from tests.support.pretended_gpu.calls import PretendedGenerator
from tests.support.pretended_gpu.device import Devices

NAME = "NVIDIA H100 80GB HBM3"
MEMORY_BYTES = 80 * 2**30
CAPABILITY = (9, 0)
Put = Callable[[Any, str, Any], None]
"""Sets an attribute until the pretence ends."""


def patch(put: Put, devices: Devices) -> None:
    """Let torch say that there are GPUs."""
    for name, value in (
        _state(devices) | _order(devices) | _memory(devices) | _properties(devices) | _random()
    ).items():
        put(torch.cuda, name, value)
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        put(torch.cuda.nvtx, name, lambda *_: None)
    if torch.version.cuda is None:
        put(torch.version, "cuda", "13.0")
        put(torch.cuda.nccl, "version", lambda: (2, 29, 7))
    put(torch, "Generator", PretendedGenerator)
    put(varlen, "varlen_attn", kernels.varlen_attn)
    _patch_tensors(put, devices)


def _patch_tensors(put: Put, devices: Devices) -> None:
    storages = devices.storages
    put(torch.Tensor, "device", property(storages.device))
    put(torch.Tensor, "is_cuda", property(lambda tensor: storages.device(tensor).type == "cuda"))
    put(torch.Tensor, "is_cpu", property(lambda tensor: storages.device(tensor).type == "cpu"))
    put(torch.Tensor, "record_stream", lambda *words: storages.guard(*words))  # noqa: PLW0108


def _state(devices: Devices) -> dict[str, Any]:
    order = devices.order

    def set_device(device: Any) -> None:
        order.device_index = order.index_of(device)

    @contextmanager
    def device_block(device: Any) -> Iterator[None]:
        before = order.device_index
        set_device(device)
        try:
            yield
        finally:
            order.device_index = before

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: order.num_devices,
        "current_device": lambda: order.device_index,
        "set_device": set_device,
        "device": device_block,
        "is_current_stream_capturing": lambda: False,
        "ipc_collect": lambda: None,
    }


def _order(devices: Devices) -> dict[str, Any]:
    order = devices.order
    return {
        "Stream": order.stream_class,
        "Event": order.event_class,
        "stream": order.entered,
        "StreamContext": order.entered,
        "current_stream": order.current,
        "default_stream": order.default,
        "synchronize": order.synchronize,
    }


def _memory(devices: Devices) -> dict[str, Any]:
    storages, index = devices.storages, devices.order.index_of

    def now(device: Any = None) -> int:
        return storages.now_bytes[index(device)]

    def peak(device: Any = None) -> int:
        return storages.peak_bytes[index(device)]

    def reset_peak(device: Any = None) -> None:
        storages.peak_bytes[index(device)] = now(device)

    return {
        "mem_get_info": lambda device=None: (MEMORY_BYTES - now(device), MEMORY_BYTES),
        "memory_allocated": now,
        "memory_reserved": now,
        "max_memory_allocated": peak,
        "max_memory_reserved": peak,
        "reset_peak_memory_stats": reset_peak,
        "memory_stats": lambda _device=None: {},
        "empty_cache": lambda: None,
    }


def _properties(devices: Devices) -> dict[str, Any]:
    def properties(device: Any = None) -> types.SimpleNamespace:
        number = devices.order.index_of(device)
        return types.SimpleNamespace(
            name=NAME,
            uuid=f"00000000-0000-0000-0000-{number:012d}",
            major=CAPABILITY[0],
            minor=CAPABILITY[1],
            total_memory=MEMORY_BYTES,
            multi_processor_count=132,
            warp_size=32,
            L2_cache_size=50 * 2**20,
        )

    return {
        "get_device_name": lambda _device=None: NAME,
        "get_device_capability": lambda _device=None: CAPABILITY,
        "get_device_properties": properties,
        "is_bf16_supported": lambda *_, **__: True,
    }


def _random() -> dict[str, Any]:
    return {
        "manual_seed": lambda _seed: None,
        "manual_seed_all": lambda _seed: None,
        "get_rng_state": lambda _device=None: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": list,
        "set_rng_state": lambda *_: None,
        "set_rng_state_all": lambda *_: None,
    }
