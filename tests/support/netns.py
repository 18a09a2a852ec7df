"""Two nodes on one machine: network namespaces joined by a virtual cable.

A node has its own address, host name and hosts file; what runs on it sees no other way out than
the cable, whose bytes are counted and whose rate and state can be set. Needs root and Linux; the
fixture ``nodes`` of conftest skips elsewhere and says why. Files and process numbers are shared.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.support.deadlines import HANG_SECONDS, wait_until

_TOOLS = ("ip", "tc", "nsenter", "unshare", "mount", "hostname")
_NUMBERS = itertools.count()
_FRAME_BYTES = 1514
"""The longest segment on the cable, with all headers."""
# In a mount namespace of its own the node's hosts file lies over the machine's.
_ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


class NoNodesError(RuntimeError):
    """This machine makes no network namespaces; the message says what is missing."""


class Traffic(NamedTuple):
    """Bytes that a node has put on its cable since it was made, with all headers."""

    sent: int
    resent: int
    """At most so many of them TCP sent again, because an acknowledgement came late."""

    @staticmethod
    def read(devices: str, protocols: str) -> Traffic:
        """Take the counts from ``/proc/net/dev`` and ``/proc/net/snmp``."""
        rows = [line.replace(":", " ").split() for line in devices.splitlines()[2:]]
        names, counts = (line.split() for line in protocols.splitlines() if line[:4] == "Tcp:")
        segments = int(counts[names.index("RetransSegs")])
        return Traffic(
            sent=sum(int(row[9]) for row in rows if row[0] != "lo"),
            resent=_FRAME_BYTES * segments,
        )

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.sent - before.sent, self.resent - before.resent)


@dataclass(frozen=True)
class Node:
    """One of the two ends of the cable."""

    namespace: str
    device: str
    hostname: str
    address: str
    hosts: Path
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self,
        *words: str,
        folder: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command on this node.

        Args:
            words: the command.
            folder: where it runs.
            log: takes all that it prints.
            environment: goes over that of this process.
        """
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*enter, "sh", "-c", _ENTER, "sh", str(self.hosts), self.hostname, *words],
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def process_ids(self) -> list[int]:
        """All that runs on this node now."""
        return [int(word) for word in _run("ip", "netns", "pids", self.namespace).split()]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to everything on this node."""
        for pid in self.process_ids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill everything on this node, as when its power fails, and wait until it is gone."""
        while self.process_ids():  # what was being started; orphans, which init reaps
            self.signal(signal.SIGKILL)
            time.sleep(0.02)
        for process in self._started:
            process.wait(timeout=HANG_SECONDS)

    def traffic(self) -> Traffic:
        """What this node has put on the cable so far."""
        enter = ("nsenter", f"--net=/run/netns/{self.namespace}", "cat")
        return Traffic.read(*(_run(*enter, f"/proc/net/{name}") for name in ("dev", "snmp")))

    def throttle(self, rate: str, burst: str = "256kb", latency: str = "200ms") -> None:
        """Let this node send no faster than this, such as ``50mbit``."""
        place = ("qdisc", "replace", "dev", self.device, "root", "tbf")
        limits = ("rate", rate, "burst", burst, "latency", latency)
        _run("tc", "-n", self.namespace, *place, *limits)

    def pull(self) -> None:
        """Pull the cable out of this node: nobody is told, and nothing arrives any more."""
        _run("ip", "-n", self.namespace, "link", "set", self.device, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _run("ip", "-n", self.namespace, "link", "set", self.device, "up")


def wait(processes: list[subprocess.Popen[bytes]], seconds: float = HANG_SECONDS) -> list[int]:
    """Wait for all of them and return their exit codes.

    Raises:
        TimeoutError: where one still runs after this many seconds.
    """
    end = time.monotonic() + seconds
    try:
        return [process.wait(timeout=max(0.1, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as late:
        raise TimeoutError(f"{late.cmd} still runs after {seconds:g} s") from None


def wait_for_text(log: Path, text: str) -> None:
    """Wait until a log holds a text.

    Raises:
        TimeoutError: with the log, where it never does.
    """
    try:
        wait_until(lambda: log.is_file() and text in log.read_text())
    except TimeoutError:
        raise TimeoutError(f"no {text!r} in {log}:\n{log.read_text()}") from None


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Make two nodes, 10.77.0.1 (sfed-node-0) and 10.77.0.2 (sfed-node-1), and take them away.

    Whatever happens in the body, what still runs on them is killed, and nothing stays.

    Args:
        folder: takes their hosts file.

    Raises:
        NoNodesError: where this machine makes none.
    """
    _refuse_without_tools()
    mark = f"{os.getpid()}x{next(_NUMBERS)}"
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 sfed-node-0\n10.77.0.2 sfed-node-1\n")
    one, other = (
        Node(f"sfed{mark}n{i}", f"v{mark}n{i}", f"sfed-node-{i}", f"10.77.0.{i + 1}", hosts)
        for i in range(2)
    )
    try:
        _lay_cable(one, other)
        yield one, other
    finally:
        for node in (one, other):
            if Path("/run/netns", node.namespace).exists():
                node.kill()
                _run("ip", "netns", "del", node.namespace)


def _refuse_without_tools() -> None:
    if os.geteuid() != 0:
        raise NoNodesError("two nodes are network namespaces, which only root makes")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise NoNodesError(f"two nodes are network namespaces; not installed: {', '.join(missing)}")


def _lay_cable(one: Node, other: Node) -> None:
    try:
        for node in (one, other):
            _run("ip", "netns", "add", node.namespace)
        end = ["peer", "name", other.device, "netns", other.namespace]
        _run("ip", "-n", one.namespace, "link", "add", one.device, "type", "veth", *end)
    except subprocess.CalledProcessError as error:
        raise NoNodesError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
    for node in (one, other):
        _run("ip", "-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.device)
        for device in ("lo", node.device):
            _run("ip", "-n", node.namespace, "link", "set", device, "up")


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
