"""What is wrong in the files themselves: all of it at once, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sfed.files import readers
from sfed.files.kinds import find_kind
from sfed.files.readers import Placed, scan
from sfed.utils.errors import DataError
from sfed.utils.text import counted

Fault = tuple[str, str]
"""A file, and a line about what is wrong in it, with the place."""
CheckRow = Callable[[Any, str], object]
"""Takes a row and its place; raises DataError where the row is wrong."""

WHOLE_BYTES = 64 * 2**20
"""All rows are read where the files are no larger than that together: a second of work."""
_ROWS_OF_LARGE = 1000
_UNPACKED = 8
"""How much larger a compressed file is taken to be."""
_MOST_FAULTS = 2


@dataclass(frozen=True)
class Checked:
    """What a check of files found."""

    faults: tuple[Fault, ...]
    rows: tuple[int, ...]
    """Of each file, as far as it was read."""
    is_whole: bool
    """Whether every row was read."""

    @property
    def summary(self) -> str:
        """What was checked, in plain words."""
        files = counted(len(self.rows), "file")
        if self.is_whole:
            return f"files      {files} checked, {sum(self.rows):,} rows"
        return (
            f"files      {files}: the first {_ROWS_OF_LARGE:,} rows of each are checked, since "
            "they are large; the others when they are read"
        )


def check_files(
    files: Sequence[str],
    check_row: CheckRow,
    whole_bytes: int = WHOLE_BYTES,
    most_characters: int = readers.MOST_CHARACTERS,
) -> Checked:
    """Read files that exist and are of a known kind; all rows where they are small enough.

    A large .json file is passed over, since a list can only be read whole.

    Args:
        files: paths.
        check_row: of the task.
        whole_bytes: up to which size of all files together every row is read.
        most_characters: longest line (``data.max_row_characters``).
    """
    sizes = {name: _unpacked_bytes(Path(name)) for name in files}
    is_whole = sum(sizes.values()) <= whole_bytes
    faults: list[Fault] = []
    rows: list[int] = []
    for name in files:
        kind = find_kind(Path(name))
        if sizes[name] > whole_bytes and kind and kind.form == "json":
            rows.append(_ROWS_OF_LARGE)
            continue
        rows_of = scan(Path(name), most_characters)
        looked_at = islice(rows_of, None if is_whole else _ROWS_OF_LARGE)
        found, count = _check_rows(Path(name), looked_at, check_row)
        faults += [(name, text) for text in found]
        rows.append(count)
    return Checked(tuple(faults), tuple(rows), is_whole)


def _check_rows(path: Path, rows: Iterable[Placed], check_row: CheckRow) -> tuple[list[str], int]:
    faults: list[str] = []
    count = bad = 0
    try:
        for where, row in rows:
            count += 1
            if problem := _problem(row, where, check_row):
                bad += 1
                faults += [problem] if bad <= _MOST_FAULTS else []
    except DataError as error:
        return [*faults, str(error)], count
    if bad > _MOST_FAULTS:
        faults.append(f"{path}: {bad - _MOST_FAULTS} more of its {count} rows are wrong")
    return faults, count


def _problem(row: Any, where: str, check_row: CheckRow) -> str:
    if isinstance(row, readers.Fault):
        return f"{where}: {row.message}"
    try:
        check_row(row, where)
    except DataError as error:
        return str(error)
    return ""


def _unpacked_bytes(path: Path) -> int:
    kind = find_kind(path)
    is_packed = kind is not None and (kind.compression or kind.form == "parquet")
    try:
        return path.stat().st_size * (_UNPACKED if is_packed else 1)
    except OSError:
        return 0  # the reader says what it is
