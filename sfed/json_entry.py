"""JSON files that Python itself is asked to run: ``deepspeed launch/sfed.json`` trains.

Launchers start ``python -u FILE``. Python runs a file that is no program where an import hook
offers a ``__main__`` for it; that is how it runs zip archives. ``json_entry.pth`` lies in
site-packages as long as sfed is installed, and calls ``offer`` where the file to run ends in .json.
In all other interpreters it imports nothing and changes nothing.
"""

from __future__ import annotations

import re
import sys
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# Looked for in the text, so that a file with a slip in its JSON gets sfed's answer too: Python
# takes {"a": 1,} for a program that does nothing, and the launcher reports success.
_FEDERATED_SECTION = re.compile(r'"federated"\s*:\s*\{')


class RunImporter(InspectLoader):
    """Offers the program of a configuration: one call of ``main``."""

    def find_spec(self, name: str, _target: ModuleType | None = None) -> ModuleSpec | None:
        """Offer ``__main__`` and nothing else."""
        return ModuleSpec(name, self) if name == "__main__" else None

    def get_source(self, _name: str) -> str:
        """The program."""
        return "from sfed.json_entry import main\n\nmain()\n"


def offer(script: str) -> None:
    """Run this file if it is a configuration of sfed: if it has a federated section."""
    try:
        text = Path(script).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # Python has its own words for a file that it cannot read

    def hook(path: str) -> RunImporter:
        if Path(path).resolve() != Path(script).resolve():  # Python has made it absolute
            raise ImportError
        return RunImporter()

    if _FEDERATED_SECTION.search(text):
        sys.path_hooks.append(hook)


def main() -> None:
    """Train as ``python -m sfed.train FILE key=value ...`` does."""
    from sfed import train
    from sfed.utils import command

    command.run_command(lambda words: train.main([sys.argv[0], *words]))
