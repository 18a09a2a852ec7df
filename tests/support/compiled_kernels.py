"""Compiles every kernel for a GPU that is not there: ``python -m tests.support.compiled_kernels``.

Prints a line of JSON: for each kernel the bytes of its machine code, and whether its PTX is for the
GPU that was asked for. Without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sfed.kernels.fused import adamw, dropout, quantise, rotary, swiglu
from sfed.kernels.plain import dropout as plain_dropout

CAPABILITY = 90
_WIDTHS = {"tokens": "i32", "heads": "i32", "half": "i32", "count": "i64", "width": "i64"}
_ADAMW: dict[str, Any] = {"HAS_CLIP": True, "BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8}
_ADAMW |= {"LOG_BETA1": -0.105, "LOG_BETA2": -0.001, "BLOCK": 1024}
_QUANTISE: dict[str, Any] = {"LARGEST": 448.0, "SMALLEST": 2.0**-126, "BLOCK": 2048}
_DROPOUT: dict[str, Any] = {
    name: getattr(plain_dropout, name) for name in ("WEYL", "FIRST", "SECOND")
}
_DROPOUT |= {"BLOCK": 1024}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (adamw.adamw_kernel, _ADAMW),
    "product": (swiglu.product_kernel, {"BLOCK": 1024}),
    "gradients": (swiglu.gradients_kernel, {"BLOCK": 1024}),
    "rotary": (rotary.rotary_kernel, {"BACK": False, "HEADS": 8, "BLOCK": 64}),
    "rotary back": (rotary.rotary_kernel, {"BACK": True, "HEADS": 8, "BLOCK": 64}),
    "dropout": (dropout.dropout_kernel, {**_DROPOUT, "PAIR": False}),
    "dropout of two": (dropout.dropout_kernel, {**_DROPOUT, "PAIR": True}),
    "quantise": (quantise.quantise_kernel, _QUANTISE),
    "quantise one number": (quantise.quantise_kernel, {**_QUANTISE, "BLOCK": 1, "width": 1}),
    # A launch makes constants of whole numbers that are 1.
    "adamw of one block": (adamw.adamw_kernel, {**_ADAMW, "blocks": 1, "steps_stride": 1}),
    "rotary of one token": (
        rotary.rotary_kernel,
        {"BACK": False, "HEADS": 8, "BLOCK": 1, "tokens": 1, "heads": 1, "half": 1, "x_token": 1},
    ),
}


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """The types of a kernel's arguments, by their names."""
    types = dict.fromkeys(kernel.arg_names, f"*{dtype}")
    types |= {name: kind for name, kind in _WIDTHS.items() if name in types}
    for name in kernel.arg_names:
        if name.endswith(("_row", "_token", "_head", "stride")):
            types[name] = "i64"
    known = {"active_C": "*i1", "blocks": "i32", "weight_decay": "fp32"}
    if kernel is dropout.dropout_kernel:
        known |= {"keys": "*i64", "word": "i64"}
        known |= {"width": "i32", "threshold": "i32", "scale": "fp32"}
    if kernel is quantise.quantise_kernel:
        known |= {"codes": "*u8", "scales": "*fp32", "row_stride": "i64", "width": "i32"}
    types |= {name: kind for name, kind in known.items() if name in types}
    return types | dict.fromkeys(constants, "constexpr")


def compiled(name: str, dtype: str) -> dict[str, Any]:
    """Compile a kernel for tensors of a dtype."""
    kernel, constants = KERNELS[name]
    source = ASTSource(kernel, signature(kernel, constants, dtype), constants)
    made = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32))
    return {
        "cubin_bytes": len(made.asm["cubin"]),
        "is_for_the_gpu": f".target sm_{CAPABILITY}" in made.asm["ptx"],
    }


def main() -> None:
    found = {
        f"{name} {dtype}": compiled(name, dtype)
        for name in KERNELS
        for dtype in (("fp32",) if name.startswith("adamw") else ("fp32", "bf16"))
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
