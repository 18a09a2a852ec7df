"""Triton's interpreter, in which tests run kernels on a CPU."""

from __future__ import annotations

import os

import pytest


def require() -> None:
    """Skip the test, or the module that calls it, where kernels cannot be interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'sfed[kernels]')")
    if "TRITON_INTERPRET" not in os.environ:
        why = "kernels are compiled where there is a GPU; tests/gpu compares them there"
        pytest.skip(why, allow_module_level=True)
