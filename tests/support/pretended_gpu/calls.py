"""Calls of torch's Python functions that ask for a device, move a tensor, or read one.

torch answers some of them before its dispatcher is asked, by the true device, which is always the
CPU. So they are answered here.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.support.pretended_gpu import kernels
from tests.support.pretended_gpu.device import Devices
from tests.support.pretended_gpu.storages import HOST, PINNED, is_gpu, is_real

_FROM_DATA = {"as_tensor", "asarray", "new_tensor", "tensor"}
_READS_OF_THE_HOST = {"__array__", "__dlpack__", "data_ptr", "numpy", "tolist"}
_Handler = Callable[..., Any]


class PretendedGenerator(torch.Generator):
    """A generator that says it belongs to a device; the numbers are those of a CPU."""

    def __new__(cls, device: Any = "cpu") -> PretendedGenerator:
        made = super().__new__(cls)
        made.said = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.said


class Calls(TorchFunctionMode):
    """Looks at each such call of one thread."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices, self._storages = devices, devices.storages
        self._handlers: dict[str, _Handler] = {
            "__setitem__": self._set_item,
            "cpu": self._cpu,
            "cuda": self._cuda,
            "get_device": self._get_device,
            "is_pinned": self._is_pinned,
            "pin_memory": self._pin_memory,
            "rms_norm": self._rms_norm,
            "to": self._to,
        }
        self._handlers |= dict.fromkeys(_FROM_DATA, self._from_data)
        self._handlers |= dict.fromkeys(_READS_OF_THE_HOST, self._read)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        handler = self._handlers.get(name)
        if handler is not None:
            return handler(func, args, kwargs)
        if isinstance(kwargs.get("generator"), PretendedGenerator):
            self._check_generator(name, kwargs["generator"], args, kwargs)
        made = func(*args, **kwargs)
        # x.new_zeros(..., device="cpu") of a CUDA tensor: the dispatcher cannot see that the CPU
        # was asked for.
        is_operation = isinstance(func, torch._ops.OpOverload)  # which has the true device
        likes = name.startswith(("new_", "empty_", "zeros_", "ones_", "full_", "rand"))
        if kwargs.get("device") is not None and likes and not is_operation:
            where = self._devices.place_of(kwargs["device"])
            if torch.device(kwargs["device"]).type != "meta":
                is_pinned = where == HOST and kwargs.get("pin_memory")
                self._storages.put(made, PINNED if is_pinned else where)
        return made

    def _check_generator(
        self, name: str, generator: PretendedGenerator, args: Any, kwargs: dict[str, Any]
    ) -> None:
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        where = kwargs.get("device", "cpu") if first is None else self._storages.device(first)
        if torch.device(where or "cpu").type != generator.device.type:
            raise self._devices.refuse(f"{name} on {where}: a generator of {generator.device}")

    # --- moves ------------------------------------------------------------------------------------

    def _to(self, func: _Handler, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, *words = args
        device, dtype, flags = kwargs.pop("device", None), kwargs.pop("dtype", None), []
        words += [kwargs.pop("other")] if "other" in kwargs else []
        for word in words:
            if isinstance(word, torch.Tensor):
                device, dtype = self._storages.device(word), word.dtype
            elif isinstance(word, torch.dtype):
                dtype = word
            elif isinstance(word, bool):
                flags.append(word)
            elif word is not None:
                device = word
        non_blocking = kwargs.pop("non_blocking", flags[0] if flags else False)
        kwargs["copy"] = kwargs.pop("copy", flags[1] if len(flags) > 1 else False)
        kwargs["dtype"] = tensor.dtype if dtype is None else dtype
        return self._move(func, tensor, device, kwargs, non_blocking=bool(non_blocking))

    def _move(
        self,
        to: _Handler,
        tensor: torch.Tensor,
        device: Any,
        options: dict[str, Any],
        *,
        non_blocking: bool,
    ) -> torch.Tensor:
        if device is None or not is_real(tensor) or _type_of(device) == "meta":
            where = {} if device is None else {"device": device}
            return to(tensor, **where, **options)
        here, there = self._storages.where(tensor), self._devices.place_of(device)
        if is_gpu(here) == is_gpu(there) and (there == here or not is_gpu(there)):
            return to(tensor, **options)
        # torch converts on the side where the tensor is, then copies; it pins the target itself
        # where the host shall not wait.
        self._devices.flags.is_moving = True
        try:
            made = to(tensor, **{**options, "copy": True})
        finally:
            self._devices.flags.is_moving = False
        self._storages.put(made, PINNED if there == HOST and non_blocking else there)
        with torch._C.DisableTorchFunction():
            self._devices.copy(tensor, made, non_blocking=non_blocking)
        return made

    def _cpu(self, _func: _Handler, args: Any, _kwargs: dict[str, Any]) -> torch.Tensor:
        return self._to(torch.Tensor.to, (args[0], "cpu"), {})

    def _cuda(self, _func: _Handler, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        device = args[1] if len(args) > 1 else kwargs.get("device")
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        options = {"non_blocking": non_blocking}
        return self._to(torch.Tensor.to, (args[0], "cuda" if device is None else device), options)

    def _pin_memory(self, _func: _Handler, args: Any, _kwargs: dict[str, Any]) -> torch.Tensor:
        if self._storages.where(args[0]) == PINNED:
            return args[0]
        if is_gpu(self._storages.where(args[0])):
            raise self._devices.refuse("pin_memory of a tensor on a GPU")
        made = args[0].clone()
        self._storages.put(made, PINNED)
        return made

    def _from_data(self, func: _Handler, args: Any, kwargs: dict[str, Any]) -> Any:
        """Numbers or an array to a device: made on the host, and copied while the host waits."""
        device = kwargs.pop("device", None)
        if device is None and isinstance(args[0], torch.Tensor):
            device = self._storages.device(args[0])
        made = func(*args, **kwargs)
        if device is None or _type_of(device) == "cpu":
            return made
        return self._to(torch.Tensor.to, (made, device), {})

    # --- looks ------------------------------------------------------------------------------------

    def _get_device(self, _func: _Handler, args: Any, _kwargs: dict[str, Any]) -> int:
        device = self._storages.device(args[0])
        return -1 if device.index is None else device.index

    def _is_pinned(self, _func: _Handler, args: Any, _kwargs: dict[str, Any]) -> bool:
        return is_real(args[0]) and self._storages.where(args[0]) == PINNED

    def _read(self, func: _Handler, args: Any, kwargs: dict[str, Any]) -> Any:
        """The host reads memory outside torch's operations."""
        tensor, name = args[0], func.__name__
        if self._storages.device(tensor).type != "cuda":
            self._storages.by_host(tensor, writes=False)
        elif name == "tolist":
            self._devices.wait(self._storages.where(tensor), "tolist")
        elif name != "data_ptr":  # an address is no read
            raise self._devices.refuse(f"{name} of a tensor on a GPU")
        return func(*args, **kwargs)

    def _set_item(self, func: _Handler, args: Any, kwargs: dict[str, Any]) -> None:
        self._devices.flags.is_filling = isinstance(args[2], numbers.Number)
        try:
            func(*args, **kwargs)
        finally:
            self._devices.flags.is_filling = False

    def _rms_norm(self, func: _Handler, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """One kernel there and one back, as on a GPU; a CPU has many operations for it."""
        if self._storages.device(args[0]).type != "cuda":
            return func(*args, **kwargs)
        given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False))
        x, weight, eps = ((given | kwargs).get(key) for key in ("input", "weight", "eps"))
        return kernels.RmsNorm.apply(x, weight, eps)


def _type_of(device: Any) -> str:
    return "cuda" if isinstance(device, int) else torch.device(device).type
