"""Nothing that a run wrote is deleted without a key that says so, whatever became of its folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfed import train as training
from sfed.config import load as config_load
from sfed.data import splits
from sfed.storage import checkpoint_folder, resume
from sfed.utils import command, files
from sfed.utils.errors import UserError
from tests.support import runs, tiny
from tests.support.processes import ends_of

ROUNDS = 3


def settings(tiny_folder: Path, out: Path, **sections: Any) -> dict[str, Any]:
    federated = {"num_clients": 4, "num_rounds": ROUNDS}
    sections["federated"] = federated | sections.get("federated", {})
    sections["train"] = {"local_steps": 1, "lr": 1e-2} | sections.get("train", {})
    sections["output"] = {"dir": str(out), "name": "run"} | sections.get("output", {})
    return tiny.settings(tiny_folder, **sections)


def train(own: dict[str, Any]) -> Path:
    training.run(config_load.validate(own))
    return Path(own["output"]["dir"]) / own["output"]["name"]


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds of which the last two checkpoints are kept: only read it."""
    return train(settings(tiny_folder, tmp_path_factory.mktemp("done")))


@pytest.fixture(scope="module")
def longer(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two rounds more, undisturbed: only read it."""
    out = tmp_path_factory.mktemp("longer")
    return train(settings(tiny_folder, out, federated={"num_rounds": ROUNDS + 2}))


@pytest.fixture
def folder(done: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(done, tmp_path / "run", symlinks=True))


@pytest.fixture
def go_on(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Start the run in the copy again, for two more rounds."""

    def start(**sections: Any) -> Path:
        federated = {"num_rounds": ROUNDS + 2} | sections.pop("federated", {})
        return train(settings(tiny_folder, tmp_path, federated=federated, **sections))

    return start


def content(folder: Path) -> dict[str, Any]:
    """All that is in a folder, but for who holds it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and name != "lock":
            found[name] = path.read_bytes()
    return found


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / f"round-{ROUNDS:06d}"


def edit_facts(checkpoint: Path, **values: Any) -> None:
    facts = json.loads((checkpoint / "run.json").read_text())
    (checkpoint / "run.json").write_text(json.dumps({**facts, **values}))


def flip(file: Path) -> None:
    spoilt = bytearray(file.read_bytes())
    spoilt[-1] ^= 1
    file.write_bytes(spoilt)


# --- checkpoints that cannot be read --------------------------------------------------------------


def become_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder\n")


def dangle(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("/nowhere/at/all")


def run_in_circles(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.name)


def lose_all(path: Path) -> None:
    for file in path.glob("round-*/*"):
        file.unlink()


def flip_all(path: Path) -> None:
    for file in path.glob("round-*/common.safetensors"):
        flip(file)


def empty(path: Path) -> None:
    for checkpoint in path.iterdir():
        shutil.rmtree(checkpoint)


def write_as_later_version(path: Path) -> None:
    for checkpoint in path.iterdir():
        edit_facts(checkpoint, format=99)


SPOILT = (
    become_a_file,
    dangle,
    run_in_circles,
    lose_all,
    flip_all,
    empty,
    shutil.rmtree,
    write_as_later_version,
)


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_run_of_which_no_checkpoint_can_be_read_is_refused_and_left_as_it_is(
    folder: Path, go_on: Callable[..., Path], spoil: Callable[[Path], None]
) -> None:
    spoil(folder / "checkpoints")
    before = content(folder)
    with pytest.raises(UserError) as raised:
        go_on()
    said = str(raised.value)
    assert "checkpoints" in said or "round-000003: " in said
    assert "output.resume=never" in said or "so nothing was touched" in said
    assert content(folder) == before
    go_on(output={"resume": "never"})
    assert content(folder.with_name("run.old-1")) == before
    assert [event["round"] for event in runs.rounds(folder)] == list(range(ROUNDS + 3))


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, is_meant: Callable[[Path], bool]) -> None:
    """Let the system refuse to read some files."""
    describe, metadata_of = files.describe, checkpoint_folder.metadata_of

    def refuse(path: Path) -> None:
        if is_meant(path):
            raise OSError(number, os.strerror(number))

    def failing_describe(file: Path) -> dict[str, Any]:
        refuse(file)
        return describe(file)

    def failing_facts_of(checkpoint: Path) -> dict[str, Any]:
        refuse(checkpoint / "run.json")
        return metadata_of(checkpoint)

    monkeypatch.setattr(files, "describe", failing_describe)
    monkeypatch.setattr(resume, "metadata_of", failing_facts_of)


ERRORS = [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ENOTCONN, errno.ETIMEDOUT]


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", ["clients-*.safetensors", "run.json"])
def test_what_the_system_does_not_let_be_read_is_no_damage(
    folder: Path,
    go_on: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    number: int,
) -> None:
    """No older checkpoint is taken instead; a minute later the run goes on as if nothing was."""
    before = content(folder)
    with monkeypatch.context() as patch:
        fail_at(patch, number, lambda path: path.match(kind))
        with pytest.raises(UserError, match="no checkpoint of this run can be read") as raised:
            go_on()
    for checkpoint in ("round-000002", "round-000003"):
        [file] = (folder / "checkpoints" / checkpoint).glob(kind)
        assert f"{checkpoint}: {file.name} cannot be read ({os.strerror(number)})" in str(
            raised.value
        )
    with monkeypatch.context() as patch:
        fail_at(patch, number, lambda path: path == file)
        with pytest.raises(
            UserError, match="the newest checkpoint of this run cannot be"
        ) as raised:
            go_on()
    assert f"round-000003: {file.name} cannot be read ({os.strerror(number)})" in str(raised.value)
    assert f"output.resume={folder / 'checkpoints' / 'round-000002'}" in str(raised.value)
    assert content(folder) == before


def test_after_a_minute_of_errors_a_run_goes_on_as_if_nothing_was(
    folder: Path, longer: Path, go_on: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, errno.EIO, lambda _: True)
        with pytest.raises(UserError):
            go_on()
    go_on()
    assert runs.identical(runs.adapters(longer), runs.adapters(folder))


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_record_that_cannot_be_read_is_not_written_over(
    folder: Path, go_on: Callable[..., Path], name: str
) -> None:
    """Where there is no checkpoint, it alone tells what has been done."""
    shutil.rmtree(folder / "checkpoints")
    dangle(folder / name)
    before = content(folder)
    with pytest.raises(UserError):
        go_on()
    assert content(folder) == before


WRONG_FACTS: list[dict[str, Any]] = [
    {"finished_rounds": "3"},
    {"finished_rounds": 2},
    {"bad_rounds": None},
    {"ledger": "none"},
    {"ledger": [1.0]},
    {"layout_size": 1.5},
    {"config": []},
    {"files": ["common.safetensors"]},
    {"files": {"common.safetensors": 7}},
    {"packs": None},
    {"packs": {"clients-0000-000003-0.safetensors": 7}},
    {"packs": {"clients-0000-000003-0.safetensors": [0, 1, 1]}},
    {"packs": {"elsewhere.safetensors": [0]}},
]


@pytest.mark.parametrize("values", WRONG_FACTS, ids=str)
def test_facts_of_a_wrong_type_are_damage(
    folder: Path, longer: Path, go_on: Callable[..., Path], values: dict[str, Any]
) -> None:
    edit_facts(newest(folder), **values)
    found, notes = resume.find(folder, "auto")
    assert found is not None and found.folder.name == "round-000002"
    (note,) = notes
    assert "round-000003 is damaged and passed over: run.json" in note
    with pytest.raises(UserError, match=r"output\.resume = .*run\.json"):
        resume.find(folder, str(newest(folder)))


@pytest.mark.parametrize("text", [b"[]", b"\xff", b"", b"[" * 100_000, b"null", b'{"a": ' + b"1"])
def test_facts_that_are_no_object_are_damage(folder: Path, text: bytes) -> None:
    (newest(folder) / "run.json").write_bytes(text)
    found, notes = resume.find(folder, "auto")
    assert found is not None and found.folder.name == "round-000002"
    assert "run.json" in notes[0]


def test_a_damaged_checkpoint_that_is_passed_over_is_kept_aside(
    folder: Path, longer: Path, go_on: Callable[..., Path]
) -> None:
    [file] = newest(folder).glob("clients-*.safetensors")
    flip(file)
    before = content(folder)
    go_on()
    assert runs.identical(runs.adapters(longer), runs.adapters(folder))
    kept = content(folder / "set-aside-1")
    assert kept.pop("metrics.jsonl") == before["metrics.jsonl"]
    assert kept == {
        name.removeprefix("checkpoints/"): value
        for name, value in before.items()
        if name.startswith("checkpoints/round-000003/")
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "round-000004",
        "round-000005",
    ]


def test_going_on_from_an_older_checkpoint_keeps_the_later_rounds_aside(
    folder: Path, done: Path, go_on: Callable[..., Path]
) -> None:
    """A single checkpoint is kept: it must be the one that was just written."""
    before = content(folder)
    older = str(folder / "checkpoints" / "round-000002")
    go_on(output={"resume": older, "keep_checkpoints": 1}, federated={"num_rounds": 2})
    kept = content(folder / "set-aside-1")
    assert kept["metrics.jsonl"] == before["metrics.jsonl"]
    for name in ("round-000003/run.json", "adapters/client-0000/adapter_model.safetensors"):
        assert kept[name] == before[name if name.startswith("adapters") else f"checkpoints/{name}"]
    assert [event["round"] for event in runs.rounds(folder)] == [0, 1, 2]
    go_on(output={"keep_checkpoints": 1}, federated={"num_rounds": 3})
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["round-000003"]
    assert runs.identical(runs.adapters(done), runs.adapters(folder))


def test_rounds_that_are_reported_after_a_copy_was_made_are_kept_aside(
    folder: Path, done: Path, tmp_path: Path, go_on: Callable[..., Path]
) -> None:
    """The run's own checkpoints are lost, and a copy of an older one is at hand."""
    copy = shutil.copytree(folder / "checkpoints" / "round-000002", tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints")
    before = content(folder)
    go_on(output={"resume": str(copy)}, federated={"num_rounds": 2})
    kept = content(folder / "set-aside-1")
    assert kept.pop("metrics.jsonl") == before["metrics.jsonl"]
    assert kept == {name: value for name, value in before.items() if name.startswith("adapters/")}


def test_a_checkpoint_of_another_run_is_not_gone_on_from_in_this_folder(
    folder: Path, tiny_folder: Path, tmp_path: Path, go_on: Callable[..., Path]
) -> None:
    other = train(settings(tiny_folder, tmp_path, seed=9, output={"name": "other"}))
    before = content(folder)
    with pytest.raises(UserError, match="made with other settings:\n  seed: 0 there, 9 now"):
        go_on(seed=9, output={"resume": str(newest(other))})
    assert content(folder) == before


def test_a_copy_of_a_checkpoint_saves_a_run_whose_own_are_damaged(
    folder: Path, longer: Path, tmp_path: Path, go_on: Callable[..., Path]
) -> None:
    copy = shutil.copytree(folder / "checkpoints" / "round-000002", tmp_path / "copy")
    flip_all(folder / "checkpoints")
    go_on(output={"resume": str(copy)})
    assert runs.identical(runs.adapters(longer), runs.adapters(folder))


# --- folders without a checkpoint -----------------------------------------------------------------


def stop_in_the_first_round(folder: Path, reported: int) -> None:
    """Leave what a run leaves that is killed before its first checkpoint is whole."""
    shutil.rmtree(folder / "adapters")
    shutil.rmtree(folder / "checkpoints")
    lines = (folder / "metrics.jsonl").read_text().splitlines()[: reported + 1]
    events = [json.loads(line) for line in lines]
    for event in events:  # on a slow machine one tells that the first checkpoint was written
        event.pop("time/checkpoint_write_seconds", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))


@pytest.mark.parametrize("reported", [0, 1, 2])
def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(
    folder: Path, longer: Path, go_on: Callable[..., Path], reported: int
) -> None:
    stop_in_the_first_round(folder, reported)
    (folder / "checkpoints" / ".round-000001.tmp").mkdir(parents=True)
    go_on()
    assert runs.identical(runs.adapters(longer), runs.adapters(folder))
    assert [event["round"] for event in runs.rounds(folder)] == list(range(ROUNDS + 3))


def test_a_checkpoint_that_was_reported_and_is_gone_is_missed(
    folder: Path, go_on: Callable[..., Path]
) -> None:
    stop_in_the_first_round(folder, 1)
    metrics = folder / "metrics.jsonl"
    *before, last = metrics.read_text().splitlines(keepends=True)
    told = json.loads(last) | {"time/checkpoint_write_seconds": 0.25}
    metrics.write_text("".join(before) + json.dumps(told) + "\n")
    kept = content(folder)
    with pytest.raises(UserError, match="reports 1 finished rounds and there is no checkpoint"):
        go_on()
    assert content(folder) == kept


def test_reported_rounds_of_other_settings_are_not_written_over(
    folder: Path, go_on: Callable[..., Path]
) -> None:
    stop_in_the_first_round(folder, 1)
    before = content(folder)
    with pytest.raises(UserError, match="reports 1 finished rounds and was made with other") as e:
        go_on(seed=5)
    assert "seed: 0 there, 5 now" in str(e.value)
    assert content(folder) == before


def test_adapters_without_their_run_are_not_written_over(
    folder: Path, go_on: Callable[..., Path]
) -> None:
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").unlink()
    before = content(folder)
    with pytest.raises(UserError, match="no checkpoint"):
        go_on()
    assert content(folder) == before


def test_other_settings_are_refused_with_nothing_touched(
    folder: Path, go_on: Callable[..., Path]
) -> None:
    before = content(folder)
    with pytest.raises(UserError, match="made with other settings"):
        go_on(train={"lr": 0.5})
    assert content(folder) == before


@pytest.mark.parametrize("text", ['{"hidden_size": 4}\n', "key: value\n"])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_folder_of_something_else_is_left_as_it_is(
    tmp_path: Path, go_on: Callable[..., Path], name: str, text: str
) -> None:
    """A model's folder has a config.json too."""
    theirs = tmp_path / "run"
    theirs.mkdir()
    (theirs / name).write_text(text)
    (theirs / "tensorboard").mkdir()
    (theirs / "tensorboard" / "curves").write_text("of theirs")
    before = content(theirs)
    with pytest.raises(UserError, match=f"holds a {name} that is not that of a run"):
        go_on()
    assert content(theirs) == before


def test_what_else_is_in_a_folder_stays(tmp_path: Path, go_on: Callable[..., Path]) -> None:
    theirs = tmp_path / "run"
    (theirs / "tensorboard").mkdir(parents=True)
    (theirs / "checkpoints" / "best").mkdir(parents=True)
    (theirs / "tensorboard" / "events.theirs").write_text("curves")
    (theirs / "checkpoints" / "best" / "weights").write_text("of theirs")
    before = content(theirs)
    go_on(output={"trackers": ["tensorboard"]}, federated={"num_rounds": 1})
    assert before.items() <= content(theirs).items()


# --- lines of metrics.jsonl that are no events ----------------------------------------------------


def test_lines_that_are_no_events_are_named_and_the_file_is_kept(
    folder: Path, longer: Path, go_on: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n[1]\n")
    before = (folder / "metrics.jsonl").read_bytes()
    go_on()
    said = " ".join(capsys.readouterr().out.split())
    assert "metrics.jsonl: 2 lines are no events and are passed over (line 5, line 6)" in said
    assert "kept as metrics.jsonl.damaged-1" in said
    assert (folder / "metrics.jsonl.damaged-1").read_bytes() == before
    assert [event["round"] for event in runs.rounds(folder)] == list(range(ROUNDS + 3))
    assert runs.identical(runs.adapters(longer), runs.adapters(folder))


@pytest.mark.parametrize(
    ("kept", "named"), [(0, "rounds 0, 1, 2, 3"), (3, "round 3")], ids=["all", "the last"]
)
def test_figures_of_rounds_that_are_gone_are_missed(
    folder: Path,
    longer: Path,
    go_on: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    kept: int,
    named: str,
) -> None:
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").unlink()
    if kept:
        (folder / "metrics.jsonl").write_bytes(b"".join(lines[:kept]))
    go_on()
    said = " ".join(capsys.readouterr().out.split())
    assert f"metrics.jsonl: the figures of {named} are missing" in said
    left = [*range(kept), ROUNDS + 1, ROUNDS + 2]
    assert [event["round"] for event in runs.rounds(folder)] == left
    assert runs.identical(runs.adapters(longer), runs.adapters(folder))


# --- two starts at the same moment ----------------------------------------------------------------


@pytest.mark.parametrize("resumes", ["auto", "never"])
@pytest.mark.parametrize("seeds", [(1, 2), (1, 1)], ids=["other", "same"])
def test_the_later_of_two_starts_does_not_touch_the_finished_run_of_the_earlier(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seeds: tuple[int, int],
    resumes: str,
) -> None:
    """The later one has looked before the earlier made the folder, and loads until it is done."""
    one, two = (settings(tiny_folder, tmp_path, seed=s, federated={"num_rounds": 1}) for s in seeds)
    two["output"]["resume"] = resumes
    load, folder = splits.load, tmp_path / "run"
    before: dict[str, Any] = {}

    def load_slowly(*arguments: Any) -> Any:
        monkeypatch.undo()
        (end,) = ends_of(1, runs.train_or_leave, one)
        assert end.code == 0, end.said
        before.update(content(folder))
        return load(*arguments)

    monkeypatch.setattr(splits, "load", load_slowly)
    with pytest.raises(UserError, match=r"another start has written to .*start again"):
        train(two)
    assert before and content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    two["output"]["resume"] = "auto"
    if seeds[0] == seeds[1]:
        train(two)  # now it sees that the run is done
    else:
        with pytest.raises(UserError, match="made with other settings:\n  seed: 1 there, 2 now"):
            train(two)


def test_of_two_starts_at_the_same_moment_one_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    own = settings(tiny_folder, tmp_path, federated={"num_rounds": 1})
    ends = ends_of(2, start_alone, own)
    assert sorted(end.code for end in ends) == [0, command.EXIT_MISTAKE], ends
    winner = next(i for i, end in enumerate(ends) if end.code == 0)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["seed"] == winner
    assert [event["round"] for event in runs.rounds(tmp_path / "run")] == [0, 1]


def start_alone(own: dict[str, Any]) -> None:
    """Each of the processes is a run of its own, with the seed of its number."""
    seed = int(os.environ["RANK"])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    runs.train_or_leave({**own, "seed": seed})


# --- data that changed since --------------------------------------------------------------------


def test_a_run_whose_rows_have_changed_is_refused_and_left_as_it_is(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(tiny_folder / "rows.jsonl", rows)
    own = settings(tiny_folder, tmp_path, data={"train_files": str(rows)})
    more = settings(
        tiny_folder,
        tmp_path,
        data={"train_files": str(rows)},
        federated={"num_rounds": ROUNDS + 1},
    )
    folder = train(own)
    before, lines = content(folder), rows.read_text().splitlines()
    changed = lines[7].replace("7 times", "9 times")
    assert changed != lines[7]
    rows.write_text("\n".join([*lines[:7], changed, *lines[8:], ""]))
    with pytest.raises(UserError, match=r"data: client \d reads other rows.*output\.resume=never"):
        train(more)
    assert content(folder) == before
    rows.write_text("\n".join([*lines, ""]))
    train(more)
    assert newest(folder).with_name(f"round-{ROUNDS + 1:06d}").is_dir()


def test_a_checkpoint_of_a_version_that_did_not_know_its_data_is_resumed(
    folder: Path, go_on: Callable[..., Path], longer: Path
) -> None:
    facts = json.loads((newest(folder) / "run.json").read_text())
    del facts["data_digests"]
    (newest(folder) / "run.json").write_text(json.dumps(facts))
    assert runs.identical(runs.adapters(go_on()), runs.adapters(longer))


def test_a_checkpoint_whose_data_is_no_list_is_damaged(folder: Path) -> None:
    edit_facts(newest(folder), data_digests="no list")
    found, notes = resume.find(folder, "auto")
    assert found is not None and found.folder != newest(folder)
    assert "data_digests is str" in notes[0]
