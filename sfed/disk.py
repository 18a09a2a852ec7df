"""Files that have to be whole: flushed, put into place at once, told from damaged ones."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sfed.cli import UserError

_BYTES_AT_A_TIME = 2**20
_NEVER_MORE_THAN = 0o644


def save_tensors(
    tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that those may read who may read its folder.

    safetensors itself makes files for their owner alone, whatever the umask says; then neither a
    server under another name could load an adapter, nor a colleague go on from a checkpoint.
    """
    save_file(dict(tensors), file, metadata=metadata)
    file.chmod(file.parent.stat().st_mode & _NEVER_MORE_THAN)


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


def second_name(file: Path, name: Path) -> None:
    """Let a finished file be in two folders; where the file system cannot, a copy is."""
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


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a refusal of the disk into a plain message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be written ({' '.join(str(error).split())[:300]}); "
            "make room or set output.dir, then start again: the run goes on from the last whole "
            "checkpoint"
        ) from None
