"""Which run folders a folder holds, and in which order. Needs no torch."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from sfed.storage.run_record import METRICS_FILE, SWEEP_FILE
from sfed.utils.errors import UserError
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
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not readable: {error}") from None
