"""The commands of launch/: what they ask their launcher for, and what they leave on two nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sfed.distributed import liveness
from tests.support import launchers, netns, runs
from tests.support.deadlines import RUN_SECONDS, wait_until
from tests.support.launchers import ROOT
from tests.support.netns import Node
from tests.support.processes import free_port
from tests.support.selection import full

LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / "torchrun.sh", LAUNCH / "slurm" / "sfed.sbatch"]
TOOLS = Path(sys.executable).parent
ENVIRONMENT = {
    "PATH": f"{TOOLS}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_parsed_and_started(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    if script.suffix == ".sh":
        assert os.access(script, os.X_OK)


def asked_of_torchrun(tmp_path: Path, *words: str, **variables: str) -> dict[str, str]:
    """What launch/torchrun.sh sets for torchrun, and the arguments, under the name of words."""
    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/bin/sh\nenv | grep -E "^(PET|TORCH)_"\necho "words=$*"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    script = [str(LAUNCH / "torchrun.sh"), *words]
    done = launchers.run(*script, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_one_node_needs_nothing_and_takes_any_port(tmp_path: Path) -> None:
    asked = asked_of_torchrun(tmp_path, "a.yaml", "lora.rank=4")
    assert asked == {
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": "auto",
        "PET_MAX_RESTARTS": "0",
        "PET_STANDALONE": "1",
        "words": "-m sfed.train a.yaml lora.rank=4",
    }


def test_numbered_nodes_meet_statically_and_others_by_c10d(tmp_path: Path) -> None:
    two = {"NNODES": "2", "MASTER_ADDR": "node-0"}
    numbered = asked_of_torchrun(tmp_path, **two, NODE_RANK="1")
    assert (numbered["PET_NODE_RANK"], numbered["PET_MASTER_ADDR"]) == ("1", "node-0")
    assert not {"PET_RDZV_BACKEND", "PET_STANDALONE"} & numbered.keys()
    others = asked_of_torchrun(tmp_path, **two, MASTER_PORT="7")
    assert (others["PET_RDZV_BACKEND"], others["PET_RDZV_ENDPOINT"]) == ("c10d", "node-0:7")
    assert others["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_what_a_platform_has_set_goes_before(tmp_path: Path) -> None:
    static = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "job-master-0"}
    static |= {"PET_MASTER_PORT": "23456", "PET_NPROC_PER_NODE": "8"}
    ignored = {"NNODES": "3", "MASTER_ADDR": "elsewhere", "NODE_RANK": "2", "NPROC_PER_NODE": "1"}
    asked = asked_of_torchrun(tmp_path, **static, **ignored)
    assert {key: asked[key] for key in static} == static
    elastic = {"PET_NNODES": "1:2", "PET_RDZV_ENDPOINT": "job-worker-0:23456"}
    elastic |= {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ID": "job", "PET_MAX_RESTARTS": "3"}
    asked = asked_of_torchrun(tmp_path, **elastic)
    assert {key: asked[key] for key in elastic} == elastic
    assert "PET_STANDALONE" not in asked


def test_nodes_without_a_meeting_place_are_refused(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "NNODES": "2"}
    script = str(LAUNCH / "torchrun.sh")
    done = launchers.run(script, env=environment)
    assert done.returncode == 2
    assert "NNODES=2 needs MASTER_ADDR" in done.stderr


def test_skypilot_runs_the_same_script(tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    (tmp_path / "run.sh").write_text(task["run"])
    subprocess.run(["bash", "-n", str(tmp_path / "run.sh")], check=True)
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    assert "exec launch/torchrun.sh" in task["run"]


def overrides(tiny_folder: Path, output: Path, name: str) -> list[str]:
    """What makes launch/sfed.json a run of seconds on random weights; still sharded by ZeRO-3."""
    return [
        str(LAUNCH / "sfed.json"),
        f"model.name={tiny_folder / 'model'}",
        "data.task=jsonl",
        f"data.train_files={tiny_folder / 'rows.jsonl'}",
        "data.max_tokens=64",
        "federated.num_clients=4",
        "federated.num_rounds=2",
        f"federated.deadline_seconds={RUN_SECONDS:g}",
        "train.local_steps=2",
        "train.batch_size=4",
        f"output.dir={output}",
        f"output.name={name}",
    ]


@pytest.fixture(scope="module")
def on_one_node(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The adapters of two processes on one node, started by launch/torchrun.sh."""
    folder = tmp_path_factory.mktemp("single")
    environment = {**os.environ, **ENVIRONMENT, "NPROC_PER_NODE": "2"}
    words = [str(LAUNCH / "torchrun.sh"), *overrides(tiny_folder, folder, "run")]
    done = launchers.run(*words, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs.adapters(folder / "run")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("form", [[], full(["--module", "sfed.train"])], ids=["literal", "long"])
def test_deepspeed_trains_the_file_that_it_is_given(
    tiny_folder: Path, tmp_path: Path, on_one_node: dict, form: list[str]
) -> None:
    """Judged by the adapters: the launcher's exit code is 0 for a program that does nothing."""
    words = ["deepspeed", "--num_gpus=2", f"--master_port={free_port()}", *form]
    environment = {**os.environ, **ENVIRONMENT}
    launchers.run(*words, *overrides(tiny_folder, tmp_path, "run"), env=environment)
    assert runs.identical(runs.adapters(tmp_path / "run"), on_one_node)


TWO = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "sfed-node-0"}
SLOTS = "sfed-node-0 slots=1\nsfed-node-1 slots=1\n"
DEEPSPEED = ["deepspeed", "--hostfile", "hostfile", "--no_ssh", "--master_addr", "sfed-node-0"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.full  # torchrun on two nodes: test_kubernetes; what the script asks of it: above
@pytest.mark.parametrize("kind", ["static", "c10d", "deepspeed without ssh"])
def test_two_nodes_end_with_the_adapters_of_one(
    nodes: tuple[Node, Node], tiny_folder: Path, tmp_path: Path, on_one_node: dict, kind: str
) -> None:
    (tmp_path / "hostfile").write_text(SLOTS)
    run = overrides(tiny_folder, tmp_path, "run")
    started = []
    for number, node in enumerate(nodes):
        words, environment = [str(LAUNCH / "torchrun.sh")], TWO
        if kind == "static":
            environment = {**TWO, "NODE_RANK": str(number)}
        if kind.startswith("deepspeed"):
            words, environment = [*DEEPSPEED, "--node_rank", str(number)], {}
        log = tmp_path / f"node-{number}.log"
        both = {**ENVIRONMENT, **environment}
        started.append(node.start(*words, *run, folder=tmp_path, log=log, environment=both))
    codes = netns.wait(started)
    assert codes == [0, 0], [(tmp_path / f"node-{i}.log").read_text()[-3000:] for i in range(2)]
    assert runs.identical(runs.adapters(tmp_path / "run"), on_one_node)


@pytest.mark.dist
@pytest.mark.slow
def test_processes_whose_torchrun_is_killed_while_they_import_end_with_a_reason(
    tmp_path: Path,
) -> None:
    """kill -9 of torchrun alone: nobody serves the store that they are about to look for."""
    log = tmp_path / "log"
    words = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    words += ["-m", "tests.support.late", str(tmp_path), "data.task=demo"]
    words += [f"output.dir={tmp_path}"]
    with log.open("w") as file:
        agent = subprocess.Popen(
            [sys.executable, "-m", *words], env=launchers.environment(), stdout=file, stderr=file
        )
    try:
        here = [tmp_path / f"here-{rank}" for rank in range(2)]
        wait_until(lambda: all(path.exists() for path in here))
    finally:
        agent.kill()
        agent.wait()
    (tmp_path / "go").touch()
    said = (
        f"joining: torchrun (process {agent.pid}), which started this process, has ended without it"
    )
    pids = [int(path.read_text()) for path in here]
    wait_until(lambda: not any(map(liveness._started, pids)))
    assert log.read_text().count(said) == 2 and "Traceback" not in log.read_text()
