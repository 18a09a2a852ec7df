"""Checkpoints: a round is on disk whole or not at all, and any number of processes goes on from it.

    checkpoints/round-000010/            after 10 finished rounds
    checkpoints/round-000010-partial/    stopped by SIGTERM within the 11th
        common.safetensors               what all clients share: common/a, ...
        client-0003.safetensors          what is client 3's own: clients/0003/b, ...
        run.json                         rounds, ledger, configuration, size and digest of each file

A client that has never taken part has no file. Tensors are in safetensors files: nothing is ever
pickled. ``writer`` writes the folders; here is what they are, and how one is found and read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from sfed.cli import UserError
from sfed.clients import ClientRows
from sfed.config import Config
from sfed.disk import damage
from sfed.distributed import World
from sfed.local import Ledger
from sfed.meetings import together
from sfed.rows import Parts
from sfed.sameness import comparable, differences

FACTS = "run.json"
COMMON = "common.safetensors"
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
    unreported: dict[str, Any] | None = None
    """Where a run was stopped while it evaluated the last finished round: what was measured of that
    round until then. The ledger is of that round, which has no event yet."""

    @property
    def is_within(self) -> bool:
        """Whether a round is in flight."""
        return self.ledger is not None and self.unreported is None

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"round-{self.finished_rounds:06d}{'-partial' if self.is_within else ''}"


@dataclass(frozen=True)
class Found:
    """A whole checkpoint on disk."""

    folder: Path
    facts: dict[str, Any]


def file_of(client: int) -> str:
    """Name of the file that holds what is a client's own."""
    return f"client-{client:04d}.safetensors"


def keyed(prefix: str, parts: Parts) -> Parts:
    """The tensors of a file; with prefixes, names are unique over all files of a checkpoint."""
    return {f"{prefix}/{name}": tensor for name, tensor in parts.items()}


def by_age(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; a partial one is later than the round it began after."""
    found = [
        (int(match[1]), bool(match[2]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, _, path in sorted(found)]


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
        return Found(Path(resume), facts_of(Path(resume))), []
    notes: list[str] = []
    for folder in reversed(by_age(run_folder / "checkpoints")):
        problem = _problem(folder)
        if not problem:
            return Found(folder, facts_of(folder)), notes
        notes.append(f"the checkpoint {folder} is damaged and passed over: {problem}")
    return None, notes


def facts_of(folder: Path) -> dict[str, Any]:
    """What a whole checkpoint says about itself."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def _problem(folder: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint; None where nothing does."""
    try:
        facts = facts_of(folder)
        for name, known in facts["files"].items():
            if wrong := damage(folder / name, known):
                return wrong
        if missing := sorted(_FACTS - facts.keys()):
            return f"{FACTS} lacks {', '.join(missing)}"
        if COMMON not in facts["files"]:
            return f"{FACTS} does not name {COMMON}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FACTS} is not readable ({error})"
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


def clients_per_pass(found: Found | None, world: World) -> int | None:
    """How many clients shared a pass when a checkpoint was written by equally many processes."""
    if found is None or found.facts.get("processes") != world.size:
        return None
    return int(found.facts["clients_per_pass"])


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
        try:
            _restore(found, clients)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"the checkpoint {found.folder} cannot be read ({reason}); remove this folder to "
                "go on from the one before it"
            ) from None
    ledger = facts["ledger"]
    return State(
        facts["finished_rounds"],
        None if ledger is None else np.asarray(ledger, dtype=np.float64),
        facts["bad_rounds"],
        facts.get("unreported"),
    )


def _restore(found: Found, clients: ClientRows) -> None:
    common = _read(found.folder / COMMON, "common/", clients)
    if missing := {factor.lower() for factor in clients.layout.factors} - common.keys():
        raise ValueError(f"{COMMON} lacks {', '.join(sorted(missing))}")
    held: dict[int, Parts] = {}
    for client in clients.own:
        if file_of(client) in found.facts["files"]:
            path = found.folder / file_of(client)
            held[client] = _read(path, f"clients/{client:04d}/", clients)
    clients.restore(common, held)


def _read(path: Path, prefix: str, clients: ClientRows) -> Parts:
    """Read one file.

    Raises:
        ValueError: where a tensor is none that the run knows.
    """
    parts: Parts = {}
    for name, tensor in load_file(path).items():
        short = name.removeprefix(prefix)
        if tensor.shape != (clients.widths.get(short),):
            raise ValueError(f"{path.name}: {name} of shape {tuple(tensor.shape)} has no place")
        parts[short] = tensor
    return parts
