"""Versions of Python and of the libraries that a run's numbers depend on; imports none of them."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from sfed.utils.version import __version__

LIBRARIES = ("torch", "transformers", "peft", "deepspeed")
"""What a run stands on; its processes must have the same of each."""


def version_of(library: str) -> str:
    """Return the version of an installed library; "not installed" for another one."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions_of(*libraries: str) -> dict[str, str]:
    """Return the version of each library by its name."""
    return {name: version_of(name) for name in libraries}


def python_version() -> str:
    """Return the version of Python, such as 3.12.1."""
    return ".".join(map(str, sys.version_info[:3]))


def about() -> dict[str, str]:
    """Return what a report of a bug needs: sfed, Python, the libraries and the platform."""
    return {
        "sfed": __version__,
        "python": python_version(),
        **versions_of(*LIBRARIES),
        "platform": platform.platform(),
    }
