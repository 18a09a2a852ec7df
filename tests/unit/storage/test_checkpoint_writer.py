"""Checkpoints behind the next round: whole or absent, and of the round's end whatever follows."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sfed import train
from sfed.config import load as config_load
from sfed.federated import local
from sfed.federated.context import RoundPlan
from sfed.lora import tensor_files
from sfed.storage import checkpoint_writer
from sfed.storage.checkpoint import State
from sfed.utils import files as utils_files
from sfed.utils.errors import UserError
from tests.support import runs, tiny
from tests.support.deadlines import HANG_SECONDS, scaled
from tests.support.processes import on_processes
from tests.support.selection import full

ROUNDS = 4


def settings(folder: Path, out: Path, name: str = "run", **sections: dict) -> dict:
    federated = {"num_clients": 4, "num_rounds": ROUNDS}
    output = {"dir": str(out), "name": name, "keep_checkpoints": ROUNDS}
    sections = {"federated": {**federated, **sections.pop("federated", {})}, **sections}
    return tiny.settings(folder, output=output, **sections)


def run(own: dict) -> Path:
    train.run(config_load.validate(own))
    return Path(own["output"]["dir"]) / own["output"]["name"]


def whole(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_round_is_written_while_the_next_one_trains(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file waits until the next round has trained; each checkpoint gives the same end."""
    calm = runs.adapters(run(settings(tiny_folder, tmp_path, "calm")))
    trained = [threading.Event() for _ in range(ROUNDS + 1)]
    trained[ROUNDS].set()
    write, train_round = tensor_files.write_described, local.train

    def late(tensors: dict, path: Path) -> dict:
        finished = int(path.parent.name.removeprefix(".round-").removesuffix(".tmp"))
        assert trained[finished].wait(HANG_SECONDS), "training waits for the checkpoint"
        return write(tensors, path)

    def note_the_end(run_: object, plan: RoundPlan, *arguments: object) -> None:
        train_round(run_, plan, *arguments)
        trained[plan.round_index].set()

    monkeypatch.setattr(checkpoint_writer, "write_described", late)
    monkeypatch.setattr(local, "train", note_the_end)
    folder = run(settings(tiny_folder, tmp_path))
    monkeypatch.undo()
    assert whole(folder) == [f"round-{number:06d}" for number in range(1, ROUNDS + 1)]
    assert runs.identical(calm, runs.adapters(folder))
    events = runs.rounds(folder)
    assert all(event["time/checkpoint_seconds"] >= 0 for event in events)
    for number in range(ROUNDS, 0, -1):
        again = settings(tiny_folder, tmp_path, f"from-{number}")
        again["output"]["resume"] = str(folder / "checkpoints" / f"round-{number:06d}")
        assert runs.identical(calm, runs.adapters(run(again))), number


def fail_on_process_1(own: dict, failing_round: int) -> str:
    write = tensor_files.write_described

    def full(tensors: dict, path: Path) -> dict:
        if os.environ["RANK"] == "1" and path.parent.name == f".round-{failing_round:06d}.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(tensors, path)

    checkpoint_writer.write_described = full
    try:
        train.run(config_load.validate(own))
    except UserError as mistake:
        return str(mistake)
    finally:
        checkpoint_writer.write_described = write
    return ""


@pytest.mark.dist
@pytest.mark.parametrize("failing_round", [2, ROUNDS])
def test_a_full_disk_is_every_processes_mistake_and_leaves_no_half_checkpoint(
    tiny_folder: Path, tmp_path: Path, failing_round: int
) -> None:
    calm = runs.adapters(runs.run(2, settings(tiny_folder, tmp_path, "calm")))
    own = settings(tiny_folder, tmp_path)
    messages = on_processes(2, fail_on_process_1, own, failing_round)
    assert messages[0] == messages[1]
    assert f"round-{failing_round:06d} cannot be written" in messages[0]
    assert "No space left" in messages[0]
    folder = tmp_path / "run"
    ready = [name for name in whole(folder) if not name.startswith(".")]
    assert ready == [f"round-{number:06d}" for number in range(1, failing_round)]
    runs.run(2, own)
    assert whole(folder) == [f"round-{number:06d}" for number in range(1, ROUNDS + 1)]
    assert runs.identical(calm, runs.adapters(folder))


def test_the_events_of_its_rounds_are_on_the_disk_before_a_checkpoint_is_whole(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power loses what was not flushed: a record without these rounds."""
    flush, seen = utils_files.sync, []

    def noted(path: Path) -> None:
        flush(path)
        if path.name == "metrics.jsonl":
            reported = {event["round"] for event in runs.rounds(path.parent)}
            seen.append((whole(path.parent), reported))

    monkeypatch.setattr(checkpoint_writer, "sync", noted)
    run(settings(tiny_folder, tmp_path, federated={"num_rounds": 2}))
    assert [[name for name in names if name[0] != "."] for names, _ in seen] == [
        [],
        ["round-000001"],
    ]
    assert all({0, number} <= reported for number, (_, reported) in enumerate(seen, start=1))


def test_what_a_killed_process_left_half_written_is_removed(
    tiny_folder: Path, tmp_path: Path
) -> None:
    own = settings(tiny_folder, tmp_path, federated={"num_rounds": 2})
    folder = run(own)
    left = folder / "checkpoints" / ".round-000007.tmp"
    shutil.copytree(folder / "checkpoints" / "round-000002", left)
    (left / "process-0000.json").write_text("{}")
    run(settings(tiny_folder, tmp_path, federated={"num_rounds": 3}))
    assert whole(folder) == [f"round-{number:06d}" for number in (1, 2, 3)]


def packs_of(checkpoint: Path) -> dict[str, list[int]]:
    facts = json.loads((checkpoint / "run.json").read_text())
    on_disk = {path.name for path in checkpoint.glob("*.safetensors")}
    assert on_disk == facts["files"].keys() == {"common.safetensors", *facts["packs"]}
    return facts["packs"]


@pytest.mark.parametrize(
    ("has_links", "pack_bytes"), [(True, 1), (False, 2**28), full(True, 2**28), full(False, 1)]
)
def test_who_rests_is_written_once_more_and_two_checkpoints_in_a_row_share_no_file(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_links: bool,
    pack_bytes: int,
) -> None:
    """With 1 byte each client has a file of its own, and no file is small."""
    monkeypatch.setattr(checkpoint_writer, "_PACK_BYTES", pack_bytes)
    if not has_links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(utils_files.os, "link", refuse)
    shape = {"num_clients": 6, "clients_per_round": 2, "num_rounds": ROUNDS + 2}
    own = settings(tiny_folder, tmp_path, federated=shape)
    own["output"]["keep_checkpoints"] = ROUNDS + 2
    folder = run(own)
    taken_part: set[int] = set()
    before: list[dict[int, int]] = [{}, {}]
    cohorts: list[set[int]] = [set(), set()]
    for event in runs.rounds(folder)[1:]:
        cohort = {entry["client"] for entry in event["clients"] if "steps" in entry}
        taken_part |= cohort
        checkpoint = folder / "checkpoints" / f"round-{event['round']:06d}"
        packs = packs_of(checkpoint)
        inodes = {
            client: (checkpoint / name).stat().st_ino
            for name, some in packs.items()
            for client in some
        }
        assert inodes.keys() == taken_part
        assert not set(inodes.values()) & set(before[-1].values()), "a damaged file costs both"
        if pack_bytes > 1:
            assert len(packs) <= 3
        elif has_links and event["round"] > 2:
            same = {client for client, inode in inodes.items() if before[-2].get(client) == inode}
            assert same == taken_part - cohort - cohorts[-1]
        before.append(inodes)
        cohorts.append(cohort)
    longer = settings(tiny_folder, tmp_path, federated={**shape, "num_rounds": ROUNDS + 4})
    calm = run(settings(tiny_folder, tmp_path, "calm", federated=longer["federated"]))
    assert runs.identical(runs.adapters(calm), runs.adapters(run(longer)))


def test_files_stay_few_and_what_is_outdated_in_them_is_bounded(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shape = {"num_clients": 16, "clients_per_round": 1, "num_rounds": 24}
    own = settings(tiny_folder, tmp_path, federated=shape)
    own["train"] |= {"local_steps": 1, "batch_size": 1}
    own["evaluation"] = {"every_rounds": 0}
    own["output"]["keep_checkpoints"] = 24
    checkpoints = sorted((run(own) / "checkpoints").iterdir())
    for checkpoint in checkpoints:
        packs = packs_of(checkpoint)
        assert len(packs) <= 5, "log2 of the clients, and one"
        for name, clients in packs.items():
            held = {key.split("/")[1] for key in load_file(checkpoint / name)}
            assert 2 * len(clients) >= len(held), "half of a file is in use"


def test_a_checkpoint_of_a_file_per_client_is_resumed(tiny_folder: Path, tmp_path: Path) -> None:
    """As versions before format 2 wrote it."""
    calm = run(settings(tiny_folder, tmp_path, "calm"))
    folder = run(settings(tiny_folder, tmp_path, federated={"num_rounds": 2}))
    for checkpoint in (folder / "checkpoints").iterdir():
        facts = json.loads((checkpoint / "run.json").read_text())
        for name in facts.pop("packs"):
            tensors = load_file(checkpoint / name)
            (checkpoint / name).unlink()
            del facts["files"][name]
            for client in {key.split("/")[1] for key in tensors}:
                of_client = {k: t for k, t in tensors.items() if k.split("/")[1] == client}
                file = checkpoint / f"client-{client}.safetensors"
                facts["files"][file.name] = tensor_files.write_described(of_client, file)
        del facts["format"]
        (checkpoint / "run.json").write_text(json.dumps(facts))
    assert len(list(checkpoint.glob("client-*"))) == 4
    assert runs.identical(runs.adapters(calm), runs.adapters(run(settings(tiny_folder, tmp_path))))


def test_a_partial_checkpoint_that_is_replaced_shares_no_name_with_what_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = checkpoint_writer.Writer.__new__(checkpoint_writer.Writer)
    writer._world = SimpleNamespace(rank=1)
    kept = {"clients-0001-000010-0.safetensors": frozenset({5})}
    parts = {client: {"b": torch.zeros(4)} for client in (3, 1)}
    monkeypatch.setattr(checkpoint_writer, "_PACK_BYTES", 16)
    files, packs = writer._new_packs(parts, 10, kept)
    assert packs == {
        "clients-0001-000010-1.safetensors": {1},
        "clients-0001-000010-2.safetensors": {3},
    }
    assert [*files["clients-0001-000010-1.safetensors"]] == ["clients/0001/b"]


def test_a_checkpoint_that_vanished_meanwhile_is_not_missed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"num_clients": 6, "clients_per_round": 2}
    calm = runs.adapters(run(settings(tiny_folder, tmp_path, "calm", federated=shape)))
    settle = checkpoint_writer.Writer._settle

    def settle_and_lose(self: checkpoint_writer.Writer) -> None:
        settle(self)
        for path in (tmp_path / "run" / "checkpoints").glob("round-*"):
            shutil.rmtree(path)

    monkeypatch.setattr(checkpoint_writer.Writer, "_settle", settle_and_lose)
    short = settings(tiny_folder, tmp_path, federated={**shape, "num_rounds": ROUNDS - 1})
    monkeypatch.setattr(checkpoint_writer.Writer, "finish", settle)
    folder = run(short)
    monkeypatch.undo()
    assert whole(folder) == [f"round-{ROUNDS - 1:06d}"]
    assert runs.identical(
        calm, runs.adapters(run(settings(tiny_folder, tmp_path, federated=shape)))
    )


@pytest.mark.dist
def test_the_clock_of_process_0_says_for_all_when_a_checkpoint_is_due(
    tiny_folder: Path, tmp_path: Path
) -> None:
    own = settings(tiny_folder, tmp_path, federated={"num_rounds": 6})
    own["output"] |= {"checkpoint_every_seconds": 30.0, "keep_checkpoints": 6}
    on_processes(2, train_by_other_clocks, own)
    assert whole(tmp_path / "run") == ["round-000003", "round-000006"]
    assert runs.identical(
        runs.adapters(tmp_path / "run"),
        runs.adapters(
            runs.run(2, settings(tiny_folder, tmp_path, "x", federated={"num_rounds": 6}))
        ),
    )


def train_by_other_clocks(own: dict) -> None:
    """Since the last checkpoint, process 0 sees 11 seconds a round pass, and process 1 none."""
    rounds, save = [0], checkpoint_writer.Writer.save

    def elapsed(_: checkpoint_writer.Writer) -> float:
        rounds[0] += 1
        return 11.0 * rounds[0] if os.environ["RANK"] == "0" else 0.0

    def save_and_begin_anew(self: checkpoint_writer.Writer, state: State) -> None:
        rounds[0] = 0
        save(self, state)

    checkpoint_writer.Writer._elapsed = elapsed
    checkpoint_writer.Writer.save = save_and_begin_anew
    train.run(config_load.validate(own))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_a_file_is_described_as_it_is_read_and_holds_what_was_given(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {
        "odd": torch.arange(5, dtype=torch.uint8),
        "b/\u00e9": torch.ones(shape).to(dtype),
        "a": torch.arange(6.0).view(2, 3).T,
    }
    assert tensor_files.write_described(tensors, file) == utils_files.describe(file)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_file_that_holds_these_tensors_already_is_left_alone(tmp_path: Path) -> None:
    file, tensors = tmp_path / "x.safetensors", {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    tensor_files.write_tensors(tensors, file, {"format": "pt"})
    first, inode = file.read_bytes(), file.stat().st_ino
    tensor_files.write_tensors(tensors, file, {"format": "pt"})
    assert file.stat().st_ino == inode
    tensor_files.write_tensors({**tensors, "a": torch.zeros(4)}, file, {"format": "pt"})
    assert file.stat().st_ino != inode and len(file.read_bytes()) == len(first)
    assert torch.equal(load_file(file)["a"], torch.zeros(4))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def hang_on_process_1(own: dict) -> str:
    """What ends a run of two processes of which the second never gets its files to the disk."""
    if os.environ["RANK"] == "1":
        checkpoint_writer.write_described = lambda *_: threading.Event().wait()
    try:
        train.run(config_load.validate(own))
    except (UserError, SystemExit) as end:
        return str(end)
    return ""


@pytest.mark.dist
def test_a_disk_that_hangs_ends_the_run_at_the_deadline_and_is_named(
    tiny_folder: Path, tmp_path: Path
) -> None:
    own = settings(tiny_folder, tmp_path, federated={"deadline_seconds": scaled(6.0)})
    messages = on_processes(2, hang_on_process_1, own)
    assert "process 1" in messages[1] and "still being written" in messages[1]
    assert messages[0] and "process 1" in messages[0]
    assert not [name for name in whole(tmp_path / "run") if not name.startswith(".")]


def damaged_ones(folder: Path) -> list[set[str]]:
    """For each file of the newest checkpoint: the kept checkpoints that one flipped bit costs."""
    checkpoints = sorted((folder / "checkpoints").iterdir())
    costs = []
    for file in sorted(checkpoints[-1].glob("*.safetensors")):
        before = file.read_bytes()
        with file.open("r+b") as opened:  # in place, as a disk does it: all names see it
            opened.write(bytes([before[0] ^ 1]))
        known = {path: json.loads((path / "run.json").read_text())["files"] for path in checkpoints}
        costs.append(
            {
                path.name
                for path, files in known.items()
                for name, facts in files.items()
                if utils_files.damage(path / name, facts)
            }
        )
        with file.open("r+b") as opened:
            opened.write(before[:1])
    return costs


@pytest.mark.parametrize("clients_per_pass", [1, 4])
def test_a_damaged_file_costs_one_of_two_checkpoints_whenever_its_client_trained(
    tiny_folder: Path, tmp_path: Path, clients_per_pass: int
) -> None:
    shape = {"clients_per_round": 1, "clients_per_pass": clients_per_pass}

    def go_on(name: str, num_rounds: int) -> Path:
        own = settings(tiny_folder, tmp_path, name, federated={**shape, "num_rounds": num_rounds})
        own["output"]["keep_checkpoints"] = 2
        return run(own)

    for num_rounds in (2, 3, 4, 6, 9):  # the first checkpoints of a start, and later ones
        folder = go_on("parts", num_rounds)
        costs = damaged_ones(folder)
        assert len(costs) > 1
        assert costs == [{f"round-{num_rounds:06d}"}] * len(costs)
    calm = go_on("calm", 9)
    assert runs.identical(runs.adapters(calm), runs.adapters(folder))
    newest = [held_by(f / "checkpoints/round-000009") for f in (calm, folder)]
    assert newest[0].keys() == newest[1].keys()
    assert all(torch.equal(tensor, newest[1][name]) for name, tensor in newest[0].items())


def held_by(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint says of all clients, whichever files it is in."""
    found = load_file(checkpoint / "common.safetensors")
    for name, clients in packs_of(checkpoint).items():
        tensors = load_file(checkpoint / name)
        found |= {k: t for k, t in tensors.items() if int(k.split("/")[1]) in clients}
    return found


def test_a_client_of_which_only_the_examples_drawn_are_its_own_is_kept_over_a_start(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """All factors are averaged and SGD has no moments; what it has drawn says what comes next."""
    shape = {"clients_per_round": 1, "averaged": ["A", "B"]}
    train = {"optimizer": "sgd", "lr": 0.1}
    calm = run(settings(tiny_folder, tmp_path, "calm", federated=shape, train=train))
    for num_rounds in range(1, ROUNDS + 1):
        part = {**shape, "num_rounds": num_rounds}
        folder = run(settings(tiny_folder, tmp_path, federated=part, train=train))
    assert runs.identical(runs.adapters(calm), runs.adapters(folder))
