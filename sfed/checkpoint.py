"""Checkpoints: a round is on disk whole or not at all, and any number of processes goes on from it.

    checkpoints/round-000010/            after 10 finished rounds
    checkpoints/round-000010-partial/    stopped by SIGTERM within the 11th
        clients in shard-*.safetensors   one key per client and buffer: clients/0003/a, ...
        run.json                         rounds, ledger, configuration, sizes of the files

Each process writes its own clients through torch.distributed.checkpoint in safetensors form, so no
tensor is ever pickled. Everything is written and flushed in a temporary folder that is renamed
last; the folder has to be on a file system that all processes see.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open

from sfed.cli import UserError
from sfed.clients import ClientRows
from sfed.config import Config
from sfed.distributed import World, together
from sfed.local import Ledger
from sfed.run import Run
from sfed.sameness import comparable, differences

_FACTS = {"finished_rounds", "bad_rounds", "ledger", "layout_size", "config", "files"}
_NAME = re.compile(r"round-(\d{6})(-partial)?")


@dataclass(frozen=True)
class State:
    """Where a run is, beside what its clients hold."""

    finished_rounds: int
    ledger: Ledger | None
    """Sums of the round in flight where a run was stopped within it."""
    bad_rounds: int
    """Rounds so far in which some client turned non-finite."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint on disk."""

    folder: Path
    facts: dict[str, Any]


def save(run: Run, run_folder: Path, state: State) -> Path:
    """Write a checkpoint and prune old ones. Collective.

    Returns:
        Its folder, which exists only whole.

    Raises:
        UserError: on every process, where the disk refuses on any.
    """
    partial = "-partial" if state.ledger is not None else ""
    folder = run_folder / "checkpoints" / f"round-{state.finished_rounds:06d}{partial}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    with together(run.world, "checkpoint"), _disk_errors(folder):
        if run.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with together(run.world, "checkpoint"), _disk_errors(folder):
        _write_clients(run, temporary)
    with together(run.world, "checkpoint"), _disk_errors(folder):
        if run.world.is_main:
            _write_facts(run, temporary, state)
            _replace(temporary, folder)
            _prune(folder.parent, run.config.output.keep_checkpoints)
    return folder


def _write_clients(run: Run, folder: Path) -> None:
    """Write this process's clients; the file's number is the process's."""
    tensors = {
        f"clients/{client:04d}/{name}": tensor
        for client in run.clients.own
        for name, tensor in _checkpointed(run.clients, client).items()
    }
    # The mapping gives each process files of its own names without any communication.
    writer = dcp.HuggingFaceStorageWriter(
        path=str(folder),
        fqn_to_index_mapping=dict.fromkeys(tensors, run.world.rank + 1),
        save_distributed=True,
    )
    dcp.save(tensors, storage_writer=writer, no_dist=True)


def _checkpointed(clients: ClientRows, client: int) -> dict[str, torch.Tensor]:
    drawn = torch.tensor([clients.examples_drawn[client]], dtype=torch.int64)
    return {**clients.tensors(client), "examples_drawn": drawn}


def _write_facts(run: Run, folder: Path, state: State) -> None:
    files = sorted(folder.glob("*.safetensors"))
    facts = {
        "finished_rounds": state.finished_rounds,
        "bad_rounds": state.bad_rounds,
        "ledger": None if state.ledger is None else state.ledger.tolist(),
        "num_clients": run.num_clients,
        "gamma": run.gamma,
        "layout_size": run.clients.layout.size,
        "config": comparable(run.config, run.num_clients),
        "files": {file.name: file.stat().st_size for file in files},
    }
    with (folder / "run.json").open("w", encoding="utf-8") as file:
        json.dump(facts, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _replace(temporary: Path, folder: Path) -> None:
    """Rename the finished folder into place; an older one of the same name goes aside first."""
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and partial ones that a later one supersedes."""
    ordered = _by_age(folder)
    newest = ordered[-1:]
    whole = [path for path in ordered if not path.name.endswith("-partial")]
    for path in ordered:
        if path not in newest and path not in whole[-keep:]:
            shutil.rmtree(path)


def _by_age(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; a partial one is later than the round it began after."""
    found = [
        (int(match[1]), bool(match[2]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, _, path in sorted(found)]


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn a refusal of the disk into a plain message."""
    try:
        yield
    except (OSError, dcp.CheckpointException) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be written ({' '.join(str(error).split())[:300]}); "
            "make room or set output.dir, then start again: the run goes on from the last whole "
            "checkpoint"
        ) from None


def find(run_folder: Path, resume: str) -> tuple[Found | None, list[str]]:
    """Return the checkpoint to go on from, and a note about each damaged one that was passed over.

    Args:
        run_folder: of the run.
        resume: "auto" for the newest whole one in the run's folder, or a checkpoint folder.

    Raises:
        UserError: where a folder that was asked for is not a whole checkpoint.
    """
    if resume != "auto":
        problem = _problem(Path(resume))
        if problem:
            raise UserError(f"output.resume = {resume!r}: {problem}")
        return Found(Path(resume), _facts(Path(resume))), []
    notes: list[str] = []
    for folder in reversed(_by_age(run_folder / "checkpoints")):
        problem = _problem(folder)
        if not problem:
            return Found(folder, _facts(folder)), notes
        notes.append(f"the checkpoint {folder} is damaged and passed over: {problem}")
    return None, notes


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return facts


def _problem(folder: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint; None where nothing does."""
    try:
        facts = _facts(folder)
        for name, size in facts["files"].items():
            actual = (folder / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
            with safe_open(folder / name, framework="pt") as shard:
                shard.keys()
        if missing := sorted(_FACTS - facts.keys()):
            return f"run.json lacks {', '.join(missing)}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except SafetensorError as error:
        return f"{name} is not readable ({error})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"run.json is not readable ({error})"
    return None


def refuse_other_run(found: Found, config: Config, num_clients: int) -> None:
    """Refuse to go on with settings under which the numbers would have been others.

    Raises:
        UserError: naming each key with both values.
    """
    changed = differences(found.facts["config"], comparable(config, num_clients))
    if changed:
        raise UserError(
            f"the run in {found.folder.parent.parent} was made with other settings:\n  "
            + "\n  ".join(changed)
            + "\nset them back, or choose another output.name, or set output.resume=never to begin "
            "anew"
        )


def load(found: Found, world: World, clients: ClientRows) -> State:
    """Read this process's clients from a checkpoint of any number of processes. Collective.

    Raises:
        UserError: where the files do not hold what the run needs.
    """
    facts = found.facts
    with together(world, "loading the checkpoint"):
        if facts["layout_size"] != clients.layout.size:
            raise UserError(
                f"{found.folder} holds adapters of {facts['layout_size']} numbers and this model "
                f"has {clients.layout.size}; it belongs to another model"
            )
        wanted = {c: _checkpointed(clients, c) for c in clients.own}
        tensors = {
            f"clients/{client:04d}/{name}": tensor
            for client, named in wanted.items()
            for name, tensor in named.items()
        }
        reader = dcp.HuggingFaceStorageReader(str(found.folder))
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        except (dcp.CheckpointException, SafetensorError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1][:300]
            raise UserError(
                f"the checkpoint {found.folder} cannot be read ({reason}); remove this folder to "
                "go on from the one before it"
            ) from None
        for client in clients.own:
            clients.examples_drawn[client] = int(wanted[client]["examples_drawn"])
    ledger = facts["ledger"]
    return State(
        facts["finished_rounds"],
        None if ledger is None else np.asarray(ledger, dtype=np.float64),
        facts["bad_rounds"],
    )
