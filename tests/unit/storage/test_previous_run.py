"""What an earlier start has left is looked at before anything heavy is imported."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.federated import preflight, rounds
from sfed.storage.previous_run import FINISHED_FILE
from sfed.utils.errors import CheckpointError, ConfigError
from tests.support import launchers, runs, tiny
from tests.support.processes import ends_of

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture
def finished(trained: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the folder of a finished run."""
    return Path(shutil.copytree(trained(1, federated={"num_rounds": 2}), tmp_path / "run"))


def config_of(folder: Path, **changes: Any) -> Config:
    """The configuration that the run in a folder was started with, and changes."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sections = {key: value for key, value in saved.items() if key not in ("resolved", "versions")}
    sections["output"] |= {"dir": str(folder.parent), "name": folder.name}
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        sections[section] = {**sections[section], key: value}
    return config_load.validate(sections)


def test_a_finished_run_is_complete(finished: Path) -> None:
    lines = preflight.look_back(config_of(finished))
    assert lines is not None
    assert "complete, nothing to do" in lines[0]
    assert str(finished / "adapters") in lines[1]


def without_a_client(folder: Path) -> None:
    shutil.rmtree(folder / "adapters" / "client-0002")


def without_the_mark(folder: Path) -> None:
    (folder / FINISHED_FILE).unlink()


def with_the_mark_of_fewer_rounds(folder: Path) -> None:
    """As where adapters are those of a shorter run, and a longer one was killed before its own."""
    (folder / FINISHED_FILE).write_text('{"rounds": 1}')


def with_damaged_words(folder: Path) -> None:
    (folder / FINISHED_FILE).write_text("[")


def without_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


@pytest.mark.parametrize(
    "harm",
    [
        without_a_client,
        without_the_mark,
        with_the_mark_of_fewer_rounds,
        with_damaged_words,
        without_checkpoints,
    ],
)
def test_in_doubt_a_start_looks_at_everything(finished: Path, harm: Callable[[Path], None]) -> None:
    harm(finished)
    assert preflight.look_back(config_of(finished)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"federated__num_rounds": 3},
        {"evaluation__batch_size": 2},
        {"output__resume": "never"},
    ],
)
def test_another_start_is_not_complete(finished: Path, changes: dict[str, Any]) -> None:
    assert preflight.look_back(config_of(finished, **changes)) is None


def test_changed_settings_are_refused_with_both_values(finished: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train\.lr: .* there, 0\.5 now"):
        preflight.look_back(config_of(finished, train__lr=0.5))


def start_again(finished: Path, **changes: Any) -> str:
    """What the command says of a complete run, and which heavy modules it has loaded at the end."""
    config = finished.parent / "config.json"
    config.write_text(config_of(finished, **changes).model_dump_json())
    code = (
        "import sys; from sfed import train; train.main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    said = launchers.run(sys.executable, "-c", code, str(config), cwd=finished.parent).stdout
    assert "complete, nothing to do" in said
    return said


@pytest.mark.parametrize("has_report", [False, True])
def test_it_takes_no_torch_and_leaves_the_folder_as_it_was(
    finished: Path, has_report: bool
) -> None:
    """With a report that is there, or one that nobody asks for."""
    if has_report:
        (finished / "report.html").touch()
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert start_again(finished, output__report=has_report).endswith("[]\n")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("has_former", [False, True])
def test_a_report_that_a_killed_start_did_not_come_to_is_written(
    finished: Path, has_former: bool
) -> None:
    """Where there is none, or that of fewer rounds: it is older than the mark of a complete run."""
    page = finished / "report.html"
    if has_former:
        page.write_text("After 1 round")
        os.utime(page, ns=(0, (finished / FINISHED_FILE).stat().st_mtime_ns - 1))
    said = start_again(finished)
    assert f"report     {page}" in said and f"sfed report {finished}" not in said
    assert said.endswith("[]\n")
    assert "After 2 rounds" in page.read_text(encoding="utf-8")


def test_while_a_run_goes_on_its_folder_is_not_marked(finished: Path) -> None:
    longer = config_of(finished, federated__num_rounds=3)
    runs.run(1, json.loads(longer.model_dump_json()))
    assert json.loads((finished / FINISHED_FILE).read_text())["rounds"] == 3
    assert preflight.look_back(longer) is not None


def test_a_complete_run_whose_data_have_changed_since_looks_at_them(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Other rows are refused; a file with another time of change is read, and the run complete."""
    rows = Path(shutil.copy(tiny_folder / "rows.jsonl", tmp_path / "rows.jsonl"))
    settings = tiny.settings(
        tiny_folder,
        data={"train_files": str(rows)},
        federated={"num_clients": 2, "num_rounds": 1},
        output={"dir": str(tmp_path), "name": "run"},
    )
    runs.run(1, settings)
    config = config_load.validate(settings)
    assert preflight.look_back(config) is not None
    os.utime(rows, (1, 1))
    assert preflight.look_back(config) is None
    runs.run(1, settings)
    assert preflight.look_back(config) is not None
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join([*lines, lines[0]]), encoding="utf-8")
    assert preflight.look_back(config) is None
    (end,) = ends_of(1, runs.train_or_leave, settings)
    assert end.code == 2 and "reads other rows" in end.said


def train_while_the_data_change(settings: dict[str, Any]) -> None:
    """A row is added after the data were read and before the run is over."""
    train = rounds.train

    def changed(*arguments: Any) -> bool:
        with Path(settings["data"]["train_files"]).open("a", encoding="utf-8") as file:
            file.write('{"prompt": "a", "completion": "b"}\n')
        return train(*arguments)

    rounds.train = changed  # the process ends with the test
    runs.train_settings(settings)


def test_data_that_change_while_a_run_trains_are_not_those_it_was_trained_on(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = Path(shutil.copy(tiny_folder / "rows.jsonl", tmp_path / "rows.jsonl"))
    settings = tiny.settings(
        tiny_folder,
        data={"train_files": str(rows)},
        federated={"num_clients": 2, "num_rounds": 1},
        output={"dir": str(tmp_path), "name": "run"},
    )
    (end,) = ends_of(1, train_while_the_data_change, settings)
    assert end.code == 0, end.said
    assert (tmp_path / "run" / FINISHED_FILE).is_file()
    assert preflight.look_back(config_load.validate(settings)) is None


def test_the_mark_of_an_older_version_names_no_files(finished: Path) -> None:
    (finished / FINISHED_FILE).write_text('{"rounds": 2}')
    assert preflight.look_back(config_of(finished)) is not None


def test_an_output_folder_that_is_none_is_refused_before_anything_is_imported(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    config = config_load.validate({"output": {"dir": str(tmp_path / "file" / "runs")}})
    with pytest.raises(ConfigError, match=r"output\.dir = .*file is not a folder"):
        preflight.check(config)


def test_an_output_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # to root everything is allowed
    config = config_load.validate({"output": {"dir": str(tmp_path / "runs")}})
    with pytest.raises(ConfigError, match=r"output\.dir = .*cannot be written to"):
        preflight.check(config)
