"""Errors that are raised in several folders."""

from __future__ import annotations

from collections.abc import Collection


class UserError(ValueError):
    """An error in the configuration, the data or the arguments: one plain message, exit code 2.

    The message names the key or file, the value, the bound and the remedy. It may come from any
    process; only process 0 prints it.
    """


class ConfigError(UserError):
    """An error in a configuration file, a ``key=value`` override or a key of a configuration."""


class DataError(UserError):
    """An error in the data: a file, a record, or how records are divided among clients."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, written or resumed with this configuration."""


class TrainingFailedError(RuntimeError):
    """Training cannot continue: clients keep being non-finite, or have not made their steps."""


class DivergedError(RuntimeError):
    """Processes hold different values of what has to be the same."""


class MissingProcessError(RuntimeError):
    """Another process ended, or did not reach a barrier before the deadline."""


_OF_USERS = {kind.__name__: kind for kind in (UserError, ConfigError, DataError, CheckpointError)}


def kind_of(error: UserError) -> str:
    """Name the class of an error, so that another process can raise the same with ``made_of``."""
    name = type(error).__name__
    return name if name in _OF_USERS else UserError.__name__


def made_of(kinds: Collection[str], message: str) -> UserError:
    """Return the error that stands for errors of several processes.

    Args:
        kinds: the classes of the errors, as ``kind_of`` names them.
        message: of the error.

    Returns:
        An error of that class where there is one class only, else a ``UserError``.
    """
    (kind,) = kinds if len(set(kinds)) == 1 else (UserError.__name__,)
    return _OF_USERS[kind](message)
