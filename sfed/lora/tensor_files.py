"""Safetensors files with the permissions of their folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sfed.utils.files import replacing

_NEVER_MORE_THAN = 0o644


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the format."""


def write_tensors(
    tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all; a file that holds this already is left alone.

    Args:
        tensors: of any device and shape.
        file: is replaced.
        metadata: of the file.

    Raises:
        OSError: where the file cannot be written.
    """
    pieces = list(_pieces(tensors, metadata))
    if _holds(file, pieces):
        return
    with replacing(file) as temporary:
        with temporary.open("wb") as opened:
            opened.writelines(pieces)
        readable_as_its_folder(temporary)


def _holds(file: Path, pieces: Sequence[Any]) -> bool:
    """Whether a file is there and holds just these bytes."""
    sizes = [memoryview(piece).nbytes for piece in pieces]
    try:
        if file.stat().st_size != sum(sizes):
            return False
        with file.open("rb") as opened:
            return all(
                opened.read(size) == bytes(piece) for size, piece in zip(sizes, pieces, strict=True)
            )
    except OSError:
        return False


def write_described(tensors: Mapping[str, torch.Tensor], file: Path) -> dict[str, Any]:
    """Write a safetensors file, flush it to the disk and describe it as ``utils.files.describe``.

    The digest is taken of what is written, piece by piece: the file is not read again, and no copy
    is made of tensors in host memory.

    Args:
        tensors: of any device and shape; nobody writes to them meanwhile.
        file: is replaced.

    Raises:
        OSError: where the file cannot be written.
    """
    blake, size = hashlib.blake2b(digest_size=16), 0
    with file.open("wb") as opened:
        for piece in _pieces(tensors):
            blake.update(piece)
            size += opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())
    readable_as_its_folder(file)
    return {"bytes": size, "blake2b": blake.hexdigest()}


def _pieces(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """The bytes of a file: the length of its header, the header, each tensor."""
    # As safetensors orders them: the widest numbers first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, tensor in ordered:
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def readable_as_its_folder(file: Path) -> None:
    """Let those read a file who may read its folder: a server under another name, a colleague."""
    file.chmod(file.parent.stat().st_mode & _NEVER_MORE_THAN)
