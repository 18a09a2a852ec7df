"""Runs between network namespaces, whose bytes the kernel counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support import netns, tiny
from tests.support.launchers import ROOT
from tests.support.netns import Node, Traffic

LORA_RANK = 256


def settings(
    folder: Path, output: Path, num_clients: int, num_rounds: int, lora_rank: int = LORA_RANK
) -> dict[str, Any]:
    return tiny.settings(
        folder,
        lora={"rank": lora_rank},
        federated={"num_clients": num_clients, "num_rounds": num_rounds},
        train={"local_steps": 2},
        backbone={"sharding": "none"},
        evaluation={"every_rounds": 1000, "adapters": ["personal"]},
        output={"dir": str(output), "name": f"of-{num_clients}-for-{num_rounds}"},
    )


def sent(
    nodes: tuple[Node, Node], folder: Path, cases: list[dict[str, Any]]
) -> list[list[Traffic]]:
    """What each node put on the cable, by node and case, with one process on each."""
    (folder / "cases.json").write_text(json.dumps(cases))
    logs = [folder / f"node-{number}.log" for number in range(2)]
    started = []
    for number, node in enumerate(nodes):
        place = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": nodes[0].hostname, "MASTER_PORT": "29600"}
        words = [sys.executable, "-m", "tests.support.wire", str(folder / "cases.json")]
        started.append(node.start(*words, folder=ROOT, log=logs[number], environment=place))
    assert netns.wait(started) == [0, 0], [log.read_text()[-3000:] for log in logs]
    answers = [json.loads(log.read_text().rpartition("sent ")[2]) for log in logs]
    return [[Traffic(*counts) for counts in answer] for answer in answers]
