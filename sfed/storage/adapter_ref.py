"""Which folders hold the adapters that a person names. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfed.files.names import ADAPTER_FILE, CLIENT_FILE, GLOBAL, adapter_folder
from sfed.storage.run_record import METRICS_FILE
from sfed.utils import json_text
from sfed.utils.errors import CheckpointError, UserError
from sfed.utils.text import printable, some_of


@dataclass(frozen=True)
class AdapterRef:
    """A folder with an adapter."""

    folder: Path
    title: str
    """Its name, as its client was called; else that of the folder."""
    names: frozenset[str]
    """All by which a person may name it."""

    @staticmethod
    def of(folder: Path) -> AdapterRef:
        """The adapter of a folder."""
        facts = read_object(folder / CLIENT_FILE)
        names, name = {folder.name}, facts.get("name")
        if isinstance(name, str) and name:
            names.add(name)
        if isinstance(number := facts.get("client"), int):
            names |= {str(number), adapter_folder(number)}
        elif folder.name.startswith("client-") and folder.name[7:].isdecimal():
            names.add(str(int(folder.name[7:])))
        title = name if isinstance(name, str) and name else folder.name
        return AdapterRef(folder, title, frozenset(names))


def find_adapters(path: Path) -> list[AdapterRef]:
    """The adapters behind a path, in the order of their folders' names, the global one last.

    Args:
        path: an adapter's folder, a run folder, or a folder of adapters as an export writes it.

    Raises:
        UserError: where there is none, with what to do.
    """
    if (path / ADAPTER_FILE).is_file():
        return [AdapterRef.of(path)]
    if not path.is_dir():
        raise UserError(f"{str(path)!r} does not exist; name a run folder or an adapter's folder")
    is_run = (path / METRICS_FILE).is_file()
    inside = path / "adapters" if is_run else path
    folders = sorted(file.parent for file in inside.glob(f"*/{ADAPTER_FILE}"))
    if folders:
        ordered = sorted(folders, key=lambda folder: folder.name == GLOBAL)
        return [AdapterRef.of(folder) for folder in ordered]
    if is_run:
        raise UserError(
            f"{path}: the run has written no adapters yet, since it is not finished; sfed export "
            f"{path} writes those of its newest checkpoint"
        )
    raise UserError(
        f"{str(path)!r} is neither a run folder nor a folder of an adapter ({ADAPTER_FILE})"
    )


def choose(found: Sequence[AdapterRef], names: Sequence[str]) -> list[AdapterRef]:
    """The adapters of these names, in the order asked for; all of them where no name is given.

    Raises:
        UserError: where there is none of a name, with those that there are.
    """
    chosen: dict[Path, AdapterRef] = {}
    for name in names:
        matching = [one for one in found if name in one.names]
        if not matching:
            raise UserError(
                f"--client {printable(name)}: there is no such adapter; there are "
                f"{some_of([one.folder.name for one in found])}"
            )
        chosen[matching[0].folder] = matching[0]
    return list(chosen.values()) or list(found)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file.

    Raises:
        CheckpointError: where it is there and cannot be read, or is none.
    """
    try:
        value = json_text.read(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not an object")
    return value
