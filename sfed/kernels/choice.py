"""Which implementation of each kind of arithmetic is in use, by ``train.kernels`` and the device.

A kernel of Triton is compiled when it is first called, which needs a C compiler and the headers of
Python. What comes out is compared with the plain operations on this device before it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from sfed.kernels import comparison
from sfed.kernels.interface import Adamw, Dropout, Quantise, Rotary, Swiglu
from sfed.kernels.plain.adamw import adamw
from sfed.kernels.plain.dropout import dropout
from sfed.kernels.plain.quantise import quantise
from sfed.kernels.plain.rotary import rotary
from sfed.kernels.plain.swiglu import PlainSwiglu
from sfed.utils.errors import UserError
from sfed.utils.text import one_line

_KEY = "train.kernels"
_NAMES = {
    "adamw": "AdamW",
    "swiglu": "SwiGLU",
    "rotary": "rotary embedding",
    "dropout": "dropout",
    "quantise": "FP8 quantisation",
}
OPTIONS = ("dropout", "quantise")
"""Kinds that only some runs have: by ``lora.dropout`` and ``backbone.compute``."""
# What Triton raises, beside errors of its own, where it finds no compiler, driver or memory.
_ERRORS = (
    RuntimeError,
    OSError,
    ImportError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Kernels:
    """One implementation of each kind of arithmetic."""

    adamw: Adamw = adamw
    swiglu: Callable[[], Swiglu] = PlainSwiglu
    rotary: Rotary = rotary
    dropout: Dropout = dropout
    quantise: Quantise = quantise
    fused: tuple[str, ...] = ()
    """Those of the fields above that are kernels of Triton."""
    reason: str = ""
    """Why it is these."""
    faults: tuple[str, ...] = ()
    """Why kernels that were tried are not used, a line each."""
    options: tuple[str, ...] = ()
    """Of ``OPTIONS``, those that a run has."""

    @property
    def by_name(self) -> dict[str, str]:
        """What computes each kind of arithmetic that a run has: triton or torch."""
        names = _names(self.options)
        return {name: "triton" if name in self.fused else "torch" for name in names}

    @property
    def line(self) -> str:
        """What computes what, in words."""
        if not self.fused:
            return f"torch ({self.reason})"
        named = ", ".join(_NAMES[name] for name in self.fused)
        version = importlib.import_module("triton").__version__
        return f"Triton {version} for {named} ({self.reason})"


PLAIN = Kernels()


def _names(options: Collection[str]) -> list[str]:
    return [name for name in _NAMES if name in options or name not in OPTIONS]


@functools.lru_cache(maxsize=8)
def choose(
    asked: str, device: torch.device, dtype: torch.dtype, options: tuple[str, ...] = ()
) -> Kernels:
    """Take kernels of Triton where they are asked for, run here and compute what torch computes.

    Args:
        asked: ``train.kernels``.
        device: that computes.
        dtype: of the passes, bf16 or fp32.
        options: of ``OPTIONS``, those that the run has.

    Raises:
        UserError: where kernels of Triton are asked for and one does not run here or is wrong.
    """
    if asked == "torch":
        return Kernels(reason="as asked for", options=options)
    if lack := _lack(device, is_asked=asked == "triton"):
        if asked == "triton":
            raise UserError(f"{_KEY}=triton: {lack}; set {_KEY}=auto or {_KEY}=torch")
        return Kernels(reason=lack, options=options)
    fused, names = _fused(), _names(options)
    found = {name: _fault(getattr(fused, name), name, device, dtype) for name in names}
    by_fault: dict[str, list[str]] = {}  # one cause, such as a missing compiler, is said once
    for name, fault in found.items():
        if fault is not None:
            by_fault.setdefault(fault, []).append(_NAMES[name])
    faults = tuple(f"{', '.join(names)}: {fault}" for fault, names in by_fault.items())
    if faults and asked == "triton":
        raise UserError(f"{_KEY}=triton: {'; '.join(faults)}; set {_KEY}=auto or {_KEY}=torch")
    kept = tuple(name for name, fault in found.items() if fault is None)
    chosen = {name: getattr(fused, name) for name in kept}
    reason = "compared with torch's operations" if kept else "the kernels of Triton failed"
    plain = Kernels(fused=kept, reason=reason, faults=faults, options=options)
    return dataclasses.replace(plain, **chosen)


def _lack(device: torch.device, *, is_asked: bool) -> str | None:
    """Why kernels of Triton are not even tried; None where they are."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # a folder of this name without a package in it
        return "Triton is not installed (pip install 'sfed[kernels]')"
    is_interpreted = bool(importlib.import_module("triton").knobs.runtime.interpret)
    if is_interpreted and not is_asked:
        return "TRITON_INTERPRET is set, and interpreted kernels are slow"
    if device.type == "cuda" or is_interpreted:
        return None
    return (
        f"kernels of Triton need a GPU and this process computes on {device.type} (with "
        "TRITON_INTERPRET=1 they are interpreted there, for tests)"
    )


def _fused() -> Kernels:
    """All kernels of Triton."""
    own = {name: importlib.import_module(f"sfed.kernels.fused.{name}") for name in _NAMES}
    return Kernels(
        own["adamw"].adamw,
        own["swiglu"].FusedSwiglu,
        own["rotary"].rotary,
        own["dropout"].dropout,
        own["quantise"].quantise,
    )


def _fault(
    kernel: Callable[..., object], name: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a kernel cannot be used on this device; None where it can."""
    own_errors = importlib.import_module("triton.errors").TritonError
    try:
        # In fp32 too, whatever the passes are in: there the tolerance is tight.
        dtypes = dict.fromkeys((torch.float32, dtype))
        excess = [comparison.BY_NAME[name](kernel, device, one) for one in dtypes]
    except (*_ERRORS, subprocess.SubprocessError, own_errors) as error:
        return (
            f"Triton cannot compile or run it on {device}: {type(error).__name__}: "
            f"{one_line(error, 200)} (it needs a C compiler and the headers of Python: packages "
            "gcc and python3-dev)"
        )
    if all(one <= 1.0 for one in excess):  # false of NaN
        return None
    times = ", ".join(f"{one:.2g}" for one in excess)
    return f"on {device} it differs from torch's operations by {times} times the tolerance"
