"""Writing checkpoints behind the next round.

At the end of a round each process takes hold of what has changed of its clients, and goes on. A
thread of it then writes and flushes these clients into a few files of a temporary folder, gives the
other clients' files of an earlier checkpoint a second name there, and leaves a note of them all.
When the notes of all processes are there, process 0's thread completes the folder and renames it:
it exists whole or not at all. One checkpoint is under way at a time.

A file holds many clients, and some of them may have changed since it was written: ``run.json`` says
whose state is to be read from which file. Clients of files that are small, or mostly outdated, are
written again with those that changed, so that files stay few and disk space bounded.

Two checkpoints in a row share no file, so that one damaged file costs one of them: a client that
rests is written a second time, and then has the two files in turn. Only where a single checkpoint
is kept, it takes its files from the one before.

The threads meet through the folder, which has to be on a file system that all processes see. They
leave the launcher's store to the main threads.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError

from sfed.clients.schedule import Course
from sfed.clients.state import Parts
from sfed.clients.store import ClientStore
from sfed.config.diff import comparable
from sfed.config.schema import Config
from sfed.distributed.sync import gather_json, raise_everywhere
from sfed.distributed.world import World
from sfed.lora.tensor_files import write_described
from sfed.storage.checkpoint import State, client_prefix, keyed, pack_file, server_file
from sfed.storage.checkpoint_folder import (
    COMMON,
    FORMAT,
    METADATA_FILE,
    CheckpointRef,
    by_age,
    metadata_of,
    packs_of,
)
from sfed.storage.run_record import METRICS_FILE
from sfed.utils.errors import CheckpointError, MissingProcessError, UserError
from sfed.utils.files import replace_folder, second_name, sync
from sfed.utils.text import one_line

_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_FOR_OTHERS_AFTER_AN_ERROR = 10.0
_PACK_BYTES = 2**28
"""Most of a file of several clients; a client with more has a file of its own."""
_OUTDATED = 0.5
"""A file with less than this share of its bytes in use is written anew."""
Packs = dict[str, frozenset[int]]
"""By file: the clients whose state is to be read from it."""


@dataclass(frozen=True)
class _Job:
    """One checkpoint, as far as this process writes it."""

    folder: Path
    files: dict[str, dict[str, torch.Tensor]]
    """New files by name."""
    kept: tuple[str, ...]
    """Names of files that are the same as in an earlier checkpoint."""
    source: Path | None
    """The earlier checkpoint."""
    packs: Mapping[str, frozenset[int]]
    """Whose state is in which of these files."""
    facts: dict[str, Any]
    started: float

    @property
    def temporary(self) -> Path:
        """Where the folder grows."""
        return self.folder.with_name(f".{self.folder.name}.tmp")


@dataclass(frozen=True)
class _Written:
    """An earlier checkpoint, as far as it is this process's."""

    folder: Path
    packs: Packs
    sizes: Mapping[str, int]
    """Bytes of these files."""
    changed: frozenset[int]
    """Clients that changed between the checkpoint before and this one."""


@dataclass(frozen=True)
class RunIdentity:
    """What every checkpoint says of its run, whatever round it is of."""

    config: Config
    num_clients: int
    gamma: float | Sequence[float]
    """Of all clients, or of each."""
    ranks: Sequence[int]
    """LoRA rank of each client."""
    clients_per_pass: int
    data_digests: Sequence[str]
    """Digest of the data of each client."""
    placement: Sequence[Sequence[int]]
    """The clients of each process."""
    course: Course
    """Of the learning rate."""
    origin: Mapping[str, Any] | None = None
    """What the adapters started from; None where A was drawn."""


class Writer:
    """Writes the checkpoints of one run. A context manager: it leaves nothing under way."""

    def __init__(
        self,
        identity: RunIdentity,
        world: World,
        clients: ClientStore,
        run_folder: Path,
        found: CheckpointRef | None,
    ) -> None:
        """Write nothing yet.

        Args:
            identity: of the run.
            world: the processes.
            clients: of this process.
            run_folder: of the run.
            found: the checkpoint that the run resumes from.
        """
        self._identity, self._world, self._clients = identity, world, clients
        self._parent = run_folder / "checkpoints"
        self._earlier = [] if found is None else [_written_before(found, identity, clients)]
        """The last checkpoints, the newest first: as many as it takes until files are shared."""
        self._distance = 2 if identity.config.output.keep_checkpoints > 1 else 1
        self._under_way: list[Future[float]] = []
        """What this process writes and, on process 0, the completion of the folder."""
        self._is_over = threading.Event()
        self._blocked_seconds = 0.0
        self._latest_began = time.monotonic()
        """When the newest checkpoint began, or this start."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error elsewhere, those who are still alive shall complete what they have begun.
        if self._under_way and not self._is_over.is_set():
            concurrent.futures.wait(self._under_way[:1], self._world.deadline_seconds)
            concurrent.futures.wait(self._under_way, _SECONDS_FOR_OTHERS_AFTER_AN_ERROR)
        self._is_over.set()

    def is_due(self, finished_rounds: int) -> bool:
        """Whether a finished round gets a checkpoint; the last one always does. Collective.

        The clock of process 0 decides for all, since those of the others may be ahead or behind.
        """
        output = self._identity.config.output
        if finished_rounds == self._identity.config.federated.num_rounds:
            return True
        if finished_rounds % output.checkpoint_every_rounds:
            return False
        if output.checkpoint_every_seconds is None:
            return True
        is_time = self._elapsed() >= output.checkpoint_every_seconds
        return bool(gather_json(self._world, "time for a checkpoint", is_time)[0])

    def _elapsed(self) -> float:
        """Seconds since the newest checkpoint began, or since this start did."""
        return time.monotonic() - self._latest_began

    def save(self, state: State) -> None:
        """Begin a checkpoint, after the end of the one before. Collective.

        Raises:
            UserError: on every process, where the one before failed on any.
        """
        started, world = time.monotonic(), self._world
        self._latest_began = started
        world.watch.at(f"the checkpoint {state.name}")
        self._settle()
        folder = self._parent / state.name
        changed_now = self._clients.changed
        source = self._source()
        kept = self._kept_packs(source)
        in_files = frozenset[int]().union(*kept.values())
        common, changed = self._clients.collect_changes(also=self._clients.holders - in_files)
        files, packs = self._new_packs(changed, state.finished_rounds, kept)
        sizes = {name: sum(one.nbytes for one in files[name].values()) for name in packs}
        if source is not None:
            sizes |= {name: source.sizes[name] for name in kept}
        if world.is_main:
            files[COMMON] = keyed("common", common)
        if self._clients.server_state:
            files[server_file(world.rank)] = keyed("server", self._clients.server_state)
        where, facts = None if source is None else source.folder, self._facts(state)
        job = _Job(folder, files, tuple(sorted(kept)), where, kept | packs, facts, time.monotonic())
        with raise_everywhere(world, "checkpoint"), disk_errors(folder):
            if world.is_main:
                _make_room(job.temporary)
        self._under_way = [_in_thread(lambda: self._write(job))]
        if world.is_main:
            self._under_way.append(_in_thread(lambda: self._complete(job)))
        written = _Written(folder, kept | packs, sizes, changed_now)
        self._earlier = [written, *self._earlier][: self._distance]
        self._blocked_seconds += time.monotonic() - started

    def _facts(self, state: State) -> dict[str, Any]:
        """What the checkpoint says of the run and of how far it is."""
        identity = self._identity
        return {
            "format": FORMAT,
            "finished_rounds": state.finished_rounds,
            "bad_rounds": state.bad_rounds,
            "unreported": state.unreported,
            "ledger": None if state.stats is None else state.stats.tolist(),
            "num_clients": identity.num_clients,
            "gamma": identity.gamma,
            "ranks": list(identity.ranks),
            "layout_size": self._clients.layout.size,
            "processes": self._world.size,
            "placement": [list(own) for own in identity.placement],
            "course": [list(part) for part in identity.course.parts],
            "origin": identity.origin,
            "clients_per_pass": identity.clients_per_pass,
            "data_digests": list(identity.data_digests),
            "config": comparable(identity.config, identity.num_clients),
        }

    def _source(self) -> _Written | None:
        """The checkpoint whose files serve a client that rests; None where each is written."""
        if len(self._earlier) < self._distance or not self._earlier[-1].folder.is_dir():
            return None
        return self._earlier[-1]

    def _kept_packs(self, source: _Written | None) -> Packs:
        """The files of an earlier checkpoint that serve once more, and the clients that they serve.

        Not those with little in use beside what is written anyway: the rest of them is written too.
        """
        if source is None:
            return {}
        store = self._clients
        outdated = store.changed.union(*(one.changed for one in self._earlier[:-1]))
        kept = {name: clients - outdated for name, clients in source.packs.items()}
        used = {name: sum(map(store.held_bytes, clients)) for name, clients in kept.items()}
        written = sum(map(store.held_bytes, outdated))
        for name in sorted(kept, key=lambda name: (used[name], name)):
            is_small = used[name] <= min(written, _PACK_BYTES * _OUTDATED)
            if not kept[name] or is_small or used[name] < _OUTDATED * source.sizes[name]:
                written += used[name]
                del kept[name]
        return kept

    def _new_packs(
        self, changed: Mapping[int, Parts], finished_rounds: int, kept: Packs
    ) -> tuple[dict[str, dict[str, torch.Tensor]], Packs]:
        """Put clients into as few files as their size allows: the files; who is in which."""
        files: dict[str, dict[str, torch.Tensor]] = {}
        packs: dict[str, frozenset[int]] = {}
        numbers = itertools.count()
        room = 0
        for client, parts in sorted(changed.items()):
            size = sum(part.nbytes for part in parts.values())
            if size > room:
                names = (pack_file(self._world.rank, finished_rounds, n) for n in numbers)
                name = next(name for name in names if name not in kept)
                files[name], packs[name], room = {}, frozenset(), _PACK_BYTES
            files[name] |= keyed(client_prefix(client), parts)
            packs[name] |= {client}
            room -= size
        return files, packs

    def finish(self) -> None:
        """Wait until the last checkpoint is whole. Collective.

        Raises:
            UserError: on every process, where it failed on any.
        """
        started = time.monotonic()
        self._settle()
        self._blocked_seconds += time.monotonic() - started

    def take_seconds(self) -> tuple[float, float | None]:
        """How long checkpoints held up the run since this was asked last; how long one was written.

        The second is the time until the newest one was whole, None where it is not yet, and, on
        other processes than the first, until its own part was.
        """
        blocked, self._blocked_seconds = self._blocked_seconds, 0.0
        last = self._under_way[-1] if self._under_way else None
        is_whole = last is not None and last.done() and last.exception() is None
        return blocked, last.result() if last is not None and is_whole else None

    def _settle(self) -> None:
        """Wait for what is under way: first for the files of all processes, then for the folder."""
        world = self._world
        try:
            for number in range(2 if self._under_way else 0):
                with raise_everywhere(world, "the checkpoint of the round before"):
                    for future in self._under_way[number : number + 1]:
                        self._result_of(future)
        except UserError:
            self._is_over.set()
            raise
        self._under_way = []

    def _result_of(self, future: Future[float]) -> None:
        seconds, folder = self._world.deadline_seconds, self._earlier[0].folder
        try:
            future.result(seconds)
        except concurrent.futures.TimeoutError:
            raise CheckpointError(
                f"process {self._world.rank}: the checkpoint {folder} is still being "
                f"written after {seconds:g} s (federated.deadline_seconds); set output.dir to a "
                "faster disk, or a longer deadline"
            ) from None

    def _write(self, job: _Job) -> float:
        """Write this process's files and a note of them; in the thread."""
        with disk_errors(job.folder):
            files = {
                name: write_described(tensors, job.temporary / name)
                for name, tensors in job.files.items()
            }
            for name in job.kept:
                assert job.source is not None
                second_name(job.source / name, job.temporary / name)
            if job.source is not None and job.kept:
                known = metadata_of(job.source)["files"]
                files |= {name: known[name] for name in job.kept}
            packs = {name: sorted(clients) for name, clients in job.packs.items()}
            note = job.temporary / _note(self._world.rank)
            unfinished = note.with_suffix(".part")
            text = json.dumps({"files": files, "packs": packs})
            unfinished.write_text(text, encoding="utf-8")
            unfinished.rename(note)
        return time.monotonic() - job.started

    def _complete(self, job: _Job) -> float:
        """Make the folder whole when all have written; in the thread of process 0."""
        with disk_errors(job.folder):
            written = self._notes_of_all(job)
            with (job.temporary / METADATA_FILE).open("w", encoding="utf-8") as file:
                json.dump({**job.facts, **written}, file)
            sync(job.temporary / METADATA_FILE)
            for process in range(self._world.size):
                (job.temporary / _note(process)).unlink()
            sync(job.temporary)
            self._sync_record()
            replace_folder(job.temporary, job.folder)
            _prune(self._parent, self._identity.config.output.keep_checkpoints)
        return time.monotonic() - job.started

    def _sync_record(self) -> None:
        """Flush the events of the rounds, so that no checkpoint is later than they are."""
        record = self._parent.parent / METRICS_FILE
        if record.exists():
            sync(record)
            sync(record.parent)

    def _notes_of_all(self, job: _Job) -> dict[str, Any]:
        """Wait for the notes of all processes; returns the files and packs of all.

        Raises:
            MissingProcessError: naming whose is not there before the deadline, or at the end.
        """
        world = self._world
        end = time.monotonic() + world.deadline_seconds
        expected = {process: _note(process) for process in range(world.size)}
        while missing := set(expected.values()) - {path.name for path in job.temporary.iterdir()}:
            if self._is_over.wait(_SECONDS_BETWEEN_LOOKS) or time.monotonic() > end:
                names = ", ".join(str(p) for p, name in expected.items() if name in missing)
                raise MissingProcessError(
                    f"the checkpoint {job.folder}: process {names} of {world.size} did not write "
                    f"its part within {world.deadline_seconds:g} s (federated.deadline_seconds)"
                )
        written: dict[str, Any] = {"files": {}, "packs": {}}
        for name in expected.values():
            note = json.loads((job.temporary / name).read_text(encoding="utf-8"))
            written = {key: held | note[key] for key, held in written.items()}
        return written


def _written_before(found: CheckpointRef, identity: RunIdentity, clients: ClientStore) -> _Written:
    """The checkpoint that a run resumes from, as far as this process may use its files again.

    With other clients on a process than then, two processes might want one file.
    """
    facts = found.metadata
    packs: Packs = {}
    if facts.get("placement") == [list(own) for own in identity.placement]:
        all_packs = {name: frozenset(some) for name, some in packs_of(facts).items()}
        packs = {name: some for name, some in all_packs.items() if some & clients.lines.keys()}
    sizes = {name: int(facts["files"][name]["bytes"]) for name in packs}
    return _Written(found.folder, packs, sizes, frozenset())


def _in_thread(work: Callable[[], float]) -> Future[float]:
    """Run work in a daemon thread, so that a disk that hangs does not keep the process alive."""
    future: Future[float] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  (the main thread raises it)
            future.set_exception(error)

    threading.Thread(target=do, name="checkpoint", daemon=True).start()
    return future


def _note(process: int) -> str:
    return f"process-{process:04d}.json"


def _make_room(temporary: Path) -> None:
    """Make the folder, and remove what a process that died while writing has left."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for left in temporary.parent.glob(".round-*.tmp"):
        shutil.rmtree(left)
    temporary.mkdir()


def _prune(parent: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and partial ones that a later one supersedes."""
    ordered = by_age(parent)
    newest = ordered[-1:]
    whole = [path for path in ordered if not path.name.endswith("-partial")]
    for path in ordered:
        if path not in newest and path not in whole[-keep:]:
            shutil.rmtree(path)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a refusal of the disk into a plain message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be written ({one_line(error)}); "
            "make room or set output.dir, then start again: the run resumes from the last whole "
            "checkpoint"
        ) from None
