"""Writes the files of a report, and removes those of an earlier one that it no longer has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from sfed.utils import json_text
from sfed.utils.files import replacing


def list_file(folder: Path) -> Path:
    """Where the files are named that the last report has put into a folder: beside it.

    Others in the folder are not touched.
    """
    return folder.with_name(f".{folder.name}.json")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, and remove what an earlier call wrote there and this one lacks.

    Args:
        folder: it is made where it does not exist.
        files: name -> content.

    Raises:
        OSError: where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    former = _listed(folder)
    _list(folder, {*former, *files})  # whatever happens meanwhile, none is forgotten
    for name, content in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    for name in former - files.keys():
        (folder / name).unlink(missing_ok=True)
    _list(folder, files)


def _list(folder: Path, names: Iterable[str]) -> None:
    with replacing(list_file(folder)) as temporary:
        temporary.write_text(json.dumps(sorted(names), indent=0) + "\n", encoding="utf-8")


def _listed(folder: Path) -> set[str]:
    """The names in the list; nothing of it where it is damaged, no path that leads elsewhere."""
    try:
        names = json_text.read(list_file(folder))
    except (FileNotFoundError, ValueError):
        return set()
    return {
        name
        for name in (names if isinstance(names, list) else [])
        if isinstance(name, str) and Path(name).name == name and not (folder / name).is_dir()
    }
