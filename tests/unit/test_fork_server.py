"""The fork server of the tests: what is imported there, and what a process may choose anew."""

from __future__ import annotations

import sys

import pytest

from tests.support.launchers import HEAVY
from tests.support.processes import on_processes


def loaded() -> set[str]:
    return set(sys.modules)


@pytest.mark.dist
def test_what_runs_need_is_there_before_a_process_is_forked() -> None:
    """The fork server passes over what it cannot import without a word."""
    [found] = on_processes(1, loaded)
    assert HEAVY | {"tests.support.preload", "tests.support.runs"} <= found


def accelerator() -> str:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name()


@pytest.mark.dist
def test_a_process_has_the_accelerator_of_its_own_environment() -> None:
    assert on_processes(1, accelerator) == ["cpu"]
    assert on_processes(1, accelerator, environment={"DS_ACCELERATOR": "cuda"}) == ["cuda"]
