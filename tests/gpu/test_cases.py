"""The cases on each device; the same bodies as ``python -m tests.gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.cases import CASES


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, device: str, tmp_path: Path):
    found = CASES[name](device, tmp_path)
    assert found
    if "skipped" in found:
        pytest.skip(found["skipped"])
