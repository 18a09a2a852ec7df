"""Where the rows of a split come from: local files, the hub, or the demo's own generator."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets

from sfed.config.schema import Config
from sfed.data import demo
from sfed.data.tasks import task_of
from sfed.files.kinds import kind_of
from sfed.files.readers import read_rows
from sfed.utils.errors import DataError
from sfed.utils.text import one_line

# Endings of the names of means over clients (records): a part's score has to be told from them.
_MEANS = ("unweighted", "by_examples")
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
        DataError: where a file or the hub cannot be read.
    """
    if files:
        key = f"data.{split}_files"
        if split == "eval":
            _refuse_twice(files, key)
        parts = part_names(files)
        digests = [_file_digest(name, key) for name in files]
        forms = [kind_of(Path(name)) for name in files]
        identity = repr(list(zip(digests, forms, parts, strict=True)))
        return _file_rows(list(zip(files, parts, strict=True)), key), identity
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
        raise DataError(f"{key}: {name!r} cannot be read ({error.strerror})") from None


def _file_rows(files: Sequence[tuple[str, str]], key: str) -> Iterator[tuple[Place, Any]]:
    """Yield the rows of some files, each given with the name of its part."""
    num_rows = 0
    for name, part in files:
        for where, row in read_rows(Path(name)):
            num_rows += 1
            yield (where, part), row
    if not num_rows:
        raise DataError(f"{key}: {', '.join(name for name, _ in files)} hold no rows")


def _refuse_twice(files: Sequence[str], key: str) -> None:
    """Refuse a held-out file that is named twice: its rows would count twice in every score."""
    paths = [os.path.realpath(name) for name in files]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            first = files[paths.index(path)]
            same = "" if first == files[i] else f" (also as {first!r})"
            raise DataError(f"{key}: {files[i]!r} is named twice{same}; name each file once")


def part_names(files: Sequence[str]) -> list[str]:
    """Return the name of each file's part of a held-out set, all distinct; "" for a single file.

    A name is the file's without its suffix. Where two are alike, those of the folders above go
    before it (easy_test and hard_test of easy/test.jsonl and hard/test.jsonl), then the suffix
    behind it, then a number.
    """
    if len(files) < 2:
        return [""] * len(files)
    steps = [[s for s in Path(name).parts if s not in (".", "..", "/")] for name in files]
    depths = [1] * len(files)
    while True:
        names = [_part(own[-depth:]) for own, depth in zip(steps, depths, strict=True)]
        growing = [i for i in _clashing(names) if depths[i] < len(steps[i])]
        if not growing:
            break
        for i in growing:
            depths[i] += 1
    for i in _clashing(names):
        names[i] += Path(files[i]).suffix.replace(".", "_")
    while clashing := _clashing(names):
        later = clashing[-1]
        names[later] = _next_free(names[later], names)
    return names


def _part(steps: Sequence[str]) -> str:
    """The name of a part as scores carry it: mismatched, of validation_mismatched.jsonl."""
    stem = Path(steps[-1]).stem
    name = "_".join([*steps[:-1], stem.removeprefix("validation_") or stem])
    # Line breaks and the like would end up in tables and in the names of curves.
    return "".join(letter if letter.isprintable() else "_" for letter in name)


def _clashing(names: Sequence[str]) -> list[int]:
    """Which names are not their own: given twice, or read as the mean of a score over clients."""
    means = {f"{name}_{mean}" for name in names for mean in _MEANS} | set(_MEANS)
    often = Counter(names)
    return [i for i, name in enumerate(names) if often[name] > 1 or name in means]


def _next_free(name: str, names: Sequence[str]) -> str:
    number = 2
    while f"{name}_{number}" in names:
        number += 1
    return f"{name}_{number}"


def _hub_rows(config: Config, split: Split) -> tuple[Iterator[tuple[Place, Any]], str]:
    """Return the rows of a split of the task's data set on the hub, and what identifies them."""
    task = task_of(config)
    names = task.eval_splits if split == "eval" else ("train",)
    try:
        tables = [datasets.load_dataset(task.hub, task.hub_config, split=name) for name in names]
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.task={config.data.task}: {task.hub} cannot be loaded from the hub "
            f"({one_line(error, 200)}); give data.train_files for local files"
        ) from None
    parts = part_names(names)
    source = (
        ((f"{name} row {i}", part), row)
        for name, part, table in zip(names, parts, tables, strict=True)
        for i, row in enumerate(table)
    )
    return source, repr([table._fingerprint for table in tables])
