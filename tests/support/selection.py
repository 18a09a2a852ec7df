"""Which cases of a product the test command runs, and which ``.ci/run full`` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def full(*values: Any, **options: Any) -> Any:
    """A case that belongs to the full selection: another one of its test is the representative."""
    return pytest.param(*values, marks=pytest.mark.full, **options)


def some_of(values: Iterable[Any], *representatives: Any) -> list[Any]:
    """One case per value, of which all but the representatives belong to the full selection."""
    return [value if value in representatives else full(value) for value in values]
