"""A disk that is full: a plain message, nothing whole is lost, and with room the run goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sfed.lora import tensor_files
from sfed.observability.metrics import MetricsFile, read_events
from sfed.storage.run_folder import RunLock
from sfed.utils import files
from sfed.utils.command import EXIT_MISTAKE
from sfed.utils.errors import UserError
from tests.support import runs, tiny
from tests.support.processes import ends_of

PAGE = 4096


def test_a_file_with_other_bytes_is_damaged(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * 2**20))
    known = files.describe(path)
    assert files.damage(path, known) is None
    path.write_bytes(bytes(3 * 2**20 - 1) + b"\1")
    assert files.damage(path, known) == "file holds other bytes than were written"
    path.write_bytes(b"")
    assert files.damage(path, known) == f"file has 0 bytes instead of {3 * 2**20}"


def test_a_small_file_is_the_old_one_or_the_new_one(tmp_path: Path):
    path = tmp_path / "file.csv"
    for content in (b"old", b"new"):
        with files.replacing(path) as temporary:
            temporary.write_bytes(content)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]
    with suppress(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_bytes(b"newer")
        raise ZeroDivisionError
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("mode", "expected"), [(0o755, 0o644), (0o700, 0o600), (0o777, 0o644)])
def test_tensors_may_be_read_by_whom_their_folder_lets_in(tmp_path: Path, mode: int, expected: int):
    folder = tmp_path / "adapter"
    folder.mkdir()
    folder.chmod(mode)
    tensor_files.write_tensors({"a": torch.zeros(2)}, folder / "a.safetensors", {})
    assert (folder / "a.safetensors").stat().st_mode & 0o777 == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    if os.geteuid() != 0:
        pytest.skip("a small disk is a tmpfs, which only root mounts")
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine mounts no tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_metrics_that_find_no_room_are_a_mistake_and_whole_lines_stay(small_disk: Path):
    file = MetricsFile(small_disk / "metrics.jsonl", None)
    file.write_event({"event": "round", "round": 0})
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * PAGE))
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(No space .* make room"):
        file.write_event({"event": "round", "round": 1, "text": "x" * 2 * PAGE})
    (small_disk / "ballast").unlink()
    file = MetricsFile(small_disk / "metrics.jsonl", 1)
    file.write_event({"event": "round", "round": 1})
    rounds = [event["round"] for event in read_events(small_disk / "metrics.jsonl")]
    assert rounds == [0, 1]


def test_a_folder_on_a_full_disk_is_held_and_freed(small_disk: Path):
    """The lock file has nothing in it then: it does not say who holds the folder."""
    held = RunLock()
    (small_disk / "lock").touch()
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * PAGE))
    held.take(small_disk)
    held.free()
    assert (small_disk / "lock").read_bytes() == b""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages_left", "words"),
    [(0, "run cannot be written (No space"), (15, "round-000003 cannot be written (")],
    ids=["nothing left", "no checkpoint fits"],
)
def test_a_full_disk_is_said_and_with_room_the_run_goes_on(
    tiny_folder: Path, trained: Callable[..., Path], small_disk: Path, pages_left: int, words: str
):
    shape = {"evaluation": {"adapters": ["personal"]}}

    def settings(folder: Path, num_rounds: int) -> dict:
        return tiny.settings(
            tiny_folder,
            output={"dir": str(folder), "name": "run"},
            federated={"num_clients": 4, "num_rounds": num_rounds},
            **shape,
        )

    calm = trained(2, federated={"num_clients": 4, "num_rounds": 4}, **shape)
    folder = runs.run(2, settings(small_disk, 2))
    shutil.rmtree(folder / "adapters")
    whole = sorted(path.name for path in (folder / "checkpoints").iterdir())
    ballast = small_disk / "ballast"
    space = os.statvfs(small_disk)
    ballast.write_bytes(bytes((space.f_bavail - pages_left) * space.f_frsize))
    zero, one = ends_of(2, runs.train_or_leave, settings(small_disk, 4))
    assert zero.code == EXIT_MISTAKE and one.code, zero.said + one.said
    assert words in zero.said and "No space left on device" in zero.said
    assert "Traceback" not in zero.said + one.said
    left = {path.name for path in (folder / "checkpoints").iterdir() if path.name[0] != "."}
    assert left == set(whole)
    ballast.unlink()
    runs.run(2, settings(small_disk, 4))
    assert runs.identical(runs.adapters(calm), runs.adapters(folder))
    assert [event["round"] for event in runs.rounds(folder)] == [0, 1, 2, 3, 4]
