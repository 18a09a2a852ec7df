"""Each measurement on small sizes: it answers, with finite figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sfed.doctor.measurements import MEASUREMENTS, Size
from tests.gpu.measure import hardware, sized

SMALL = {"cpu": Size(steps=1), "cuda": Size("llama-30m", 2, 2, 2, 64, 8, 3)}
ELSEWHERE = {"memory"}  # cases.memory_is_planned


def numbers(value: Any) -> Iterator[float]:
    """All numbers of nested dictionaries."""
    for inner in value.values() if isinstance(value, dict) else ():
        yield from numbers(inner)
    if isinstance(value, int | float):
        yield value


@pytest.mark.parametrize("name", [name for name in MEASUREMENTS if name not in ELSEWHERE])
def test_a_measurement_answers(name: str, device: str):
    found = MEASUREMENTS[name](torch.device(device), SMALL[device])
    figures = list(numbers(json.loads(json.dumps(found))))
    assert figures and all(math.isfinite(number) for number in figures)


def test_the_versions_are_those_of_the_packages():
    assert hardware(torch.device("cpu"))["versions"]["torch"] == torch.__version__


def test_a_size_is_read_from_words():
    size = sized(["model=llama2-7b", "layers=4"])
    assert (size.model, size.layers, size.rows) == ("llama2-7b", 4, Size().rows)
