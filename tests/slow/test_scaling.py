"""The bench's scaling between two nodes: a slow cable shows in the shares that it belongs to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import netns
from tests.support.launchers import ROOT
from tests.support.netns import Node

pytestmark = [pytest.mark.netns, pytest.mark.dist, pytest.mark.slow]
WORDS = (
    *("--scaling", "--model", "stories", "--rank", "64", "--clients", "2", "--tokens", "16"),
    *("--repeat", "2"),
)
MEGABITS = 50
BURST = 256 * 1024  # bytes that the throttle lets through at once
A_BYTES = 4 * 177_920  # those of r = 16, four times the rank


def measured(nodes: tuple[Node, Node], folder: Path, port: int) -> dict[str, Any]:
    """The weak rounds by storage, with one process on each node."""
    out, logs = folder / f"{port}.json", [folder / f"{port}-{number}.log" for number in range(2)]
    started = []
    for number, node in enumerate(nodes):
        place = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": nodes[0].hostname, "MASTER_PORT": str(port)}
        words = [sys.executable, "-m", "sfed.bench", *WORDS, "--json", str(out)]
        started.append(node.start(*words, folder=ROOT, log=logs[number], environment=place))
    assert netns.wait(started) == [0, 0], [log.read_text()[-3000:] for log in logs]
    [job] = json.loads(out.read_text())["scaling"]
    assert (job["processes"], job["nodes"], job["processes_of_a_node"]) == (2, 2, 1)
    return {row["storage"]: row for row in job["rounds"] if row["kind"] == "weak"}


@pytest.mark.full
def test_a_slow_cable_shows_in_the_mean_and_in_the_gathers(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    free = measured(nodes, tmp_path, 29610)
    for node in nodes:
        node.throttle(f"{MEGABITS}mbit")
    slow = measured(nodes, tmp_path, 29620)
    # What must go over the cable takes its time there, whatever else the machine does.
    least = 8e-6 * (A_BYTES - BURST) / MEGABITS
    for rows in slow.values():
        for turn in rows["samples_seconds"]:
            assert max(parts[2] for parts in turn) > 0.9 * least
    assert slow["replica"]["mean_share"]["median"] > free["replica"]["mean_share"]["median"]
    assert slow["zero3"]["gather_share"]["median"] > 0.5
