"""What the record of a run folder says: how far a run came and of which settings; its changes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sfed.config.diff import comparable, differences
from sfed.config.schema import Config
from sfed.observability.metrics import Metrics, read_metrics
from sfed.storage.checkpoint import by_age


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
        found = (folder / "metrics.jsonl").stat()
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
    """Of its last start; None where it cannot be read."""
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


def read_attempt(folder: Path) -> Attempt:
    """Read config.json and metrics.jsonl of a run folder.

    Raises:
        OSError: where they are there and cannot be read.
    """
    config, num_clients, foreign = _read_config(folder / "config.json")
    found = read_metrics(folder / "metrics.jsonl")
    rounds = _last_round(found)
    if found.odd_lines and not found.events:
        foreign = foreign or found.path.name
    # A checkpoint is whole before the next but one begins.
    surely = 2 * (config.output.checkpoint_every_rounds if config else 1)
    has_ended = (folder / "adapters").is_dir()
    return Attempt(rounds, config, num_clients, has_ended or rounds > surely, foreign)


def rounds_of(path: Path) -> int:
    """Finished rounds that a metrics file reports.

    Raises:
        OSError: where it is there and cannot be read.
    """
    return _last_round(read_metrics(path))


def _last_round(found: Metrics) -> int:
    return max((event.get("round", 0) for event in found.events), default=0)


def _read_config(path: Path) -> tuple[Config | None, int, str | None]:
    """The configuration of a run's last start, its N, and the file's name where it is no run's.

    Raises:
        OSError: where it is there and cannot be read.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8") or "null")
    except FileNotFoundError:
        if path.is_symlink():
            raise
        return None, 0, None
    except (ValueError, RecursionError):
        return None, 0, path.name
    if saved is None:  # empty, as a machine leaves it that lost its power
        return None, 0, None
    if not isinstance(saved, dict) or not {"resolved", "versions"} <= saved.keys():
        return None, 0, path.name
    try:
        num_clients = int(saved.pop("resolved")["num_clients"])
        del saved["versions"]
        return Config.model_validate_json(json.dumps(saved)), num_clients, None
    except (ValueError, KeyError, TypeError):
        return None, 0, None  # of a version that knew other keys


def began_with(path: Path, config: Config) -> int | None:
    """N of an attempt of this very run that came to no checkpoint.

    Raises:
        OSError: where the file is there and cannot be read.
    """
    before, num_clients, _ = _read_config(path)
    if before is None:
        return None
    is_same = comparable(before, num_clients) == comparable(config, num_clients)
    return num_clients if is_same else None
