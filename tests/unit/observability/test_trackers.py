"""Tests of TensorBoard and W&B beside the metrics file."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sfed.config import load as config_load
from sfed.federated import preflight
from sfed.observability import metrics, trackers
from sfed.observability.trackers import (
    MOST_CLIENTS,
    TrackedRun,
    open_metric_logger,
    scalars_of,
    start_all,
)
from sfed.utils.errors import UserError
from tests.support import runs, tiny

NO_WARNING = pytest.fail
DEMO = {"data": {"task": "demo"}}
EVENT = {
    "event": "round",
    "round": 3,
    "train/loss": 0.5,
    "eval/loss": None,
    "comm/uploaded_bytes": 7,
    "clients": [
        {"client": client, "examples": 9, "train_loss": 0.25, "excluded": False, "samples": ["x"]}
        for client in range(MOST_CLIENTS + 4)
    ],
}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of its own files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    tags = shown.Tags()["scalars"]
    return {tag: [(e.step, pytest.approx(e.value)) for e in shown.Scalars(tag)] for tag in tags}


class FakeWandb(types.ModuleType):
    """What is used of wandb, and what it was told."""

    def __init__(self, *, mode: str = "online", has_key: bool = True) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.finished = 0
        self.failing: set[str] = set()
        settings = types.SimpleNamespace(mode=mode, project=None)
        self.setup = lambda: types.SimpleNamespace(settings=settings)
        self.login = lambda prompt: has_key and not prompt
        self.Settings = lambda **given: given

    def init(self, **given: Any) -> FakeWandb:
        if "init" in self.failing:
            raise ConnectionError("no route to host")
        self.started.append(given)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, numbers: dict[str, float]) -> None:
        if "log" in self.failing:
            raise ConnectionError("connection reset")
        self.logged.append(numbers)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_tracker_gets_numbers_only_and_of_few_clients():
    found = scalars_of(EVENT)
    assert found["train/loss"] == 0.5 and found["comm/uploaded_bytes"] == 7.0
    assert "eval/loss" not in found and "round" not in found
    of_clients = [name for name in found if name.startswith("clients/")]
    assert of_clients == [f"clients/{client:04d}/train_loss" for client in range(MOST_CLIENTS)]


def test_tensorboard_shows_the_rounds_that_the_metrics_file_holds(tiny_folder, tmp_path):
    settings = tiny.settings(tiny_folder, output={"dir": str(tmp_path), "name": "run"})
    settings["output"]["trackers"] = ["tensorboard"]
    settings["federated"]["num_rounds"] = 2
    folder = runs.run(2, settings)
    settings["federated"]["num_rounds"] = 3
    runs.run(1, settings)
    events = runs.rounds(folder)
    assert [event["round"] for event in events] == [0, 1, 2, 3]
    shown = curves(folder)
    for name in (metrics.EVAL_LOSS, metrics.TRAIN_LOSS, "clients/0003/personal_loss"):
        expected = [
            (event["round"], numbers[name])
            for event in events
            if name in (numbers := scalars_of(event))
        ]
        assert len(expected) >= 3
        assert shown[name] == expected, name
    # One process writes: a second writer would have left a file of its own for each start.
    assert len(list((folder / "tensorboard").iterdir())) == 2


def test_rounds_of_a_lost_attempt_are_not_shown_twice(tmp_path):
    for finished, rounds in ((None, (1, 2, 3)), (1, (2, 3)), (None, (1,))):
        (tracker,) = start_all(
            ["tensorboard"], TrackedRun(tmp_path, {}, finished), NO_WARNING
        ).values()
        for number in rounds:
            tracker.log({"x/loss": 10.0 * len(rounds) + number}, number)
        tracker.finish()
        if finished is not None:
            assert curves(tmp_path)["x/loss"] == [(1, 31.0), (2, 22.0), (3, 23.0)]
    assert curves(tmp_path) == {"x/loss": [(1, 11.0)]}


def test_wandb_gets_the_rounds_and_goes_on_in_the_same_run(wandb, tmp_path):
    folder = tmp_path / "name-of-run"
    folder.mkdir()
    for finished in (None, 2, None):
        config = {"seed": 1, "model": {"name": "https://ann:secret@host"}}
        (tracker,) = start_all(["wandb"], TrackedRun(folder, config, finished), NO_WARNING).values()
        tracker.log({"x/loss": 1.0}, 3)
        tracker.finish()
    first, second, third = wandb.started
    assert first["id"] == second["id"] != third["id"]
    assert first["name"] == "name-of-run" and first["resume"] == "allow"
    assert first["config"] == {"seed": 1, "model": {"name": "https://***@host"}}
    assert first["settings"]["disable_code"] and first["settings"]["console"] == "off"
    assert wandb.logged[0] == {"x/loss": 1.0, "round": 3}
    assert wandb.finished == 3


def test_wandb_without_a_key_is_a_mistake_unless_it_is_offline(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(has_key=False))
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        start_all(["wandb"], TrackedRun(tmp_path, {}), NO_WARNING)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(has_key=False, mode="offline"))
    assert list(start_all(["wandb"], TrackedRun(tmp_path, {}), NO_WARNING)) == ["wandb"]


@pytest.mark.parametrize("failing", ["init", "log"])
def test_a_tracker_that_fails_is_named_once_and_the_record_is_whole(wandb, tmp_path, failing):
    wandb.failing = {failing}
    said: list[str] = []
    journal = open_metric_logger(["wandb", "tensorboard"], TrackedRun(tmp_path, {}), said.append)
    for number in (1, 2, 3):
        journal.write_event({"event": "round", "round": number, "x/loss": 1.0, "clients": []})
    journal.close()
    (line,) = said
    assert "wandb fails" in line and "ConnectionError" in line
    assert [event["round"] for event in metrics.read_events(tmp_path / "metrics.jsonl")] == [
        1,
        2,
        3,
    ]
    assert [step for step, _ in curves(tmp_path)["x/loss"]] == [1, 2, 3]


def test_a_tracker_that_is_not_installed_is_a_mistake_before_anything_else(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = config_load.validate({"output": {"trackers": ["tensorboard", "wandb"]}})
    with pytest.raises(UserError) as raised:
        preflight.check(config)
    for name in ("tensorboard", "wandb"):
        assert f"pip install 'sfed[{name}]'" in str(raised.value)


def test_mlflow_says_which_packages_it_lacks_and_refuses_its_closed_store(monkeypatch):
    found = {"mlflow"}
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name in found or None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (line,) = trackers.mistakes(["mlflow"])
    assert "the packages sqlalchemy and alembic are not installed" in line
    assert "pip install 'sfed[mlflow]'" in line
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:pw@host")
    assert trackers.mistakes(["mlflow"]) == [], "a server needs no database here"
    found |= {"sqlalchemy", "alembic"}
    for uri in ("file:///tmp/x", "./mlruns", "/data/mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        (line,) = trackers.mistakes(["mlflow"])
        assert f"{uri!r} is a folder" in line and "sqlite:///PATH" in line
    for uri in ("sqlite:///x.db", "databricks", "postgresql://host/db", ""):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert trackers.mistakes(["mlflow"]) == [], uri


def test_mlflow_keeps_one_run_over_all_starts(monkeypatch, tmp_path):
    """With the library itself; it is no part of the extra test."""
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason="the extra mlflow is not installed")
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    url = "https://ann:secret@host"
    config = {"model": {"name": url}, "federated": {"num_rounds": 3}, "data": {"files": ["a"]}}
    for finished, last in ((None, 2), (1, 3), (None, 3)):
        (tracker,) = start_all(
            ["mlflow"], TrackedRun(folder, config, finished), NO_WARNING
        ).values()
        tracker.log({"x/odd+name": float(last)}, last)
        tracker.finish()
        if last == 2:
            ends = [(folder / "mlflow-id").read_text().strip()]
    ends.append((folder / "mlflow-id").read_text().strip())
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    first, second = (client.get_run(one) for one in ends)
    assert ends[0] != ends[1] and first.info.run_name == second.info.run_name == "run"
    history = client.get_metric_history(ends[0], "x/odd_name")
    assert [(one.step, one.value) for one in history] == [(2, 2.0), (3, 3.0)]
    assert first.info.status == second.info.status == "FINISHED"
    assert first.data.params == {
        "model.name": "https://***@host",
        "federated.num_rounds": "3",
        "data.files": '["a"]',
    }
    assert not (tmp_path / "mlruns").exists()


def test_an_mlflow_run_that_was_stopped_is_killed_in_its_words():
    tracker = trackers.MLflow.__new__(trackers.MLflow)
    told = []
    client = types.SimpleNamespace(set_terminated=lambda run, status: told.append(status))
    tracker._client, tracker._id, tracker._rounds = client, "1", 3
    for tracker._last in (2, 3):
        tracker.finish()
    assert told == ["KILLED", "FINISHED"]


def test_the_prometheus_file_holds_the_last_round_with_names(tmp_path):
    folder, path = tmp_path / "run", tmp_path / "sfed.prom"
    folder.mkdir()
    config = {"output": {"prometheus_file": str(path)}, "federated": {"num_rounds": 5}}
    run = TrackedRun(folder, config, None, {1: 'st "mary"\n\\'})
    journal = open_metric_logger([], run, NO_WARNING)
    journal.write_event({**EVENT, "round": 2, "gone/now": 1.0})
    journal.write_event(EVENT)
    journal.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 'sfed_finished_rounds{run="run"} 3.0' in lines
    assert 'sfed_planned_rounds{run="run"} 5.0' in lines
    assert 'sfed_train_loss{run="run"} 0.5' in lines
    name = r"st \"mary\"\n\\"
    assert f'sfed_client_train_loss{{run="run",client="1",name="{name}"}} 0.25' in lines
    assert "# TYPE sfed_client_train_loss gauge" in lines
    assert not any("gone" in line or "eval_loss" in line for line in lines)
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["sfed.prom"]


def test_a_prometheus_file_that_cannot_be_written_is_named_and_the_run_goes_on(tmp_path):
    config = {"output": {"prometheus_file": str(tmp_path / "gone" / "x.prom")}}
    said: list[str] = []
    journal = open_metric_logger([], TrackedRun(tmp_path, config), said.append)
    for number in (1, 2):
        journal.write_event({**EVENT, "round": number})
    journal.close()
    (line,) = said
    assert line.startswith("output.prometheus_file fails and is left out")
    assert len(list(metrics.read_events(tmp_path / "metrics.jsonl"))) == 2


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x.txt", r"output\.prometheus_file"),
        ("/nowhere/x.prom", "/nowhere is no folder that can be written to; make it"),
    ],
)
def test_a_prometheus_file_that_no_collector_would_read_is_refused(path, words):
    with pytest.raises(UserError, match=words):
        preflight.check(config_load.validate({"output": {"prometheus_file": path}, **DEMO}))


def test_an_unknown_tracker_is_named():
    with pytest.raises(UserError, match=r"output\.trackers"):
        config_load.validate({"output": {"trackers": ["aim"]}})
