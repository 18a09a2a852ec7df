"""The folder of a run: its lock, and the files that a start puts in it.

A folder belongs to one run at a time. Nothing is written before all mistakes have had their say.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sfed.config.schema import Config
from sfed.distributed.sync import gather_json, raise_everywhere
from sfed.distributed.world import World
from sfed.files.silos import num_clients_of
from sfed.observability import trackers
from sfed.observability.console import Console
from sfed.observability.metrics import free_name
from sfed.observability.trackers import MetricLogger
from sfed.storage import resume
from sfed.storage.checkpoint import State
from sfed.storage.checkpoint_folder import CheckpointRef, metadata_of
from sfed.storage.previous_run import (
    FINISHED_FILE,
    Sight,
    Stamps,
    began_with,
    mark_finished,
    read_attempt,
    sight_of,
    stamps_of,
)
from sfed.storage.run_record import CONFIG_FILE, METRICS_FILE, PARTITION_FILE, read_rounds
from sfed.utils.errors import CheckpointError, UserError
from sfed.utils.files import replacing
from sfed.utils.redaction import masked

_NAME = "lock"
_SECONDS_TO_FREE = 3.0
"""For a run that was just killed to be gone."""
_SECONDS_BETWEEN_TRIES = 0.2
_TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Held by process 0 of a run; the system frees it when that process ends, however it ends.

    It is a POSIX record lock, which NFS passes on to other machines.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def take(self, folder: Path) -> None:
        """Hold a run folder from now on, instead of any other; where there is none, nothing.

        Raises:
            UserError: naming who holds it, or where the folder cannot be written.
        """
        path = folder / _NAME
        try:
            if not _is_there(folder) or self._holds(path):
                return
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"output.dir: the run folder {folder} cannot be written ({error.strerror})"
            ) from None
        self._lock(file, folder)
        self.free()
        self._file = file
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%c")}
        with suppress(OSError):  # on a full disk it holds without saying for whom
            file.truncate(0)
            # Past the file's own buffer, which would be written once more when it is closed.
            os.write(file.fileno(), json.dumps(holder).encode())

    def free(self) -> None:
        """Release the lock. The file stays: removing it would part two runs that wait for it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _holds(self, path: Path) -> bool:
        if self._file is None or not path.exists():
            return False
        return os.path.samestat(os.fstat(self._file.fileno()), path.stat())

    @staticmethod
    def _lock(file: IO[str], folder: Path) -> None:
        end = time.monotonic() + _SECONDS_TO_FREE
        while problem := _refusal(file):
            if problem.errno not in _TAKEN:
                logging.getLogger(__name__).warning(
                    "the file system of %s does not lock (%s): see to it that only one run uses "
                    "this folder",
                    folder,
                    problem.strerror,
                )
                return
            if time.monotonic() > end:
                file.seek(0)
                holder = _holder(file.read())
                file.close()
                raise UserError(
                    f"output.dir, output.name: another run is using {folder} ({holder}); wait for "
                    "its end, or choose another output.name"
                )
            time.sleep(_SECONDS_BETWEEN_TRIES)


def _is_there(folder: Path) -> bool:
    """Whether a folder exists; a name that is taken and leads nowhere is an error, not absence."""
    try:
        folder.stat()
    except FileNotFoundError:
        if folder.is_symlink():
            raise
        return False
    return True


def _refusal(file: IO[str]) -> OSError | None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


def _holder(said: str) -> str:
    try:
        holder = json.loads(said)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has not said who it is"


class RunFolder:
    """One run's folder; process 0 holds it from the first look to the end."""

    def __init__(self, config: Config, *, one_of_many: bool = False) -> None:
        """Read nothing yet.

        Args:
            config: of the run.
            one_of_many: whether adapters tell a sweep that the run is complete.
        """
        self.path = Path(config.output.dir) / config.run_name
        self._config, self.one_of_many = config, one_of_many
        self._lock = RunLock()
        self._seen: Sight | None = None
        self._files: Stamps | None = None

    def look(self, world: World, console: Console) -> tuple[CheckpointRef | None, int]:
        """Return the checkpoint to resume from, and N. Collective; only the lock is written.

        Process 0 reads every byte of the checkpoint; the others believe it.

        Raises:
            UserError: on every process, where another run holds the folder, or the run in it is
                another one, or has checkpoints of which none can be read.
        """
        with raise_everywhere(world, "looking for checkpoints"), _unreadable(self.path):
            newest, notes = self._newest() if world.is_main else (None, [])
        for note in notes:
            console.warn(note)
        told = gather_json(world, "the newest checkpoint", newest and str(newest))[0]
        with raise_everywhere(world, "comparing with the run so far"), _unreadable(self.path):
            found = CheckpointRef(Path(told), metadata_of(Path(told))) if told else None
            num_clients = self._count_clients(found, world, console)
            if found is not None:
                resume.refuse_other_run(found, self._config, num_clients)
                resume.refuse_fewer_rounds(found, self._config)
            if world.is_main and not self._is_anew:
                self._refuse_to_overwrite(found, num_clients, console)
        return found, num_clients

    def _newest(self) -> tuple[Path | None, list[str]]:
        self._lock.take(self.path)
        self._seen = self._sight()
        with suppress(OSError):  # who reads the file says so
            self._files = stamps_of(self._config)
        if self._is_anew:
            return None, []
        found, notes = resume.find(self.path, self._config.output.resume)
        return None if found is None else found.folder, notes

    def mark_finished(self) -> None:
        """Note that the adapters are whole; on process 0, after ``look``.

        Where that cannot be written, the next start looks at everything.
        """
        if self._files is not None:
            with suppress(OSError):
                mark_finished(self.path, self._config.federated.num_rounds, self._files)

    def _refuse_to_overwrite(
        self, found: CheckpointRef | None, num_clients: int, console: Console
    ) -> None:
        """Refuse where a start would write over what another run, or a lost one, has left.

        A run that was stopped before its first checkpoint has nothing to lose: its rounds are done
        again, with the same numbers.

        Raises:
            UserError: with what is there and the remedy.
        """
        inside = self.path / "checkpoints"
        if found is not None and os.path.realpath(found.folder.parent) == os.path.realpath(inside):
            return
        remedy = "choose another output.name, or set output.resume=never to move this folder aside"
        before = read_attempt(self.path)
        if before.foreign:
            raise UserError(
                f"output.name: {self.path} holds a {before.foreign} that is not that of a run, so "
                f"nothing in it was touched; {remedy}"
            )
        if not before.rounds and not before.had_checkpoint:
            return
        changed = before.differences(self._config, num_clients)
        if changed:
            raise CheckpointError(
                f"the run in {self.path} reports {before.rounds} finished rounds and was made with "
                "other settings:\n  " + "\n  ".join(changed) + f"\nset them back, or {remedy}"
            )
        if found is not None:
            return
        if before.had_checkpoint:
            raise CheckpointError(
                f"no checkpoint of this run can be read, so nothing in {self.path} was touched: "
                f"metrics.jsonl reports {before.rounds} finished rounds and there is no checkpoint "
                f"in {inside}; put the checkpoints back and start again, or {remedy}"
            )
        console.warn(
            f"the run in {self.path} was stopped before its first checkpoint: its "
            f"{before.rounds} reported rounds are done again, with the same numbers"
        )

    def _count_clients(self, found: CheckpointRef | None, world: World, console: Console) -> int:
        """N as configured; else that of the run's first start; else one client per process."""
        stated = num_clients_of(self._config)
        if self._is_anew:
            return stated or world.size
        before: int | None
        if found is None:
            before = began_with(self.path, self._config)
        else:
            before = found.metadata["config"].get("federated.num_clients")
        if stated is not None or before is None or before == world.size:
            return stated or world.size
        if before > world.size:
            console.say(
                f"N stays {before}, one client for each process of the first start; "
                f"{world.size} of them hold{'s' if world.size == 1 else ''} them now "
                "(federated.num_clients fixes N)"
            )
            return before
        if found is None:
            return world.size  # nothing was trained with fewer
        raise CheckpointError(
            f"federated.num_clients is null, so the run in {self.path} has N = {before}, one "
            f"client for each process of its first start; there are {world.size} processes now and "
            f"each holds at least one client: start at most {before}, or choose another output.name"
        )

    def make(
        self,
        facts: Mapping[str, Any],
        held: Sequence[Any],
        found: CheckpointRef | None,
        state: State | None,
        console: Console,
    ) -> MetricLogger:
        """Make the folder, its own files and trackers; what an older run left is moved aside.

        Args:
            facts: what config.json says.
            held: what partition.json says, an entry for each client.
            found: the checkpoint that the run resumes from.
            state: None where the run begins.
            console: speaks on process 0.

        Returns:
            The journal of the run.

        Raises:
            UserError: where another run holds the folder or has written to it since the look, or
                it cannot be written.
        """
        folder = self.path
        try:
            self._claim(console)
            (folder / FINISHED_FILE).unlink(missing_ok=True)
            if found is not None:
                self._set_aside(found, console)
            _write(folder / CONFIG_FILE, json.dumps(masked(facts), indent=2))
            lines = map(json.dumps, masked(held))  # a line for each client
            _write(folder / PARTITION_FILE, '{"clients": [\n' + ",\n".join(lines) + "\n]}")
            told = None if state is None else state.finished_rounds - bool(state.unreported)
            names = self._config.output.trackers
            clients = {one["client"]: one["name"] for one in held if one.get("name")}
            run = trackers.TrackedRun(folder, facts, told, clients)
            return trackers.open_metric_logger(names, run, console.warn)
        except OSError as error:
            raise UserError(
                f"output.dir: the run folder {folder} cannot be written ({error.strerror})"
            ) from None

    def _claim(self, console: Console) -> None:
        """Make the folder and hold it, as it was at the look.

        A folder that was not there at the look could not be held: another start may have made it
        while this one was loading, and may even be done.

        Raises:
            UserError: where another run holds it, or has written to it.
        """
        self._lock.take(self.path)
        self._refuse_changes()
        if self._is_anew and self._seen is not None:
            kept = free_name(self.path.with_name(f"{self.path.name}.old"))
            self.path.rename(kept)
            console.say(f"output.resume=never: the earlier run is kept in {kept}")
            self._seen = None
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.take(self.path)
        if self._seen is None and sight_of(self.path) == Sight():
            return
        self._refuse_changes()

    @property
    def _is_anew(self) -> bool:
        return self._config.output.resume == "never"

    def _sight(self) -> Sight | None:
        """What is seen of the folder now; None where it does not exist.

        One that will be moved aside needs not be readable.
        """
        if not os.path.lexists(self.path):
            return None
        return Sight() if self._is_anew else sight_of(self.path)

    def _refuse_changes(self) -> None:
        if self._sight() != self._seen:
            raise UserError(
                f"output.name: another start has written to {self.path} since this one looked at "
                "it, so this one has changed nothing; start again to resume from what is there, or "
                "choose another output.name"
            )

    def _set_aside(self, found: CheckpointRef, console: Console) -> None:
        """Move what is of a later state than the checkpoint that is gone on from out of the way.

        Otherwise these rounds would be there twice, and what is kept as the newest checkpoints
        would not be of this run, or damaged.
        """
        later = resume.later_than(found, self.path / "checkpoints")
        record, finished = self.path / METRICS_FILE, found.metadata["finished_rounds"]
        takes_other = self._config.output.resume != "auto"
        is_rewound = takes_other and read_rounds(self.path).finished > finished
        # To a sweep, adapters beside more rounds than theirs would pass for the result.
        is_outgrown = self.one_of_many and finished < self._config.federated.num_rounds
        adapters = self.path / "adapters"
        moved = [*later, *([adapters] if is_outgrown or is_rewound else [])]
        moved = [path for path in moved if path.exists()]
        if not moved and not is_rewound:
            return
        aside = free_name(self.path / "set-aside")
        aside.mkdir()
        if (later or is_rewound) and record.exists():
            shutil.copyfile(record, aside / record.name)
        for path in moved:
            path.rename(aside / path.name)
        if later or is_rewound:
            names = ", ".join([*(path.name for path in moved), f"a copy of {record.name}"])
            console.say(f"later than {found.folder.name}, so kept in {aside}: {names}")

    def close(self) -> None:
        """Release the lock."""
        self._lock.free()


@contextmanager
def _unreadable(folder: Path) -> Iterator[None]:
    """Turn a refusal of the system into a plain message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output.dir: the run folder {folder} cannot be read ({error.strerror}: "
            f"{error.filename or folder}), so nothing was touched; mend that and start again, or "
            "choose another output.name. All nodes have to see the folder"
        ) from None


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
