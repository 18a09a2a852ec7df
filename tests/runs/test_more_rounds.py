"""More rounds than were planned: bit for bit under a constant rate, stated under any other."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sfed.clients.optimizer import StackedOptimizer
from sfed.config.load import validate
from sfed.federated import preflight
from sfed.report import tables
from sfed.storage import resume
from sfed.storage.run_record import open_run
from sfed.utils.errors import CheckpointError
from tests.support import runs, tiny
from tests.support.disturbed import Moment, train_with_signal
from tests.support.processes import ends_of

LR, STEPS = 1e-2, 2


def settings(folder: Path, out: Path, name: str, rounds: int, schedule: str) -> dict:
    return tiny.settings(
        folder,
        federated={"num_clients": 2, "num_rounds": rounds},
        train={"local_steps": STEPS, "batch_size": 2, "lr": LR, "schedule": schedule},
        evaluation={"every_rounds": 0},
        output={"dir": str(out), "name": name},
    )


def train(*arguments) -> Path:
    own = settings(*arguments)
    runs.train_settings(own)
    return Path(own["output"]["dir"]) / own["output"]["name"]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of each step of client 0, as the optimizer gets it."""
    found: list[float] = []
    step = StackedOptimizer.step

    def noted(self, rows, lr_C, *rest):
        found.append(float(lr_C[0]))
        step(self, rows, lr_C, *rest)

    monkeypatch.setattr(StackedOptimizer, "step", noted)
    return found


def of(schedule: Callable[[float], float], total: int, rounds: range) -> list[float]:
    """The rates of these 0-based rounds."""
    return [LR * schedule((i + s / STEPS) / total) for i in rounds for s in range(STEPS)]


def test_two_rounds_and_two_more_are_four_bit_for_bit(tiny_folder: Path, tmp_path: Path):
    train(tiny_folder, tmp_path, "grown", 2, "constant")
    grown = train(tiny_folder, tmp_path, "grown", 4, "constant")
    straight = train(tiny_folder, tmp_path, "straight", 4, "constant")
    assert runs.identical(runs.adapters(grown), runs.adapters(straight))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2), ("linear", lambda x: 1 - x)],
)
def test_further_rounds_follow_the_schedule_of_the_new_number(
    tiny_folder: Path, tmp_path: Path, rates: list[float], caplog, name: str, schedule
):
    train(tiny_folder, tmp_path, "run", 2, name)
    assert "learning rate:" not in caplog.text
    folder = train(tiny_folder, tmp_path, "run", 4, name)
    assert rates == pytest.approx(
        of(schedule, 2, range(2)) + of(schedule, 4, range(2, 4)), rel=1e-6
    )
    said = caplog.text
    assert (
        f"learning rate: {name} over 4 rounds from round 3 on, which begins with 0.005; "
        "rounds 1 to 2 over 2" in said
    )
    events = runs.rounds(folder)
    assert [event["train/schedule_rounds"] for event in events] == [None, 2, 2, 4, 4]
    assert events[3]["train/learning_rate"] == pytest.approx(rates[2 * STEPS], rel=1e-6)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["federated"]["num_rounds"] == 4
    parts = [{"from_round": 1, "rounds": 2}, {"from_round": 3, "rounds": 4}]
    assert saved["resolved"]["schedule_rounds"] == parts
    shown = dict(tables.facts_table(open_run(folder)).rows)
    parts = "over 2 rounds from round 1 on, 4 rounds from round 3 on"
    assert shown["learning rate"] == f"{name} {parts}"


def test_the_former_rounds_stay_what_they_were_at_the_next_start_too(
    tiny_folder: Path, tmp_path: Path, rates: list[float]
):
    for rounds in (1, 2, 3):
        folder = train(tiny_folder, tmp_path, "run", rounds, "linear")
    expected = [*of(lambda x: 1 - x, 1, range(1)), *of(lambda x: 1 - x, 2, range(1, 2))]
    assert rates == pytest.approx(expected + of(lambda x: 1 - x, 3, range(2, 3)), rel=1e-6)
    facts = json.loads((folder / "checkpoints" / "round-000003" / "run.json").read_text())
    assert facts["course"] == [[0, 1], [1, 2], [2, 3]]


@pytest.mark.dist
def test_a_round_that_was_stopped_within_keeps_its_number(
    tiny_folder: Path, tmp_path: Path, rates: list[float]
):
    own = settings(tiny_folder, tmp_path, "run", 2, "linear")
    (end,) = ends_of(1, train_with_signal, own, Moment(0, 2, 1), signal.SIGTERM)
    assert "stopped as asked" in end.said, end
    assert (tmp_path / "run" / "checkpoints" / "round-000001-partial").is_dir()
    train(tiny_folder, tmp_path, "run", 4, "linear")
    after = of(lambda x: 1 - x, 4, range(2, 4))
    assert rates == pytest.approx([*of(lambda x: 1 - x, 2, range(1, 2)), *after][-len(rates) :])
    assert len(after) < len(rates) < len(after) + STEPS


def test_fewer_rounds_than_are_finished_are_refused(tiny_folder: Path, tmp_path: Path):
    folder = train(tiny_folder, tmp_path, "run", 2, "constant")
    before = runs.adapters(folder)
    config = validate(settings(tiny_folder, tmp_path, "run", 1, "constant"))
    for refused in (preflight.look_back, lambda c: runs.train_settings(c.model_dump(mode="json"))):
        with pytest.raises(CheckpointError) as mistake:
            refused(config)
        said = str(mistake.value)
        assert said.startswith(f"federated.num_rounds = 1: the run in {folder} has finished 2 ")
        assert "set it to at least 2" in said
    assert runs.identical(runs.adapters(folder), before)
    assert (folder / "finished.json").is_file()


def test_a_round_that_was_stopped_within_is_not_left_out(tiny_folder: Path, tmp_path: Path):
    folder = train(tiny_folder, tmp_path, "run", 2, "constant")
    path = folder / "checkpoints" / "round-000002" / "run.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "ledger": [[0.0]]}))
    config = validate(settings(tiny_folder, tmp_path, "run", 2, "constant"))
    with pytest.raises(CheckpointError, match="begun 3; set it to at least 3"):
        preflight.look_back(config)


def test_a_checkpoint_of_an_earlier_version_says_its_number_in_its_settings(
    tiny_folder: Path, tmp_path: Path, rates: list[float]
):
    folder = train(tiny_folder, tmp_path, "run", 2, "linear")
    for path in folder.glob("checkpoints/*/run.json"):
        facts = json.loads(path.read_text())
        del facts["course"]
        facts["config"]["federated.num_rounds"] = 2
        path.write_text(json.dumps(facts))
    train(tiny_folder, tmp_path, "run", 3, "linear")
    facts = json.loads((folder / "checkpoints" / "round-000003" / "run.json").read_text())
    assert facts["course"] == [[0, 2], [2, 3]]


@pytest.mark.parametrize("course", [[], [[1, 2]], [[0, 0]], [[0, 2], [0, 3]], [[0, 2.0]], "ab", 3])
def test_a_course_that_is_none_is_damage(tmp_path: Path, course: object):
    folder = tmp_path / "checkpoints" / "round-000002"
    folder.mkdir(parents=True)
    facts = {"finished_rounds": 2, "bad_rounds": 0, "layout_size": 1, "config": {}}
    facts |= {"ledger": None, "files": {}, "course": course}
    (folder / "run.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"run\.json: course is no list of rounds"):
        resume.find(tmp_path, "auto")


def test_a_client_whose_file_was_renamed_leaves_no_former_adapter(
    tiny_folder: Path, tmp_path: Path
):
    files = tmp_path / "files"
    files.mkdir()
    rows = (tiny_folder / "rows.jsonl").read_text().splitlines(keepends=True)
    for number, name in enumerate(("a", "b")):
        (files / f"{name}.jsonl").write_text("".join(rows[number * 6 : number * 6 + 6]))
    own = settings(tiny_folder, tmp_path, "renamed", 1, "constant")
    own["data"]["train_files"] = str(files)
    own["partition"] = {"kind": "by_file"}
    runs.train_settings(own)
    (files / "b.jsonl").rename(files / "bb.jsonl")
    own["federated"]["num_rounds"] = 2
    runs.train_settings(own)
    folder = tmp_path / "renamed"
    assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["a", "bb", "global"]
    assert [path.name for path in (folder / "set-aside-1" / "adapters").iterdir()] == ["b"]
