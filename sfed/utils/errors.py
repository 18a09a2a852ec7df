"""Errors that are raised in several folders."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the configuration, the data or the arguments: one plain message, exit code 2.

    The message names the key or file, the value, the bound and the remedy. It may come from any
    process; only process 0 prints it.
    """


class DivergedError(RuntimeError):
    """Processes hold different values of what has to be the same."""


class MissingProcessError(RuntimeError):
    """Another process did not come to a meeting point before the deadline."""
