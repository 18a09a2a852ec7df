"""Where the rows of a split come from: local files, the hub, or the demo's own generator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets

from sfed import demo
from sfed.cli import UserError
from sfed.config import Config
from sfed.tasks import read_rows, task_of

DEMO_TRAIN_PER_KIND, DEMO_EVAL_PER_KIND, DEMO_SEED = 400, 64, 0
Split = Literal["train", "eval"]
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
        UserError: where a file or the hub cannot be read.
    """
    if files:
        digests = [_file_digest(name, f"data.{split}_files") for name in files]
        return _file_rows(files, f"data.{split}_files"), repr(digests)
    if config.data.task == "demo":
        count = DEMO_TRAIN_PER_KIND if split == "train" else DEMO_EVAL_PER_KIND
        rows = demo.rows(split, count, DEMO_SEED)
        return (((f"demo row {i}", ""), row) for i, row in enumerate(rows)), repr(rows)
    return _hub_rows(config, split)


def _file_digest(name: str, key: str) -> str:
    sha = hashlib.sha256()
    try:
        with Path(name).open("rb") as file:
            while chunk := file.read(1 << 20):
                sha.update(chunk)
        return sha.hexdigest()
    except OSError as error:
        raise UserError(f"{key}: {name!r} cannot be read ({error.strerror})") from None


def _file_rows(files: tuple[str, ...], key: str) -> Iterator[tuple[Place, Any]]:
    num_rows = 0
    for name in files:
        part = _part(Path(name).stem) if len(files) > 1 else ""
        for where, row in read_rows(Path(name)):
            num_rows += 1
            yield (where, part), row
    if not num_rows:
        raise UserError(f"{key}: {', '.join(files)} hold no rows")


def _part(name: str) -> str:
    """The name of a part as scores carry it: mismatched, of validation_mismatched."""
    return name.removeprefix("validation_")


def _hub_rows(config: Config, split: Split) -> tuple[Iterator[tuple[Place, Any]], str]:
    """Return the rows of a split of the task's data set on the hub, and what identifies them."""
    task = task_of(config)
    names = task.eval_splits if split == "eval" else ("train",)
    try:
        tables = [datasets.load_dataset(task.hub, task.hub_config, split=name) for name in names]
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.task={config.data.task}: {task.hub} cannot be loaded from the hub "
            f"({' '.join(str(error).split())[:200]}); give data.train_files for local files"
        ) from None
    parts = [_part(name) if len(names) > 1 else "" for name in names]
    source = (
        ((f"{name} row {i}", part), row)
        for name, part, table in zip(names, parts, tables, strict=True)
        for i, row in enumerate(table)
    )
    return source, repr([table._fingerprint for table in tables])
