"""Programs of the project, started as people and launchers start them.

A fresh interpreter that imports torch costs some seconds of CPU: what a function on a process of
the fork server shows as well (tests/support/processes.py) starts none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.deadlines import HANG_SECONDS
from tests.support.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "deepspeed", "peft", "datasets"}
"""What costs these seconds."""


def environment(**variables: str) -> dict[str, str]:
    """This process's, with this tree's package in front."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in the root of the tree where ``options`` name no folder.

    Args:
        words: the command.
        options: of ``subprocess.run``; they go over.
    """
    options = {"cwd": ROOT, "env": environment(), "timeout": HANG_SECONDS} | options
    return subprocess.run(words, capture_output=True, text=True, **options)


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this interpreter, ``python WORDS``."""
    return run(sys.executable, *words, **options)


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    code += "\nimport json, sys\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr))


def torchrun(num: int, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun --nproc_per_node NUM WORDS`` on this machine."""
    launcher = ["torch.distributed.run", f"--nproc_per_node={num}", f"--master_port={free_port()}"]
    return python("-m", *launcher, *words, **options)


def start(num: int, *words: str, **variables: str) -> list[subprocess.Popen[str]]:
    """Start ``python WORDS`` as so many processes of one run, without a launcher.

    Nobody cleans up, and process 0 serves the store.
    """
    port = str(free_port())
    places = [
        {"RANK": str(process), "LOCAL_RANK": str(process), "MASTER_PORT": port}
        | {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1"}
        for process in range(num)
    ]
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env=environment(**place, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in places
    ]


def ended(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Wait for the ends: exit codes and outputs; whoever hangs is killed and says so."""
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=HANG_SECONDS)[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0] + "\nDID NOT END")
    return [process.returncode for process in processes], outputs
