"""Files that have to be whole: flushed, put into place at once, told from damaged ones."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BYTES_AT_A_TIME = 2**20


def describe(file: Path) -> dict[str, Any]:
    """Its size and a digest of its bytes, by which damage shows."""
    blake = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        while some := opened.read(_BYTES_AT_A_TIME):
            blake.update(some)
    return {"bytes": file.stat().st_size, "blake2b": blake.hexdigest()}


def damage(file: Path, known: dict[str, Any]) -> str | None:
    """What is wrong with a file that was described before; None where nothing is.

    Raises:
        OSError: where it cannot be read.
    """
    size = file.stat().st_size
    if size != known["bytes"]:
        return f"{file.name} has {size} bytes instead of {known['bytes']}"
    if describe(file) != known:
        return f"{file.name} holds other bytes than were written"
    return None


def holds(file: Path, content: bytes) -> bool:
    """Whether a file is there and holds just this."""
    try:
        return file.stat().st_size == len(content) and file.read_bytes() == content
    except OSError:
        return False


def write_changed(file: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; a file that holds it already is left alone."""
    content = text.encode()
    if not holds(file, content):
        with replacing(file) as temporary:
            temporary.write_bytes(content)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a temporary name beside ``file``, which it is renamed to at the end of the block.

    A reader sees the whole old file or the whole new one. After an error the old one stays.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    yield temporary
    os.replace(temporary, file)


def second_name(file: Path, name: Path) -> None:
    """Link a finished file into a second folder, or copy it where links are not possible."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
        sync(name)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename the finished folder into place; an older one of the same name goes aside first."""
    aside = folder.with_name(f".{folder.name}.old.tmp")
    if folder.exists():
        folder.rename(aside)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
