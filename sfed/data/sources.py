"""Where the rows of a split come from: local files, the hub, or the demo's own generator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from sfed.config.schema import Config
from sfed.data import demo
from sfed.data.tasks import task_of
from sfed.files.kinds import kind_of
from sfed.files.listing import HUB, Split
from sfed.files.names import distinct_names
from sfed.files.readers import read_rows, without_nulls
from sfed.utils.errors import DataError
from sfed.utils.text import one_line

# Endings of the names of means over clients (records): a part's score has to be told from them.
_MEANS = ("unweighted", "by_examples")
DEMO_TRAIN_PER_KIND, DEMO_EVAL_PER_KIND, DEMO_SEED = 400, 64, 0
Place = tuple[str, str]
"""Where a row stands, for messages, and the part of a held-out set that it belongs to."""


def has_split(config: Config, split: Split) -> bool:
    """Whether the task or the configured files have this split of their own."""
    if split == "train" or config.files(split) or config.data.task == "demo":
        return True
    # Local training files come with local held-out files or with none.
    return not config.files("train") and bool(task_of(config).eval_splits)


def source_of(
    config: Config, split: Split, files: tuple[str, ...]
) -> tuple[Iterator[tuple[Place, Any]], str]:
    """Return the rows of a split, and a digest or name by which they are known again.

    Args:
        config: the run's configuration.
        split: which one.
        files: local files; empty = the task's own source.

    Raises:
        DataError: where a file or the hub cannot be read.
    """
    if files:
        key = f"data.{split}_files"
        parts = part_names(files)
        found = [_file_or_hub(config, name, key, split) for name in files]
        identity = repr([(*one.identity, part) for one, part in zip(found, parts, strict=True)])
        return _placed([one.rows for one in found], parts, files, key), identity
    if config.data.task == "demo":
        count = DEMO_TRAIN_PER_KIND if split == "train" else DEMO_EVAL_PER_KIND
        rows = demo.rows(split, count, DEMO_SEED)
        return (((f"demo row {i}", ""), row) for i, row in enumerate(rows)), repr(rows)
    return _hub_rows(config, split)


@dataclass(frozen=True)
class _Source:
    """A file, or a split of a data set on the hub."""

    rows: Iterable[tuple[str, Any]]
    """With their places."""
    identity: tuple[Any, ...]
    """What it is known by again."""


def _file_or_hub(config: Config, name: str, key: str, split: Split) -> _Source:
    if not name.startswith(HUB):
        path = Path(name)
        kind = kind_of(path)
        rows = read_rows(path, config.data.max_row_characters)
        return _Source(rows, (_file_digest(name, key), kind))
    chosen = (config.data.split or "train") if split == "train" else config.data.eval_split
    data_set, _, of_it = name[len(HUB) :].partition(":")
    table = _load(data_set, of_it or None, chosen or "test", f"{key}: {name!r}")
    rows = ((f"{name} row {i}", _of_arrow(row)) for i, row in enumerate(table))
    return _Source(rows, (table._fingerprint,))


def _of_arrow(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: without_nulls(value) for name, value in row.items()}


def _file_digest(name: str, key: str) -> str:
    sha = hashlib.sha256()
    try:
        with Path(name).open("rb") as file:
            while chunk := file.read(1 << 20):
                sha.update(chunk)
        return sha.hexdigest()
    except OSError as error:
        raise DataError(f"{key}: {name!r} cannot be read ({error.strerror})") from None


def _placed(
    sources: Sequence[Iterable[tuple[str, Any]]],
    parts: Sequence[str],
    names: Sequence[str],
    key: str,
) -> Iterator[tuple[Place, Any]]:
    """Yield the rows of some sources, each with the name of its part."""
    num_rows = 0
    for rows, part in zip(sources, parts, strict=True):
        for where, row in rows:
            num_rows += 1
            yield (where, part), row
    if not num_rows:
        raise DataError(f"{key}: {', '.join(names)} hold no rows")


def part_names(files: Sequence[str]) -> list[str]:
    """Return the name of each file's part of a held-out set, all distinct; "" for a single file.

    Without validation_ in front, as in mismatched, of validation_mismatched.jsonl; and none that
    could be read as the mean of another's score over clients.
    """
    if len(files) < 2:
        return [""] * len(files)
    return distinct_names(files, drop="validation_", refused=_MEANS)


def _hub_rows(config: Config, split: Split) -> tuple[Iterator[tuple[Place, Any]], str]:
    """Return the rows of a split of the task's data set on the hub, and what identifies them."""
    task = task_of(config)
    names = task.eval_splits if split == "eval" else ("train",)
    remedy = "give data.train_files for local files"
    what = f"data.task={config.data.task}: {task.hub}"
    tables = [_load(task.hub, task.hub_config, name, what, remedy) for name in names]
    parts = part_names(names)
    source = (
        ((f"{name} row {i}", part), row)
        for name, part, table in zip(names, parts, tables, strict=True)
        for i, row in enumerate(table)
    )
    return source, repr([table._fingerprint for table in tables])


def _load(name: str | None, config: str | None, split: str, what: str, remedy: str = "") -> Any:
    """Load a split of a data set of the hub.

    Raises:
        DataError: where it cannot be loaded.
    """
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        end = f"; {remedy}" if remedy else ""
        raise DataError(
            f"{what} cannot be loaded from the hub ({one_line(error, 200)}){end}"
        ) from None
