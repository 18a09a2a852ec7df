"""The kinds of files that are read, told by the ends of their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfed.utils.errors import DataError

Form = Literal["jsonl", "json", "csv", "tsv", "parquet"]
Compression = Literal["gzip", "zstd"]

_FORMS: dict[str, Form] = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
READ = ".jsonl, .json, .csv, .tsv, each also as .gz or .zst, and .parquet"


@dataclass(frozen=True)
class Kind:
    """How a file is read."""

    form: Form
    compression: Compression | None = None
    """Of the whole file; parquet files have their own inside."""


def find_kind(path: Path) -> Kind | None:
    """The kind of a file by its name; None where such files are not read."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    compression = _COMPRESSIONS.get(last)
    form = _FORMS.get(before if compression else last)
    if form is None or (compression and form == "parquet"):
        return None
    return Kind(form, compression)


def kind_of(path: Path) -> Kind:
    """The kind of a file by its name.

    Raises:
        DataError: naming the kinds that are read.
    """
    if (kind := find_kind(path)) is None:
        raise DataError(f"{path}: {not_read(path)}")
    return kind


def not_read(path: Path) -> str:
    """Why files of such a name are not read, and which are."""
    if path.name.lower().endswith((".parquet.gz", ".parquet.zst")):
        return "parquet files are compressed inside; unpack it and name the .parquet file"
    ending = path.suffix
    if ending.lower() in _COMPRESSIONS:  # which is read, but not of what is inside
        ending = "".join(path.suffixes[-2:])
    what = f"files that end in {ending}" if ending else "files without an ending"
    return f"{what} are not read; read are {READ}"


def stem_of(path: Path) -> str:
    """The name of a file without the ends that say its kind."""
    kind = find_kind(path)
    if kind is None:
        return path.stem
    return Path(path.stem).stem if kind.compression else path.stem
