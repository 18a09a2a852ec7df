"""What breaks between two nodes, which are network namespaces: how a run ends or goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import deadlines, netns, runs, tiny
from tests.support.netns import Node

pytestmark = [pytest.mark.netns, pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
Nodes = tuple[Node, Node]
SGD = {"optimizer": "sgd", "lr": 0.1, "local_steps": 4, "batch_size": 4}
DEADLINE = deadlines.scaled(12.0)
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it a fresh torchrun waits in vain for the address of a master that is there already."""


class Job:
    """One run on two nodes, its logs and its commands."""

    def __init__(self, nodes: Nodes, tiny_folder: Path, folder: Path, **federated: Any) -> None:
        self.nodes, self.folder = nodes, folder
        self.settings = tiny.settings(
            tiny_folder,
            output={"dir": str(folder), "name": "run"},
            train=SGD,
            evaluation={"adapters": ["personal"], "every_rounds": 10},
            federated={"num_rounds": 4, "deadline_seconds": DEADLINE, **federated},
        )
        self.run_folder = folder / "run"
        self._config = folder / "config.json"
        self._config.write_text(json.dumps(self.settings))

    def log(self, node: int) -> str:
        return (self.folder / f"node-{node}.log").read_text()

    def _start(self, node: int, words: list[str], **environment: str) -> subprocess.Popen[bytes]:
        return self.nodes[node].start(
            *(sys.executable, "-m", *words, str(self._config)),
            folder=self.folder,
            log=self.folder / f"node-{node}.log",
            environment={"PYTHONPATH": str(ROOT), **environment},
        )

    def plain(self, node: int) -> subprocess.Popen[bytes]:
        """One process per node, as srun starts them."""
        return self._start(
            node,
            ["tests.support.held"],
            RANK=str(node),
            WORLD_SIZE="2",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="sfed-node-0",
            MASTER_PORT="29500",
        )

    def torchrun(self, node: int, nnodes: str, restarts: int) -> subprocess.Popen[bytes]:
        """One agent with one process per node."""
        words = ["torch.distributed.run", "--nnodes", nnodes, "--nproc_per_node", "1"]
        words += ["--rdzv_id", "job", "--rdzv_backend", "c10d"]
        words += ["--rdzv_endpoint", "sfed-node-0:29400", "--rdzv_conf", "last_call_timeout=3"]
        words += ["--max-restarts", str(restarts), "-m", "tests.support.held"]
        return self._start(node, words, **OWN_STORE)

    def wait_for_rest(self) -> None:
        """Wait until both processes rest in round 2."""
        here = [self.folder / f"here-{process}" for process in range(2)]
        try:
            deadlines.wait_until(lambda: all(path.exists() for path in here))
        except TimeoutError:
            raise TimeoutError(f"no rest:\n{self.log(0)}\n{self.log(1)}") from None

    def go_on(self) -> None:
        """Let whoever rests go on, and nobody rest any more."""
        (self.folder / "go").touch()

    def resumed(self, num_processes: int) -> dict[str, runs.Tensors]:
        """Start the run again, on one node, to its end."""
        return runs.adapters(runs.run(num_processes, self.settings))

    def undisturbed(self, num_processes: int) -> dict[str, runs.Tensors]:
        output = {"dir": str(self.folder), "name": "calm"}
        return runs.adapters(runs.run(num_processes, {**self.settings, "output": output}))


def test_a_partition_ends_both_sides_soon_after_the_deadline(
    nodes: Nodes, tiny_folder: Path, tmp_path: Path
) -> None:
    job = Job(nodes, tiny_folder, tmp_path, num_clients=2)
    started = [job.plain(0), job.plain(1)]
    job.wait_for_rest()
    nodes[1].pull()
    job.go_on()
    codes = netns.wait(started, seconds=DEADLINE + deadlines.GRACE_SECONDS)
    assert all(codes), "neither side may end well"
    assert "gives no sign of life; last seen at round 2, step " in job.log(0)
    assert "process 0: out of reach, and so is the store" in job.log(1)
    assert runs.identical(job.undisturbed(2), job.resumed(2))


def test_a_node_that_is_lost_for_good_leaves_its_clients_to_the_others(
    nodes: Nodes, tiny_folder: Path, tmp_path: Path
) -> None:
    """N is null: two at the first start, and two it stays, on one process."""
    job = Job(nodes, tiny_folder, tmp_path, num_clients=None)
    agents = [job.torchrun(node, "1:2", restarts=3) for node in range(2)]
    job.wait_for_rest()
    nodes[1].kill()
    job.go_on()
    assert netns.wait(agents[:1]) == [0], job.log(0)
    assert "N stays 2, one client for each process of the first start" in job.log(0)
    assert [event["round"] for event in runs.rounds(job.run_folder)] == list(range(5))
    calm = job.undisturbed(2)
    assert runs.relative_difference(calm, runs.adapters(job.run_folder)) <= 1e-5


@pytest.mark.full
def test_a_node_that_is_lost_and_comes_back_is_taken_in_again(
    nodes: Nodes, tiny_folder: Path, tmp_path: Path
) -> None:
    """Its torchrun counts no restart, the other one's counts one: they find each other anyway."""
    job = Job(nodes, tiny_folder, tmp_path, num_clients=2)
    agents = [job.torchrun(node, "2", restarts=3) for node in range(2)]
    job.wait_for_rest()
    nodes[1].kill()
    job.go_on()
    agents[1] = job.torchrun(1, "2", restarts=3)
    assert netns.wait(agents) == [0, 0], job.log(0) + job.log(1)
    assert "resuming after round" in job.log(0)
    assert runs.identical(job.undisturbed(2), runs.adapters(job.run_folder))


@pytest.mark.full
def test_without_the_rendezvous_host_the_others_end_and_a_restart_goes_on(
    nodes: Nodes, tiny_folder: Path, tmp_path: Path
) -> None:
    job = Job(nodes, tiny_folder, tmp_path, num_clients=2)
    agents = [job.torchrun(node, "2", restarts=3) for node in range(2)]
    job.wait_for_rest()
    nodes[0].kill()
    job.go_on()
    (code,) = netns.wait(agents[1:])
    assert code == 1
    assert runs.identical(job.undisturbed(2), job.resumed(2))


@pytest.mark.full  # SIGTERM to one of two processes: test_resume; nodes that torchrun loses: above
def test_sigterm_to_one_nodes_torchrun_stops_the_run_with_everything_written(
    nodes: Nodes, tiny_folder: Path, tmp_path: Path
) -> None:
    job = Job(nodes, tiny_folder, tmp_path, num_clients=2)
    agents = [job.torchrun(node, "2", restarts=0) for node in range(2)]
    job.wait_for_rest()
    agents[1].send_signal(signal.SIGTERM)
    # torchrun ends with 1 after SIGTERM; on the other node the run is not done, and nobody waits.
    assert netns.wait(agents) == [1, 1]
    assert "stopped as asked" in job.log(0)
    assert runs.identical(job.undisturbed(2), job.resumed(2))
