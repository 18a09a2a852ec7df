"""What the record of a run folder says: how far a run came and of which settings; its changes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfed.config.diff import comparable, differences, flatten
from sfed.config.schema import Config
from sfed.files.listing import Split, is_local, list_files
from sfed.files.names import ADAPTER_FILE
from sfed.observability.metrics import CHECKPOINT_WRITE_SECONDS
from sfed.storage.checkpoint_folder import CheckpointRef, by_age, metadata_of
from sfed.storage.resume import refuse_fewer_rounds, refuse_other_run
from sfed.storage.run_record import (
    CONFIG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    ForeignFileError,
    SavedConfig,
    SavedRounds,
    expected_adapters,
    read_config,
    read_rounds,
)
from sfed.utils import json_text
from sfed.utils.errors import ConfigError, UserError
from sfed.utils.files import replacing


@dataclass(frozen=True)
class Sight:
    """What shows that a run folder is as it was: of its record and its checkpoints, not all bytes.

    As a file system that does not lock would let another run write to it unnoticed.
    """

    metrics: tuple[int, int] | None = None
    """Number and size of the file."""
    checkpoints: tuple[tuple[str, int], ...] = ()
    """Name and number of each folder."""
    has_adapters: bool = False


def sight_of(folder: Path) -> Sight:
    """Look at a run folder.

    Raises:
        OSError: where it cannot be read.
    """
    try:
        found = (folder / METRICS_FILE).stat()
        record = (found.st_ino, found.st_size)
    except FileNotFoundError:
        record = None
    ordered = by_age(folder / "checkpoints")
    numbers = tuple((path.name, path.lstat().st_ino) for path in ordered)
    return Sight(record, numbers, (folder / "adapters").is_dir())


@dataclass(frozen=True)
class Attempt:
    """What the record of a run folder says of an earlier start, whatever its checkpoints."""

    rounds: int = 0
    """Finished ones that are reported."""
    config: Config | None = None
    """Configuration of its last start; None where it cannot be read."""
    num_clients: int = 0
    had_checkpoint: bool = False
    """Whether one must have been whole."""
    foreign: str | None = None
    """Name of a file in the place of a run's that is not that of a run."""

    def differences(self, config: Config, num_clients: int) -> list[str]:
        """Name what was other than now, as ``sameness.differences``."""
        if self.config is None:
            return ["config.json cannot be read, so nothing is known of them"]
        before = comparable(self.config, self.num_clients)
        return differences(before, comparable(config, num_clients))


FINISHED_FILE = "finished.json"
"""Says of how many rounds the adapters of a run folder are; gone while anything is written."""


Stamps = dict[str, list[int]]
"""Bytes and time of change of files."""


def mark_finished(folder: Path, rounds: int, files: Stamps) -> None:
    """Note that the adapters of a run folder are whole, and of how many rounds.

    Args:
        folder: of the run.
        rounds: all of them.
        files: of the data, as they were before they were read.

    Raises:
        OSError: where it cannot be written.
    """
    marks = {"rounds": rounds, "files": files}
    with replacing(folder / FINISHED_FILE) as temporary:
        temporary.write_text(json.dumps(marks) + "\n", encoding="utf-8")


def stamps_of(config: Config) -> Stamps:
    """Look at each file of the data that this machine holds.

    Raises:
        OSError: where one cannot be looked at.
    """
    splits: tuple[Split, ...] = ("train", "eval")
    names = [name for split in splits for name in list_files(config, split).files]
    found = {name: Path(name).stat() for name in names if is_local(name)}
    return {name: [one.st_size, one.st_mtime_ns] for name, one in found.items()}


def finished_rounds(folder: Path) -> int | None:
    """Of how many rounds the adapters of a run folder are; None where they are not whole."""
    try:
        rounds = json_text.read(folder / FINISHED_FILE)["rounds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rounds if type(rounds) is int else None


def is_finished(folder: Path, config: Config) -> bool:
    """Whether a start with this configuration would find every round done and every file written.

    False where anything is in doubt: a start then looks at everything.
    """
    try:
        saved, marked = read_config(folder), json_text.read(folder / FINISHED_FILE)
        if (
            saved is None
            or saved.num_clients is None
            or _written(saved.parse()) != _written(config)
        ):
            return False
        if "files" in marked and marked["files"] != stamps_of(config):
            return False  # the rows of a client may be others now
        rounds = marked["rounds"]
        (newest,) = by_age(folder / "checkpoints")[-1:]
        is_done = metadata_of(newest)["finished_rounds"] == read_rounds(folder).finished == rounds
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False
    written = {file.parent.name for file in (folder / "adapters").glob(f"*/{ADAPTER_FILE}")}
    if not is_done or rounds != config.federated.num_rounds or saved.num_clients > len(written):
        return False
    return expected_adapters(folder, saved.num_clients) <= written


def has_report(folder: Path) -> bool:
    """Whether a complete run has a report of its last round: one of fewer is older than the mark.

    A start that was killed after its last round may not have come to it.
    """
    try:
        page, mark = ((folder / name).stat() for name in (REPORT_FILE, FINISHED_FILE))
    except OSError:
        return False
    return page.st_mtime_ns >= mark.st_mtime_ns


def _written(config: Config) -> dict[str, Any]:
    """The settings that what is in a run folder depends on, flat."""
    return {k: v for k, v in flatten(config).items() if not k.startswith("output.")}


def refuse_other_settings(folder: Path, config: Config) -> None:
    """Refuse to resume with settings under which the numbers would have been others.

    Looks at the newest checkpoint's own words only; a start looks at all that it holds.

    Raises:
        CheckpointError: naming each key with both values.
    """
    try:
        newest = by_age(folder / "checkpoints")[-1:]
        found = [CheckpointRef(path, metadata_of(path)) for path in newest]
        before = [ref.metadata["config"]["federated.num_clients"] for ref in found]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for ref, num_clients in zip(found, before, strict=True):
        refuse_other_run(ref, config, config.federated.num_clients or num_clients)
        refuse_fewer_rounds(ref, config)


def read_attempt(folder: Path) -> Attempt:
    """Read config.json and metrics.jsonl of a run folder.

    Raises:
        OSError: where they are there and cannot be read.
    """
    foreign = None
    try:
        saved = read_config(folder)
    except ForeignFileError:
        saved, foreign = None, CONFIG_FILE
    config, num_clients = _settings(saved)
    found = read_rounds(folder)
    if found.is_foreign:
        foreign = foreign or METRICS_FILE
    has_ended = (folder / "adapters").is_dir()
    return Attempt(
        found.finished, config, num_clients, has_ended or _had_checkpoint(found, config), foreign
    )


def _had_checkpoint(found: SavedRounds, config: Config | None) -> bool:
    """Whether a checkpoint must have been whole, by the reported rounds."""
    if any(isinstance(one.get(CHECKPOINT_WRITE_SECONDS), int | float) for one in found.events):
        return True
    if config is not None and config.output.checkpoint_every_seconds is not None:
        return False  # how many rounds there were until the first one follows from nothing here
    # A checkpoint is whole before the next but one begins.
    return found.finished > 2 * (config.output.checkpoint_every_rounds if config else 1)


def _settings(saved: SavedConfig | None) -> tuple[Config | None, int]:
    """The configuration and N; None and 0 where they are not known to this version."""
    if saved is None or saved.num_clients is None:
        return None, 0
    try:
        return saved.parse(), saved.num_clients
    except ConfigError:
        return None, 0


def began_with(folder: Path, config: Config) -> int | None:
    """N of an attempt of this very run that came to no checkpoint.

    Raises:
        OSError: where the file is there and cannot be read.
    """
    try:
        before, num_clients = _settings(read_config(folder))
    except ForeignFileError:
        return None
    if before is None:
        return None
    is_same = comparable(before, num_clients) == comparable(config, num_clients)
    return num_clients if is_same else None
