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


def test_an_unknown_tracker_is_named():
    with pytest.raises(UserError, match=r"output\.trackers"):
        config_load.validate({"output": {"trackers": ["mlflow"]}})
