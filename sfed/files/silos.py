"""The clients of ``partition.kind=by_file``: one for each file, with the name of the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from sfed.config.schema import Config
from sfed.files.listing import CLIENT, HUB, Split, files_of, has_pattern
from sfed.files.names import distinct_names
from sfed.files.readers import scan
from sfed.utils.errors import DataError

LEAST_TRAIN_EXAMPLES = 2
_MOST_NAMED = 8


@dataclass(frozen=True)
class Silos:
    """The files of each client, in order."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    """As many; empty where each client holds out some of its training rows."""
    names: tuple[str, ...]
    """As many; "" for those that a pattern with {client} numbers."""
    left_out: tuple[str, ...] = ()
    """Names of files that hold too few rows to train on, with ``data.on_small_client=skip``."""
    shares_held_out: bool = False
    """Whether one held-out file is that of all clients."""


def least_rows(config: Config) -> int:
    """How many rows a client needs: two to train on, and one to hold out where no file does."""
    return LEAST_TRAIN_EXAMPLES + (not config.files("eval"))


def num_clients_of(config: Config) -> int | None:
    """N as configured, or as many as there are files; None where neither says.

    Raises:
        DataError: where the files cannot be found.
    """
    if config.federated.num_clients is None and _is_listed(config):
        return len(silos_of(config, None).train)
    return config.federated.num_clients


def _is_listed(config: Config) -> bool:
    """Whether the clients are files that can be counted."""
    return config.partition.kind == "by_file" and not _has_numbers(config, "train")


def _has_numbers(config: Config, split: Split) -> bool:
    files = config.files(split)
    return len(files) == 1 and CLIENT in files[0]


def silos_of(config: Config, num_clients: int | None) -> Silos:
    """Return the clients of a configuration with ``partition.kind=by_file``.

    Args:
        config: of the run.
        num_clients: N; None = as many as there are files.

    Raises:
        DataError: where there are not as many files as clients, or a held-out file belongs to none.
    """
    if not _is_listed(config):
        return _numbered(config, num_clients or 1)
    files = files_of(config, "train")
    _refuse_no_silos(files)
    names = distinct_names(files)
    small = _small(config, files)
    kept = [i for i in range(len(files)) if i not in small]
    left_out = tuple(names[i] for i in sorted(small))
    if not kept:
        raise DataError(f"data.train_files: none of the {len(files)} files holds enough rows")
    held_out = _held_out(config, files, names)
    stated = num_clients if num_clients is not None else config.federated.num_clients
    if stated is not None and stated != len(kept):
        without = f", without the {len(small)} with too few rows" if small else ""
        raise DataError(
            f"partition.kind=by_file: data.train_files names {len(kept)} files{without} for "
            f"{stated} clients; set federated.num_clients={len(kept)} or leave it out"
        )
    return Silos(
        tuple(files[i] for i in kept),
        tuple(held_out[i] for i in kept) if held_out else (),
        tuple(names[i] for i in kept),
        left_out,
        len(kept) > 1 and len(set(held_out)) == 1,
    )


def _numbered(config: Config, num_clients: int) -> Silos:
    """Clients with a number in the names of their files."""

    def numbered(pattern: str) -> tuple[str, ...]:
        return tuple(pattern.replace(CLIENT, str(client)) for client in range(num_clients))

    held_out: tuple[str, ...] = ()
    if _has_numbers(config, "eval"):
        held_out = numbered(config.files("eval")[0])
    elif config.files("eval"):
        held_out = _in_order(files_of(config, "eval"), num_clients)
    (pattern,) = config.files("train")
    is_common = num_clients > 1 and len(set(held_out)) == 1
    return Silos(numbered(pattern), held_out, ("",) * num_clients, shares_held_out=is_common)


def _refuse_no_silos(files: Sequence[str]) -> None:
    odd = [name for name in files if CLIENT in name or name.startswith(HUB)]
    if odd:
        raise DataError(
            f"partition.kind=by_file: {odd[0]!r} is no file of a client; name one file for each, a "
            "folder, a glob, or one pattern with {client}"
        )
    if len(files) < 2:
        raise DataError(
            f"partition.kind=by_file: data.train_files names one file, {files[0]!r}, and each file "
            "is a client; name several, a folder, a glob, or a pattern with {client}"
        )


def _held_out(config: Config, files: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The held-out file of each training file; none where there are no held-out files.

    One file is that of all. Those of a folder or glob belong to the training file of their name,
    those of a list to the one in their place.
    """
    given = config.files("eval")
    if not given:
        return ()
    if _has_numbers(config, "eval"):
        raise DataError(
            f"data.eval_files: {given[0]!r} has {{client}} and data.train_files has not; name the "
            "held-out files as the training files are"
        )
    found = files_of(config, "eval")
    is_listing = any(Path(name).is_dir() or has_pattern(name) for name in given)
    if len(found) == 1 or not is_listing:
        return _in_order(found, len(files))
    by_name = dict(zip(distinct_names(found), found, strict=True))
    missing = [name for name in names if name not in by_name]
    foreign = [name for name in by_name if name not in names]
    if missing or foreign:
        parts = [f"no held-out file for {_some(missing)}"] if missing else []
        parts += [f"no training file for {_some(foreign)}"] if foreign else []
        raise DataError(
            f"partition.kind=by_file: data.eval_files has {' and '.join(parts)}; each client needs "
            "a held-out file of the same name, or name one file for all clients"
        )
    return tuple(by_name[name] for name in names)


def _in_order(found: Sequence[str], num_clients: int) -> tuple[str, ...]:
    if len(found) == 1:
        return tuple(found) * num_clients
    if len(found) != num_clients:
        raise DataError(
            f"partition.kind=by_file: data.eval_files names {len(found)} files for {num_clients} "
            "clients; give one per client, or one for all of them"
        )
    return tuple(found)


def _small(config: Config, files: Sequence[str]) -> set[int]:
    """Which files hold too few rows, where those are to be left out."""
    if config.data.on_small_client != "skip":
        return set()
    least = least_rows(config)
    longest = config.data.max_row_characters
    return {i for i, name in enumerate(files) if _rows_of(name, least, longest) < least}


def _rows_of(name: str, most: int, longest: int) -> int:
    """Rows of a file, counted up to a number; those that cannot be read are refused later."""
    found = os.stat(name)  # noqa: PTH116  (a key of the cache)
    return _counted(name, most, longest, (found.st_mtime_ns, found.st_size))


@cache
def _counted(name: str, most: int, longest: int, _version: tuple[int, int]) -> int:
    try:
        return sum(1 for _ in islice(scan(Path(name), longest), most))
    except DataError:
        return most


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more
