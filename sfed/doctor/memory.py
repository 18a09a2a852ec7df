"""Check of the memory plan: what a pass takes, beside what ``sfed plan`` predicts."""

from __future__ import annotations

from typing import Any

from sfed.distributed import sync
from sfed.doctor import measurements
from sfed.doctor.job import Job
from sfed.doctor.measurements import Size
from sfed.doctor.report import Result, failed, ok, warning
from sfed.memory.costs import USABLE_SHARE
from sfed.utils.text import size_text

SIZES = {
    "cpu": Size("stories", layers=5, clients=2, rows=2, tokens=64, lora_rank=16),
    "cuda": Size("llama-30m", layers=5, clients=2, rows=4, tokens=256, lora_rank=16),
}
_LEAST_OF_PLAN = 0.75
"""Below this share of the plan fewer clients share a pass than could."""


def memory(job: Job) -> Result:
    """Peak memory of a training pass on each device beside the plan."""
    device = job.world.device
    found = measurements.memory(device, SIZES[device.type])
    gathered = sync.gather_json(job.world, "memory", found)
    return judge_memory(gathered, is_counted=device.type == "cpu")


def judge_memory(found: list[dict[str, Any]], *, is_counted: bool) -> Result:
    """Judge the figures of all processes.

    Args:
        found: as of ``measurements.memory``, for each process.
        is_counted: whether the bytes of tensors were counted, for want of a device that tells.
    """
    ratios = [one["pass_measured_over_planned"] for one in found]
    highest, lowest = max(ratios), min(ratios)
    one = found[ratios.index(highest)]
    how = "the tensors of a pass hold" if is_counted else "a pass takes"
    seen = (
        f"{how} {size_text(one['pass_bytes'])}, planned {size_text(one['pass_planned_bytes'])}: "
        f"{100 * highest:.0f} %"
    )
    if highest > 1 / USABLE_SHARE:
        return failed(
            f"{seen} on process {ratios.index(highest)}, more than the plan leaves room for",
            "set federated.clients_per_pass by hand, and report it with the JSON of this "
            "examination",
            memory=found,
        )
    if lowest < _LEAST_OF_PLAN:
        return warning(
            f"{seen}, at least {100 * lowest:.0f} %: the plan is too cautious here",
            "raise federated.clients_per_pass by hand where a GPU has room",
            memory=found,
        )
    return ok(seen, memory=found)
