"""Paths in a configuration file: those to be read follow the file, wherever a command runs.

They stay relative where they were, so that a run which was started from the file's own folder is
still the same run. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from glob import has_magic, iglob
from pathlib import Path
from typing import Any

_METHOD = "federated.method"
_KEYS = (
    "model.name",
    "data.train_files",
    "data.eval_files",
    "data.chat_template",
    "lora.start_from",
    "federated.join",
    _METHOD,
    "output.resume",
)
"""Keys that may name something to be read. Folders that are written to are the command's own."""
_OF_FILE = re.compile(r"(\.py):\w+$")


def follow(data: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what a file says with its paths as they are from the folder of the command.

    A path that leads nowhere from the file's folder, but somewhere from that of the command, is
    left as it is: older versions read it so.

    Args:
        data: sections of keys, of any form.
        file: that they are from.

    Returns:
        The sections, and a warning for each path that was left as it is.
    """
    sections, warnings = dict(data), []
    for key in _KEYS:
        section, _, leaf = key.partition(".")
        values = sections.get(section)
        if not isinstance(values, Mapping) or leaf not in values:
            continue
        if key == _METHOD and not _OF_FILE.search(str(values[leaf])):
            continue  # the name of a method, and not of a folder that happens to be there
        followed = _followed(values[leaf], file.parent)
        for name, now in zip(_names(values[leaf]), _names(followed), strict=True):
            if name and name == now and file.parent != Path() and _leads_somewhere(Path(name)):
                warnings.append(
                    f"{key}: {name!r} of {file} is found from the folder of this command and not "
                    "from that of the file; write the path as it is from the file"
                )
        sections[section] = {**values, leaf: followed}
    return sections, warnings


def _followed(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_followed(one, folder) for one in value]
    if not _is_relative(value) or not _leads_somewhere(folder / value):
        return value
    return str(folder / value)


def _names(value: Any) -> Iterator[str]:
    """The relative paths of a key's value."""
    for one in value if isinstance(value, list) else [value]:
        yield one if _is_relative(one) else ""


def _is_relative(value: Any) -> bool:
    return isinstance(value, str) and value[:1] not in ("", "/", "~")


def _leads_somewhere(path: Path) -> bool:
    """Whether there is something; {client} is the number of a client, :NAME is within a file."""
    name = _OF_FILE.sub(r"\1", str(path).replace("{client}", "0"))
    try:
        if Path(name).exists():
            return True
    except OSError:  # a name that no file can have, such as the text of a template
        return False
    return has_magic(name) and any(iglob(name, recursive=True))  # noqa: PTH207  (may be absolute)
