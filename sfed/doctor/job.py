"""What the checks of one examination share: the processes, and a folder for what they train."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from sfed.distributed import sync
from sfed.distributed.shutdown import StopRequest
from sfed.distributed.world import World
from sfed.storage.run_record import RunRecord
from sfed.utils.errors import UserError

_SECONDS_TO_APPEAR = 10.0
"""For a file to be seen on another machine: NFS tells of new files with a delay."""
_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Folder:
    """A folder of this examination, removed at its end."""

    path: Path
    strangers: tuple[int, ...]
    """Processes that do not see what process 0 wrote there, or whose files it does not see."""
    is_parent_new: bool
    """Whether the folder above it did not exist before."""

    def remove(self) -> None:
        """Remove it, and the folder above where it was made for it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.is_parent_new:
            with suppress(OSError):  # another run has begun there
                self.path.parent.rmdir()


@dataclass
class Job:
    """One examination on this process."""

    world: World
    stop: StopRequest
    folder: Folder
    trained: dict[str, RunRecord] = field(default_factory=dict)
    """Runs by name, so that two checks may look at one."""

    @property
    def is_shared(self) -> bool:
        """Whether all processes see one folder."""
        return not self.folder.strangers


def make_folder(world: World, parent: Path) -> Folder:
    """Make a folder below ``parent`` and find out which processes see it. Collective.

    Raises:
        UserError: on every process, where process 0 cannot make it.
    """
    made, is_new = "", not parent.exists()
    with sync.raise_everywhere(world, "making a folder"):
        if world.is_main:
            made = _make(parent)
    told = sync.gather_json(world, "a folder", [made, is_new])[0]
    path, is_new = Path(told[0]), bool(told[1])
    strangers = _strangers(world, path)
    # The cache of tokens goes with it.
    datasets.config.HF_DATASETS_CACHE = path / "cache" / str(world.rank - world.local_rank)
    return Folder(path, strangers, is_new)


def _make(parent: Path) -> str:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="doctor-", dir=parent.resolve())
    except OSError as error:
        raise UserError(
            f"--dir {parent}: no folder can be made there ({error.strerror}); name one that this "
            "user may write to, on a file system that all nodes share"
        ) from None


def _strangers(world: World, path: Path) -> tuple[int, ...]:
    """The processes that see another folder. Collective."""
    mark = path / f"process-{world.rank}"
    if world.is_main:
        mark.touch()
    sync.barrier(world, "process 0 has written")
    sees = _appears((path / "process-0").is_file)
    if sees:
        try:
            mark.touch()
        except OSError:
            sees = False
    seen = sync.gather_json(world, "the folder is seen", sees)
    is_heard = [True] * world.size
    if world.is_main:
        is_heard = [
            said and _appears((path / f"process-{peer}").is_file) for peer, said in enumerate(seen)
        ]
    told = sync.gather_json(world, "the folder is shared", is_heard)[0]
    return tuple(peer for peer, heard in enumerate(told) if not heard)


def _appears(is_there: Callable[[], bool]) -> bool:
    end = time.monotonic() + _SECONDS_TO_APPEAR
    while not is_there():
        if time.monotonic() > end:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return True
