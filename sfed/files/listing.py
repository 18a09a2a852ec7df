"""Which files a key names: files, folders, globs, and data sets of the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

from sfed.config.schema import Config
from sfed.files.kinds import find_kind, not_read
from sfed.utils.errors import DataError

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
HUB = "hub:"
CLIENT = "{client}"
"""Stands for the number of a client, from 0, in the name of a file."""
_MOST_NAMED = 8


@dataclass(frozen=True)
class Listing:
    """The files that a key names, in order, and what is wrong with them."""

    files: tuple[str, ...]
    """Local files, patterns with {client}, and data sets of the hub."""
    problems: tuple[str, ...] = ()
    """A line each."""


def list_files(config: Config, split: Split) -> Listing:
    """Find the files of a split; those of a folder or glob in the order of their names."""
    key = f"data.{split}_files"
    files: list[str] = []
    problems: list[str] = []
    for name in config.files(split):
        found, problem = _expanded(name)
        files += found
        problems += [f"{key}: {problem}"] if problem else []
    problems += [f"{key}: {twice}" for twice in _named_twice(files)]
    return Listing(tuple(files), tuple(problems))


def files_of(config: Config, split: Split) -> tuple[str, ...]:
    """The files of a split.

    Raises:
        DataError: with all that is wrong, a line each.
    """
    found = list_files(config, split)
    if found.problems:
        raise DataError("\n".join(found.problems))
    return found.files


def is_local(name: str) -> bool:
    """Whether an entry of a listing is one file of this machine."""
    return not name.startswith(HUB) and CLIENT not in name


def has_pattern(name: str) -> bool:
    """Whether the name of a file is a glob, and not that of a file with such letters."""
    return is_local(name) and has_magic(name) and not Path(name).exists()


def _expanded(name: str) -> tuple[list[str], str]:
    """The files behind one entry, and what is wrong with it."""
    path = Path(name)
    if name.startswith(HUB):
        return [name], "" if name[len(HUB) :].strip(":") else f"{name!r} names no data set"
    if CLIENT in name:
        problem = "" if find_kind(path) else f"{name!r}: {not_read(path)}"
        return [name], problem
    if path.is_dir():
        inside = sorted(one for one in path.iterdir() if not one.name.startswith("."))
        return _of_known_kinds(inside, f"the folder {name!r}", name)
    if path.is_file():
        return [name], "" if find_kind(path) else f"{name!r}: {not_read(path)}"
    if has_magic(name):
        matches = map(Path, glob(name, recursive=True))  # noqa: PTH207  (may be absolute)
        found = sorted(path for path in matches if not path.is_dir())
        return _of_known_kinds(found, f"the glob {name!r}", name)
    return [], f"{name!r} does not exist; paths start at the folder in which the command runs"


def _of_known_kinds(found: Sequence[Path], what: str, name: str) -> tuple[list[str], str]:
    """The files of a folder or glob; all have to be read, since each may be a client's data."""
    odd = [path for path in found if find_kind(path) is None or not path.is_file()]
    if not found:
        return [], f"{what} holds no file" if Path(name).is_dir() else f"{what} matches no file"
    if odd:
        more = f" and {len(odd) - _MOST_NAMED} more" if len(odd) > _MOST_NAMED else ""
        named = ", ".join(repr(path.name) for path in odd[:_MOST_NAMED])
        files = [path for path in odd if path.is_file()]
        leads_nowhere = any(not path.exists() for path in odd)
        why = "it is a link to nothing" if leads_nowhere else "only files are read"
        why = not_read(files[0]) if files else why
        return [], f"{what} holds {named}{more}: {why}; name the files or a glob such as *.jsonl"
    return [str(path) for path in found], ""


def _named_twice(files: Sequence[str]) -> list[str]:
    """Refuse a file that is named twice: its rows would count twice."""
    first: dict[str, str] = {}
    problems = []
    for name in files:
        path = os.path.realpath(name) if is_local(name) else name
        if path in first:
            same = "" if first[path] == name else f" (also as {first[path]!r})"
            problems.append(f"{name!r} is named twice{same}; name each file once")
        first.setdefault(path, name)
    return problems
