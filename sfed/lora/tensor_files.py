"""Safetensors files with the permissions of their folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

_NEVER_MORE_THAN = 0o644


def save_tensors(
    tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that those may read who may read its folder.

    safetensors itself makes files for their owner alone, whatever the umask says; then neither a
    server under another name could load an adapter, nor a colleague resume from a checkpoint.
    """
    save_file(dict(tensors), file, metadata=metadata)
    readable_as_its_folder(file)


def readable_as_its_folder(file: Path) -> None:
    """Let those read a file who may read its folder."""
    file.chmod(file.parent.stat().st_mode & _NEVER_MORE_THAN)
