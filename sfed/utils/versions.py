"""Versions of Python and of the libraries that a run's numbers depend on; imports none of them."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from sfed.utils.version import __version__

LIBRARIES = ("torch", "transformers", "peft", "deepspeed")
"""What a run stands on; its processes must have the same of each."""
RECORDED = (*LIBRARIES, "datasets", "safetensors", "numpy", "triton")
"""What ``config.json`` of a run folder names."""


def installed(*libraries: str) -> dict[str, str]:
    """Return the version of each library, "not installed" of one that is not there."""
    return {name: _version_of(name) for name in libraries}


def _version_of(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def of_libraries(*libraries: str) -> dict[str, str]:
    """Return the versions of sfed, of Python, and of these libraries."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"sfed": __version__, "python": python, **installed(*libraries)}


def about() -> dict[str, str]:
    """Return what a report of a bug needs: versions and the platform."""
    return {**of_libraries(*LIBRARIES), "platform": platform.platform()}
