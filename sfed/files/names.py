"""Names of clients and of parts of a held-out set, by their files; names of adapters' folders."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from sfed.files.kinds import stem_of

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
"""The two files of a PEFT adapter."""
CLIENT_FILE = "client.json"
"""Beside the adapter of a client with a name: its number and that name, as it was given."""
GLOBAL = "global"
"""The folder of the global adapter, which no client's may be called."""
_LONGEST_FOLDER = 60
# Names that Windows keeps for devices: a copy of the folder could not be made there.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}


def distinct_names(
    files: Sequence[str], drop: str = "", refused: Collection[str] = ()
) -> list[str]:
    """Return a name for each file, all distinct: the file's without the ends that say its kind.

    Where two are alike, the names of the folders above go before it (easy_test and hard_test of
    easy/test.jsonl and hard/test.jsonl), then the ends behind it, then a number.

    Args:
        files: their paths.
        drop: what is taken off the start of a name.
        refused: ends after an underscore, or whole names, by which a name could be misread where
            the rest of it is another name.
    """
    steps = [[s for s in Path(name).parts if s not in (".", "..", "/")] for name in files]
    depths = [1] * len(files)
    while True:
        names = [_name(own[-depth:], drop) for own, depth in zip(steps, depths, strict=True)]
        growing = [i for i in _clashing(names, refused) if depths[i] < len(steps[i])]
        if not growing:
            break
        for i in growing:
            depths[i] += 1
    for i in _clashing(names, refused):
        names[i] += Path(files[i]).name.removeprefix(stem_of(Path(files[i]))).replace(".", "_")
    while clashing := _clashing(names, refused):
        later = clashing[-1]
        names[later] = _next_free(names[later], names)
    return names


def _name(steps: Sequence[str], drop: str) -> str:
    stem = stem_of(Path(steps[-1]))
    name = "_".join([*steps[:-1], stem.removeprefix(drop) or stem])
    # Line breaks and the like would end up in tables and in the names of curves.
    return "".join(letter if letter.isprintable() else "_" for letter in name)


def _clashing(names: Sequence[str], refused: Collection[str]) -> list[int]:
    """Which names are not their own: given twice, or to be misread."""
    misread = {f"{name}_{end}" for name in names for end in refused} | set(refused)
    often = Counter(names)
    return [i for i, name in enumerate(names) if often[name] > 1 or name in misread]


def _next_free(name: str, names: Sequence[str]) -> str:
    number = 2
    while f"{name}_{number}" in names:
        number += 1
    return f"{name}_{number}"


def adapter_folder(client: int) -> str:
    """The folder of the adapter of a client without a name."""
    return f"client-{client:04d}"


def adapter_folders(names: Sequence[str]) -> list[str]:
    """Return the name of each client's folder below ``adapters``, safe for every file system.

    It has the letters, digits, dots, hyphens and underscores of ASCII that the client's name has,
    accents taken off, and hyphens for the rest; where two would be one, also by case alone, a
    number. A client without a name has ``client-0000`` and so on.

    Args:
        names: of all clients in order; "" where there is none.
    """
    folders = ["" if _slug(name) else adapter_folder(i) for i, name in enumerate(names)]
    taken = {GLOBAL, *_DEVICES, *filter(None, folders)}
    for client, name in enumerate(names):
        if not folders[client]:
            slug = folder = _slug(name)
            number = 1
            while folder.casefold() in taken:
                number += 1
                folder = f"{slug}-{number}"
            folders[client] = folder
            taken.add(folder.casefold())
    return folders


def _slug(name: str) -> str:
    parts = unicodedata.normalize("NFKD", name)  # an accent is a letter of its own in it
    plain = "".join(letter for letter in parts if not unicodedata.combining(letter))
    kept = re.sub(r"[^A-Za-z0-9._]+", "-", plain).strip("-.")
    return kept[:_LONGEST_FOLDER].rstrip("-.")
