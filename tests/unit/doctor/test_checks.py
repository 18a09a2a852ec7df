"""How figures are judged: ends of a drill, links, memory, GPUs, adapters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sfed.doctor import machines
from sfed.doctor.examination import BEFORE, BENCHMARKS, Options, chosen
from sfed.doctor.faults import End, judge
from sfed.doctor.links import judge_links
from sfed.doctor.memory import judge_memory
from sfed.doctor.trainings import difference
from sfed.utils.errors import UserError

NAMED = "process 2 (pid 7 on node-1) ended at drill, step 3: RuntimeError: injected"


def ends(*codes: int | None, said: str = NAMED, seconds: float | None = 1.0) -> list[End]:
    return [End(process, code, seconds, said) for process, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("found", "part"),
    [
        (ends(1, None, 1), "process 1 did not end within"),
        (ends(0, 1, 1), "process 0 ended as if nothing had happened"),
        (ends(1, 1, 1, said="process 0 (pid 7 on node-1)"), "process 0, 1 did not name it"),
        (ends(1, 1, 1, said="a\nno device", seconds=None), "before the fault with 1: no device"),
        (ends(1, 1, 1, said="", seconds=None), "it wrote nothing"),
    ],
)
def test_what_is_wrong_with_a_drill_is_said(found: list[End], part: str):
    problem = judge("error", found)
    assert problem is not None and part in problem[0] and problem[1]


@pytest.mark.parametrize(("kind", "code"), [("error", 1), ("kill", -9)])
def test_a_drill_in_which_all_end_and_name_the_last_is_right(kind: str, code: int):
    assert judge(kind, ends(1, 1, code)) is None


def link(sender: int, seconds: float, *, within: bool, right: bool = True) -> dict[str, Any]:
    return {
        "sender": sender,
        "receiver": (sender + 1) % 4,
        "is_within_node": within,
        "seconds": seconds,
        "is_right": right,
    }


def test_links_between_nodes_are_not_compared_with_those_within_one():
    found = [link(p, 0.001 if p % 2 == 0 else 0.1, within=p % 2 == 0) for p in range(4)]
    assert judge_links(found, 2**22).status == "ok"


def test_a_link_far_slower_than_others_of_its_kind_is_a_warning():
    found = [link(p, 0.1 if p == 2 else 0.001, within=True) for p in range(4)]
    result = judge_links(found, 2**22)
    assert result.status == "warning"
    assert "from process 2 to process 3 takes 100 ms" in result.seen


def test_a_message_that_arrives_changed_is_a_failure():
    result = judge_links([link(p, 0.1, within=True, right=p != 1) for p in range(4)], 2**22)
    assert result.status == "failed" and "from process 1 to process 2" in result.seen


@pytest.mark.parametrize(
    ("ratios", "status"),
    [([1.0, 1.05], "ok"), ([1.0, 1.5], "failed"), ([0.5, 1.0], "warning")],
)
def test_measured_memory_is_judged_by_the_plan(ratios: list[float], status: str):
    found = [
        {"pass_measured_over_planned": one, "pass_bytes": 1, "pass_planned_bytes": 1}
        for one in ratios
    ]
    result = judge_memory(found, is_counted=False)
    assert result.status == status
    assert status != "failed" or "on process 1" in result.seen


def gpu(**changes: Any) -> dict[str, Any]:
    whole = 80 * 2**30
    fine = {
        "name": "NVIDIA H100",
        "memory_bytes": whole,
        "free_bytes": whole - 2**30,
        "own_bytes": 0,
        "processes_on_it": 1,
        "gpus_of_node": 2,
        "local_size": 2,
    }
    return {**fine, **changes}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"processes_on_it": 2}, "2 processes share a GPU"),
        ({"name": "NVIDIA A100"}, "the GPUs differ: "),
        ({"free_bytes": 2**30}, "in use on the GPU of process 1"),
        ({}, None),
    ],
)
def test_what_is_wrong_with_the_gpus_is_found(changes: dict[str, Any], part: str | None):
    found = [gpu(), gpu(**changes)]
    problems = [text for is_so, text, _ in machines._problems_of_gpus(found) if is_so]
    assert (part is None and not problems) or (part is not None and part in problems[0])


def test_gpus_that_rest_are_named():
    problems = [text for is_so, text, _ in machines._problems_of_gpus([gpu(local_size=1)]) if is_so]
    assert problems == ["2 GPUs are visible and 1 processes run here"]


def test_the_difference_is_relative_to_the_largest_number_and_nan_is_far():
    one = {"client-0000": {"x": torch.tensor([2.0, -4.0])}}
    assert difference(one, {"client-0000": {"x": torch.tensor([2.0, -3.0])}}) == {
        "client-0000": 0.25
    }
    nan = {"client-0000": {"x": torch.tensor([math.nan, 0.0])}}
    assert difference(one, nan)["client-0000"] == math.inf
    with pytest.raises(UserError, match="other clients"):
        difference(one, {})


def options(only: tuple[str, ...] = (), *, benchmarks: bool = False) -> Options:
    return Options(machines.Path("runs"), None, only, benchmarks)


def test_checks_are_chosen_by_name_in_their_own_order():
    assert list(chosen(options(("numbers", "devices")))) == ["devices", "numbers"]
    assert not BENCHMARKS.keys() & chosen(options()).keys()
    assert BENCHMARKS.keys() <= chosen(options(benchmarks=True)).keys()
    assert next(iter(BEFORE)) == "processes"
    with pytest.raises(UserError, match=r"--only nmubers: no such check; the checks are proc"):
        chosen(options(("nmubers",)))
