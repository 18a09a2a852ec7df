"""What a user defines in a file or module: ``FILE.py:NAME`` or ``package.module:NAME``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from sfed.config.own_method import OwnMethod
from sfed.utils.errors import ConfigError
from sfed.utils.text import one_line


def load_named(spec: str, what: str) -> Any:
    """Run a module and return what it calls by a name.

    The code runs with all rights of the process.

    Args:
        spec: FILE.py:NAME or package.module:NAME.
        what: asked for it, for messages.

    Raises:
        ConfigError: where the module is not found, fails, or has no such name.
    """
    own = OwnMethod.parse(spec)
    try:
        module = _of_file(Path(own.source)) if own.is_file else importlib.import_module(own.source)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(
            f"{what} = {spec!r}: {own.source} cannot be imported ({reason})"
        ) from error
    if not hasattr(module, own.name):
        raise ConfigError(f"{what} = {spec!r}: {own.source} defines no {own.name}")
    return getattr(module, own.name)


def _of_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, once per process and content."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    name = f"_sfed_own_method_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
