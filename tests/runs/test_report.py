"""The end of ``sfed train``: the sentence, and the report that it writes by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sfed import train
from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.federated import preflight
from sfed.federated.session import SessionEnd
from sfed.observability.console import Console
from sfed.report import page
from sfed.storage import previous_run
from sfed.storage.run_record import open_run
from tests.support import runs, tiny
from tests.support.processes import on_processes
from tests.support.run_folders import write_run


def command(path: Path) -> None:
    train.main([str(path)])


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_writes_its_report_and_says_what_came_out(tiny_folder: Path, tmp_path: Path) -> None:
    settings = tiny.settings(
        tiny_folder,
        output={"dir": str(tmp_path), "name": "run"},
        federated={"num_rounds": 1},
    )
    (tmp_path / "config.json").write_text(json.dumps(settings))
    on_processes(2, command, tmp_path / "config.json")
    run = tmp_path / "run"
    html = (run / "report.html").read_text(encoding="utf-8")
    saved = json.loads((run / "config.json").read_text())
    (event,) = [one for one in runs.rounds(run) if one["round"] == 1]
    sizes = runs.adapters(run)["client-0000"].items()
    own = {"B": sum(tensor.numel() for name, tensor in sizes if ".lora_B." in name)}
    assert saved["resolved"]["own_parameters"] == own
    mean = event["eval/personal_loss_unweighted"]
    assert re.search(rf'<p class="lead">After 1 round \d of 4 clients .* to {mean:.4f} nats', html)
    assert (run / "figures" / "held-out-loss.png").is_file()
    config = config_load.validate(settings)
    assert f"report     {run / 'report.html'}" in (preflight.look_back(config) or [])


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_that_diverged_in_its_last_round_shows_no_earlier_one(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[dict[str, Any], dict[str, Any]]] = []
    monkeypatch.setattr(
        Console, "closing_table", lambda _self, before, after, _names: shown.append((before, after))
    )
    settings = tiny.settings(
        tiny_folder,
        output={"dir": str(tmp_path), "name": "run"},
        federated={"num_rounds": 1},
        train={"optimizer": "sgd", "lr": 1e25, "local_steps": 1, "max_grad_norm": None},
    )
    runs.train_settings(settings)
    (before, after) = runs.rounds(tmp_path / "run")
    assert (after["eval/loss"], after["eval/clients"]) == (None, 4)
    assert shown == [(before, after)]
    assert open_run(tmp_path / "run").scores == {}


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ends at once: its folder is there already."""
    folder = write_run(tmp_path / "runs" / "run", num_clients=2)
    end = SessionEnd(folder, is_finished=True)
    monkeypatch.setattr(train, "run", lambda config: end)
    monkeypatch.setattr(preflight, "check", lambda config: "")
    monkeypatch.setattr(previous_run, "refuse_other_settings", lambda *_: None)
    return folder


def start(folder: Path, *words: str) -> None:
    train.main(["data.task=demo", f"output.dir={folder.parent}", "output.name=run", *words])


def test_a_key_turns_it_off(done: Path) -> None:
    start(done, "output.report=false")
    assert not (done / "report.html").exists()
    start(done)
    assert (done / "report.html").is_file()


def test_a_run_stays_finished_where_its_report_fails(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(page, "write_report", fail)
    start(done)
    told = "".join(capsys.readouterr())
    (line,) = [line for line in told.splitlines() if "report" in line]
    assert "the report could not be written (RuntimeError: no room at all)" in line
    assert f"sfed report {done}" in line
    assert not (done / "report.html").exists()


def test_a_run_that_was_stopped_has_no_report(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", lambda config: SessionEnd(done, was_asked_here=True))
    start(done)
    assert not (done / "report.html").exists()


def test_other_processes_write_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    start(done)
    assert not (done / "report.html").exists()


def test_the_key_is_on_by_default() -> None:
    assert Config().output.report
