"""The two nodes that other tests stand on are two nodes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.deadlines import HANG_SECONDS, wait_until
from tests.support.netns import Node

pytestmark = [pytest.mark.netns, pytest.mark.dist]

SEND = """
import socket, sys
if sys.argv[1] == "listen":
    with socket.create_server((socket.gethostname(), 7000)) as server:
        print("listening", flush=True)
        connection, _ = server.accept()
        received = 0
        while chunk := connection.recv(1 << 16):
            received += len(chunk)
        print(socket.gethostname(), received)
else:
    with socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])) as connection:
        connection.sendall(bytes(1_000_000))
"""


@pytest.mark.parametrize("slow_acknowledgements", [False, True])
def test_bytes_between_two_nodes_go_through_the_cable_by_name(
    nodes: tuple[Node, Node], tmp_path: Path, slow_acknowledgements: bool
) -> None:
    one, other = nodes
    if slow_acknowledgements:  # as on a busy machine: TCP sends again what has arrived
        one.throttle("3kbit", burst="1600", latency="20s")
    python = [sys.executable, "-c", SEND]
    log = tmp_path / "one.log"
    listener = one.start(*python, "listen", folder=tmp_path, log=log)
    netns.wait_for_text(log, "listening")
    before = one.traffic(), other.traffic()
    send = [*python, one.hostname, str(HANG_SECONDS)]
    sender = other.start(*send, folder=tmp_path, log=tmp_path / "other.log")
    assert netns.wait([listener, sender]) == [0, 0]
    assert log.read_text().splitlines()[-1] == "sfed-node-0 1000000"
    there, back = other.traffic().since(before[1]), one.traffic().since(before[0])
    assert there.sent > 1_000_000
    assert there.sent - there.resent < 1_050_000
    assert back.sent - back.resent < 50_000


def test_a_killed_node_leaves_nothing_running_and_spares_the_other(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    one, other = nodes
    orphan = ["sh", "-c", "sleep 3600 & sleep 3600"]
    killed, spared = (n.start(*orphan, folder=tmp_path, log=tmp_path / "log") for n in nodes)
    wait_until(lambda: len(one.process_ids()) == len(other.process_ids()) == 3)
    one.kill()
    assert one.process_ids() == []
    assert killed.returncode == -9
    assert spared.poll() is None
    assert len(other.process_ids()) == 3


def test_a_machine_that_makes_no_nodes_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(netns.NoNodesError, match="only root makes"), netns.two_nodes(tmp_path):
        pass
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = "not installed: ip, tc"
    with pytest.raises(netns.NoNodesError, match=missing), netns.two_nodes(tmp_path):
        pass
