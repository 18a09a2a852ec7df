"""The files of a report: stale ones go, those of others stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfed.report import plotting
from sfed.report.files import list_file, write_files
from sfed.report.page import write_report
from sfed.storage.run_record import open_run
from tests.support.run_folders import write_run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_stale_files_go_and_those_of_others_stay(tmp_path: Path) -> None:
    tmp_path = tmp_path / "figures"
    write_files(tmp_path, {"a.png": b"1", "b.png": b"2"})
    (tmp_path / "own.png").write_bytes(b"of a person")
    write_files(tmp_path, {"b.png": b"3", "c.png": b"4"})
    assert names(tmp_path) == {"b.png", "c.png", "own.png"}
    assert (tmp_path / "b.png").read_bytes() == b"3"
    (tmp_path / "b.png").unlink()
    write_files(tmp_path, {})
    assert names(tmp_path) == {"own.png"}


@pytest.mark.parametrize("said", ["", "{", "3", '{"a": 1}', "[1, null]"])
def test_a_damaged_list_removes_nothing(tmp_path: Path, said: str) -> None:
    folder = tmp_path / "figures"
    write_files(folder, {"a.png": b"1"})
    list_file(folder).write_text(said)
    write_files(folder, {})
    assert names(folder) == {"a.png"}


def test_a_list_leads_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "victim").write_text("")
    evil = ["../victim", str(tmp_path / "victim"), "..", ".", "sub", "sub/../../victim"]
    list_file(folder).write_text(json.dumps(evil))
    write_files(folder, {})
    assert (tmp_path / "victim").exists() and (folder / "sub").is_dir()


def test_a_report_has_no_figure_of_what_the_run_no_longer_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plotting, "_png", lambda *_: b"\x89PNG")
    run = write_run(tmp_path / "run", scores=("accuracy",), num_clients=2)
    write_report([open_run(run)], run)
    assert "score-accuracy.png" in names(run / "figures")
    config = json.loads((run / "config.json").read_text())
    config["resolved"]["scores"] = []
    (run / "config.json").write_text(json.dumps(config))
    write_report([open_run(run)], run)
    assert "score-accuracy.png" not in names(run / "figures")
    assert "held-out-loss.png" in names(run / "figures")
