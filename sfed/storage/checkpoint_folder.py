"""What a checkpoint's folder is called and says about itself. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfed.utils import json_text

METADATA_FILE = "run.json"
COMMON = "common.safetensors"
FORMAT = 2
"""Format of a checkpoint: several clients share a file, and ``packs`` says which. In format 1, that
of a checkpoint without a number, each client has a file of its own."""
FORMATS = (1, FORMAT)
"""Those that are read."""
_CLIENT_FILE = re.compile(r"client-(\d{4,})\.safetensors")
_NAME = re.compile(r"round-(\d{6})(-partial)?")


@dataclass(frozen=True)
class CheckpointRef:
    """A whole checkpoint on disk."""

    folder: Path
    metadata: dict[str, Any]
    """What ``run.json`` says."""


def folder_name(finished_rounds: int, *, is_within: bool) -> str:
    """Name of the folder after so many rounds, or within the one that follows."""
    return f"round-{finished_rounds:06d}{'-partial' if is_within else ''}"


def by_age(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; a partial one is later than the round it began after.

    Raises:
        OSError: where the folder is there and cannot be read, or is a link that leads nowhere.
    """
    try:
        found = [(age, path) for path in folder.iterdir() if (age := age_of_name(path.name))]
    except FileNotFoundError:
        if folder.is_symlink():
            raise
        return []
    return [path for _, path in sorted(found)]


def age_of_name(name: str) -> tuple[int, bool] | None:
    """Finished rounds, and whether a further one is in flight; None of another name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), bool(match[2])) if match else None


def metadata_of(folder: Path) -> dict[str, Any]:
    """What a whole checkpoint says about itself.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is not JSON.
    """
    facts: dict[str, Any] = json_text.read(folder / METADATA_FILE)
    return facts


def packs_of(facts: Mapping[str, Any]) -> dict[str, list[int]]:
    """The files of clients and whose state is to be read from each, of any format."""
    if facts.get("format", 1) != 1:
        return {str(name): list(clients) for name, clients in facts["packs"].items()}
    named = ((name, _CLIENT_FILE.fullmatch(name)) for name in facts["files"])
    return {name: [int(match[1])] for name, match in named if match}


def age_of(facts: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the age as ``age_of_name`` does, from what ``run.json`` says."""
    is_within = facts["ledger"] is not None and facts.get("unreported") is None
    return facts["finished_rounds"], is_within
