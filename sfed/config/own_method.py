"""Names of methods: those of the program, and ``FILE.py:NAME`` or ``package.module:NAME``.

Needs no torch, and does not run the module that is named.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

METHOD_NAMES = (
    *("sfed", "fedsa", "fedsa-rslora", "rolora", "ffa", "fedit", "local"),
    *("flexlora", "fedex", "flora", "hetlora"),
)
"""The methods of the program."""
_FORM = "FILE.py:NAME or package.module:NAME for one of your own"


@dataclass(frozen=True)
class OwnMethod:
    """A method of the user's, as the configuration names it."""

    source: str
    """A file, or a module."""
    name: str
    """What the method is called there."""

    @staticmethod
    def parse(spec: str) -> OwnMethod:
        """Read ``SOURCE:NAME``."""
        source, _, name = spec.rpartition(":")
        return OwnMethod(source, name)

    @property
    def is_file(self) -> bool:
        """Whether the source is a file."""
        return self.source.endswith(".py")

    def digest(self) -> str:
        """A digest of the source file; "" where it is not found.

        Modules that the source imports are not part of it.
        """
        try:
            path = self.source if self.is_file else _origin(self.source)
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else ""
        except OSError:
            return ""


def is_own(method: str) -> bool:
    """Whether a value of ``federated.method`` names a method of the user's."""
    return ":" in method


def identity(method: str) -> str:
    """What tells methods apart: a name of the program's, or NAME@DIGEST of the source.

    The place of the source is no part of it, so that a run may be moved with it.
    """
    if not is_own(method):
        return method
    own = OwnMethod.parse(method)
    return f"{own.name}@{own.digest()}"


def short_name(method: str) -> str:
    """The method without its source, for names of folders."""
    return OwnMethod.parse(method).name if is_own(method) else method


def checked(method: str) -> str:
    """Check the form of a value of ``federated.method``.

    Raises:
        ValueError: where it is neither a known name nor of the form of an own method.
    """
    if is_own(method):
        own = OwnMethod.parse(method)
        dotted = own.source.removesuffix(".py") if own.is_file else own.source
        parts = [dotted[-1:]] if own.is_file else dotted.split(".")
        if not (own.name.isidentifier() and own.name[0] != "_" and all(parts)):
            raise ValueError(f"write {_FORM}, with a NAME that does not begin with _")
        if not own.is_file and not all(part.isidentifier() for part in parts):
            raise ValueError(f"{own.source!r} is neither a .py file nor a module; write {_FORM}")
        return method
    if method not in METHOD_NAMES:
        near = difflib.get_close_matches(method, METHOD_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"must be one of {', '.join(METHOD_NAMES)}, or {_FORM}{hint}")
    return method


def _origin(module: str) -> str:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return ""
    return (found.origin if found is not None else "") or ""
