"""What a round puts on the wire between two nodes, by the counters of their network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import netns, runs, tiny
from tests.netns import Node
from tests.test_launch import ROOT

pytestmark = [pytest.mark.netns, pytest.mark.dist, pytest.mark.slow]

LORA_RANK = 256
SHORT, LONG = 1, 4
"""Rounds of two runs that differ in nothing else: start, evaluation and export drop out."""


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


def sent(nodes: tuple[Node, Node], folder: Path, cases: list[dict[str, Any]]) -> list[list[int]]:
    """Bytes that each node sent, by node and case, with one process on each."""
    (folder / "cases.json").write_text(json.dumps(cases))
    logs = [folder / f"node-{number}.log" for number in range(2)]
    started = []
    for number, node in enumerate(nodes):
        place = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": nodes[0].hostname, "MASTER_PORT": "29600"}
        words = [sys.executable, "-m", "tests.wire", str(folder / "cases.json")]
        started.append(node.start(*words, folder=ROOT, log=logs[number], environment=place))
    assert netns.wait(started, seconds=240.0) == [0, 0], [log.read_text()[-3000:] for log in logs]
    return [json.loads(log.read_text().rpartition("sent ")[2]) for log in logs]


def test_a_round_sends_a_and_under_five_percent_more_whatever_the_number_of_clients(
    nodes: tuple[Node, Node], tiny_folder: Path, tmp_path: Path
) -> None:
    """Two processes send S bytes each to sum S bytes: half of them, then half of the result.

    The five percent hold the headers, the words of the processes to each other and the ledger.
    """
    each = [(clients, rounds) for clients in (2, 8) for rounds in (SHORT, LONG)]
    cases = [settings(tiny_folder, tmp_path, clients, rounds) for clients, rounds in each]
    for bytes_sent in sent(nodes, tmp_path, cases):
        for place, (num_clients, _) in enumerate(each[::2]):
            per_round = (bytes_sent[2 * place + 1] - bytes_sent[2 * place]) / (LONG - SHORT)
            folder = tmp_path / f"of-{num_clients}-for-{LONG}"
            a_factors = runs.factors(runs.adapters(folder)["client-0000"], "A")
            bytes_of_a = 4 * sum(tensor.numel() for tensor in a_factors.values())
            assert bytes_of_a < per_round < 1.05 * bytes_of_a
            assert runs.rounds(folder)[-1]["comm/uploaded_bytes"] == bytes_of_a
