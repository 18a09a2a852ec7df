"""The run folders that a report reads, and the files that it writes.

Files of an earlier report that the new one no longer has are removed.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from sfed.storage.run_record import METRICS_FILE, SWEEP_FILE
from sfed.utils import json_text
from sfed.utils.errors import UserError
from sfed.utils.files import replacing
from sfed.utils.text import natural


def find_runs(folder: Path) -> list[Path]:
    """The folder itself, or the run folders in it; what a newer run put aside is left out.

    Runs of a sweep stand in the order of its ``sweep.csv``, others in that of their names.
    """
    if (folder / METRICS_FILE).is_file():
        return [folder]
    inside = (path.parent for path in folder.glob(f"*/{METRICS_FILE}"))
    kept = [run for run in inside if not re.search(r"\.old-\d+$", run.name)]
    place = {name: i for i, name in enumerate(_cells_of_sweep(folder))}

    def order(run: Path) -> tuple[int, list[tuple[int, str]]]:
        return place.get(run.name, len(place)), natural(run.name)

    return sorted(kept, key=order) or [folder]


def _cells_of_sweep(folder: Path) -> list[str]:
    """The runs that ``sweep.csv`` names, in its order; none where there is no such file."""
    path = folder / SWEEP_FILE
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [row["cell"] for row in csv.DictReader(file) if row.get("cell")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not readable: {error}") from None


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
