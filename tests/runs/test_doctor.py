"""The doctor among processes: what it finds, and what it says where one of them is broken."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sfed.clients.optimizer import StackedOptimizer
from sfed.doctor import examination
from sfed.doctor.examination import AFTER, BEFORE, BENCHMARKS
from sfed.models.backbone import Backbone
from tests.support.disturbed import Moment, at
from tests.support.launchers import ROOT, python, torchrun
from tests.support.pretended_gpu import PretendedGpu
from tests.support.processes import End, ends_of, on_processes
from tests.support.selection import full

pytestmark = [pytest.mark.dist, pytest.mark.slow]

HERE = {"PYTHONPATH": str(ROOT)}
OF_EACH = {"name", "status", "seen", "remedy", "figures", "seconds"}


def examine(folder: Path, only: tuple[str, ...] = (), *, benchmarks: bool = False) -> None:
    options = examination.Options(folder / "runs", folder / "doctor.json", only, benchmarks)
    raise SystemExit(examination.run(options, ["--only", ",".join(only)]))


def examined(num: int, folder: Path, *checks: str) -> tuple[list[End], dict[str, Any]]:
    ends = ends_of(num, examine, folder, checks, environment=HERE)
    return ends, report(folder)


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "doctor.json").read_text())
    return {**found, "checks": {check["name"]: check for check in found["checks"]}}


def test_two_processes_are_examined_in_every_respect(tmp_path: Path):
    ends, found = examined(2, tmp_path)
    assert [end.code for end in ends] == [0, 0], ends[0].said
    assert list(found["checks"]) == [*BEFORE, *AFTER]
    assert {"sfed", "command", "seconds", "summary", "machine"} <= found.keys()
    assert all(check.keys() == OF_EACH for check in found["checks"].values())
    assert not {"failed", "skipped"} & {check["status"] for check in found["checks"].values()}
    figures = {name: check["figures"] for name, check in found["checks"].items()}
    assert figures["numbers"]["relative_difference"] <= 1e-5
    assert figures["zero3"]["relative_difference"] <= 1e-6
    assert figures["learning"]["eval_losses"][-1] < figures["learning"]["eval_losses"][0]
    for kind in ("error", "kill"):
        one, other = figures["faults"][kind]
        assert "process 1 (pid" in one["said"] and other["code"] == {"error": 1, "kill": -9}[kind]
    assert "Nothing that was checked prevents training here." in ends[0].said
    assert ends[1].said == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.full
def test_one_process_gives_the_numbers_of_a_cpu_bit_by_bit(tmp_path: Path):
    (end,), found = examined(1, tmp_path, "collectives", "ring", "numbers", "learning", "memory")
    assert end.code == 0, end.said
    status = {name: check["status"] for name, check in found["checks"].items()}
    assert status["collectives"] == status["ring"] == "skipped"
    assert found["checks"]["numbers"]["figures"]["relative_difference"] == 0.0


@pytest.mark.full
def test_one_process_is_examined_in_every_respect_with_benchmarks(tmp_path: Path):
    done = python("-m", "sfed.doctor", "--benchmarks", "--json", "doctor.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(report(tmp_path)["checks"]) == [*BEFORE, *BENCHMARKS, *AFTER]


@pytest.mark.full
def test_under_torchrun(tmp_path: Path):
    done = torchrun(2, "-m", "sfed.doctor", "--json", "doctor.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tmp_path)["summary"]["failed"] == 0


def examine_on_a_pretended_gpu(folder: Path) -> None:
    checks = ("devices", "numbers", "learning", "memory", "zero3")
    with PretendedGpu(devices=1) as gpu:
        code = examination.run(
            examination.Options(folder, folder / "doctor.json", checks, False), []
        )
    assert code == 0 and not gpu.mixes, gpu.mixes


@pytest.mark.full
def test_the_device_is_compared_with_a_cpu_on_a_pretended_gpu(tmp_path: Path):
    on_processes(
        1, examine_on_a_pretended_gpu, tmp_path, environment=HERE | {"DS_ACCELERATOR": "cuda"}
    )
    checks = report(tmp_path)["checks"]
    assert "backbone in bf16" in checks["devices"]["seen"]
    assert checks["learning"]["figures"]["dtype"] == "bf16"
    assert 0.0 < checks["numbers"]["figures"]["bound"] == 1e-3


# --- broken on purpose ---------------------------------------------------------------------------


def examine_with_wrong_weights(folder: Path) -> None:
    """Process 1 reads other weights than process 0."""
    if os.environ["RANK"] == "1":
        made = Backbone.__init__

        def make(self: Backbone, model: Any, *rest: Any) -> None:
            next(model.parameters()).data[0, 0] += 1.0
            made(self, model, *rest)

        Backbone.__init__ = make  # type: ignore[method-assign]
    examine(folder, ("numbers", "devices", "learning"))


def test_other_weights_on_one_process_fail_the_checks_that_train(tmp_path: Path):
    ends = ends_of(2, examine_with_wrong_weights, tmp_path, environment=HERE)
    assert [end.code for end in ends] == [1, 1], ends[0].said
    checks = report(tmp_path)["checks"]
    assert [checks[name]["status"] for name in ("devices", "numbers")] == ["ok", "failed"]
    assert checks["learning"]["status"] == "failed", "the examination went on"
    assert (
        "on process 0" in checks["numbers"]["seen"] and "on process 1" in checks["numbers"]["seen"]
    )
    assert "What is wrong:" in ends[0].said


def examine_with_wrong_steps(folder: Path) -> None:
    """The device of process 1 computes steps that are a little too long."""
    if os.environ["RANK"] == "1":
        own = StackedOptimizer.step

        def step(self: StackedOptimizer, rows: Any, lr_C: torch.Tensor, *rest: Any) -> None:
            own(self, rows, 1.001 * lr_C, *rest)

        StackedOptimizer.step = step  # type: ignore[method-assign]
    examine(folder, ("numbers",))


def test_a_process_that_computes_wrongly_is_named(tmp_path: Path):
    ends = ends_of(2, examine_with_wrong_steps, tmp_path, environment=HERE)
    assert [end.code for end in ends] == [1, 1], ends[0].said
    check = report(tmp_path)["checks"]["numbers"]
    assert check["status"] == "failed"
    assert "on process 1 differs most" in check["seen"]
    assert "What to do: do not train there" in ends[0].said


def examine_alone(folder: Path) -> None:
    """Process 1 does not come."""
    if os.environ["RANK"] == "0":
        examination.DEADLINE_SECONDS = 1.0
        examine(folder, ("processes",))


def test_a_process_that_does_not_come_is_named_with_what_to_check(tmp_path: Path):
    ends = ends_of(2, examine_alone, tmp_path, environment=HERE)
    assert ends[0].code == 1
    assert "sfed doctor: joining: process 1 of 2 did not come within 1 s" in ends[0].said
    assert "What to do: Every node runs the same command" in ends[0].said


def examine_and_break(folder: Path, kind: str) -> None:
    def act(*_: Any) -> None:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("injected here")

    at(Moment(process=1, round_number=1, step=2), act)
    examine(folder, ("devices", "learning", "zero3"))


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [full("error", 1, "RuntimeError: injected here"), ("kill", -9, "it is gone without a word")],
)
def test_a_process_that_breaks_is_named_and_all_end(
    tmp_path: Path, kind: str, code: int, reason: str
):
    ends = ends_of(2, examine_and_break, tmp_path, kind, environment=HERE)
    assert ends[1].code == code
    assert ends[0].code == 1, ends[0].said
    found = report(tmp_path)
    assert list(found["checks"]) == ["devices", "learning"], "what was found before is kept"
    assert found["checks"]["learning"]["status"] == "failed"
    assert "process 1 (pid" in found["checks"]["learning"]["seen"]
    assert reason in found["checks"]["learning"]["seen"]
    assert "resumes from the last checkpoint" not in ends[0].said
