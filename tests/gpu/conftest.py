"""The devices of these tests: a CPU always, a GPU where there is one."""

from __future__ import annotations

import pytest
import torch


def why_no_gpu() -> str:
    """Why no test can use a GPU here."""
    if torch.version.cuda is None:
        return "no CUDA device: this build of torch is for CPUs"
    return "no CUDA device: torch.cuda.is_available() is false (nvidia-smi shows the driver)"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """``cpu`` or ``cuda``."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(why_no_gpu())
    return request.param
