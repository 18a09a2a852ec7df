"""The doctor on two nodes, which are network namespaces: names, a slow link, no shared folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import netns
from tests.support.launchers import ROOT
from tests.support.netns import Node

pytestmark = [pytest.mark.netns, pytest.mark.dist, pytest.mark.slow, pytest.mark.full]

Nodes = tuple[Node, Node]
OWN_FOLDER = ("sh", "-c", 'mkdir -p runs && mount -t tmpfs none runs && exec "$@"', "sh")
"""In the node's own mount namespace, so that nobody else sees what is written there."""


OWN_PROCESS_TABLE = ("unshare", "--pid", "--fork", "--mount-proc")
"""So that nobody on the other node can look up its processes, as on a machine of its own."""


def examined(
    nodes: Nodes, folder: Path, *words: str, second: tuple[str, ...] = ()
) -> tuple[list[int], dict[str, Any], str]:
    """Run the doctor under torchrun on both nodes: exit codes, checks, the log of the first."""
    started = []
    for number, node in enumerate(nodes):
        launcher = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--node_rank", str(number), "--master_addr", "10.77.0.1"]
        launcher += ["--master_port", "29511", "-m", "sfed.doctor"]
        started.append(
            node.start(
                *(second if number else ()),
                *(sys.executable, "-m", *launcher, "--json", "doctor.json", *words),
                folder=folder,
                log=folder / f"node-{number}.log",
                environment={"PYTHONPATH": str(ROOT)},
            )
        )
    codes = netns.wait(started)
    log = (folder / "node-0.log").read_text()
    assert (folder / "doctor.json").is_file(), log
    found = json.loads((folder / "doctor.json").read_text())
    return codes, {check["name"]: check for check in found["checks"]}, log


def test_two_nodes_are_examined_in_every_respect(nodes: Nodes, tmp_path: Path):
    codes, checks, log = examined(nodes, tmp_path)
    assert codes == [0, 0], log
    assert checks["processes"]["figures"]["nodes"] == {"sfed-node-0": 1, "sfed-node-1": 1}
    assert {check["status"] for check in checks.values()} <= {"ok", "warning"}
    (link, _) = checks["ring"]["figures"]["links"]
    assert link["is_within_node"] is False
    for kind in ("error", "kill"):
        assert "on sfed-node-1" in checks["faults"]["figures"][kind][0]["said"]


def test_the_slow_link_is_named(nodes: Nodes, tmp_path: Path):
    nodes[1].throttle("50mbit")
    codes, checks, log = examined(nodes, tmp_path, "--only", "ring")
    assert codes == [0, 0], log
    assert checks["ring"]["status"] == "warning", checks["ring"]
    assert "from process 1 to process 0" in checks["ring"]["seen"]
    assert "from process 0 to process 1" not in checks["ring"]["seen"]


def test_a_folder_that_the_nodes_do_not_share_is_named(nodes: Nodes, tmp_path: Path):
    only = ("--only", "folder,numbers,learning,zero3")
    codes, checks, log = examined(nodes, tmp_path, *only, second=OWN_FOLDER)
    assert all(codes), log
    assert checks["folder"]["status"] == "failed"
    assert "process 1 does not share" in checks["folder"]["seen"]
    assert {checks[name]["status"] for name in ("numbers", "learning", "zero3")} == {"skipped"}


def test_a_process_that_breaks_on_another_machine_is_named(nodes: Nodes, tmp_path: Path):
    """The others cannot look it up: they know it by its silence and by broken connections."""
    codes, checks, log = examined(nodes, tmp_path, "--only", "faults", second=OWN_PROCESS_TABLE)
    assert codes == [0, 0], log
    for kind in ("error", "kill"):
        survivor, broken = checks["faults"]["figures"][kind]
        assert "process 1 (pid" in survivor["said"] and "on sfed-node-1" in survivor["said"]
        assert broken["code"] == {"error": 1, "kill": -9}[kind]
