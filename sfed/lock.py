"""A run folder belongs to one run at a time. Needs no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from sfed.cli import UserError

_NAME = "lock"
_SECONDS_TO_FREE = 3.0
"""For a run that was just killed to be gone."""
_SECONDS_BETWEEN_TRIES = 0.2
_TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Held by process 0 of a run; the system frees it when that process ends, however it ends.

    It is a POSIX record lock, which NFS passes on to other machines.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def take(self, folder: Path) -> None:
        """Hold a run folder from now on, instead of any other; where there is none, nothing.

        Raises:
            UserError: naming who holds it, or where the folder cannot be written.
        """
        path = folder / _NAME
        try:
            if not _is_there(folder) or self._holds(path):
                return
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"output.dir: the run folder {folder} cannot be written ({error.strerror})"
            ) from None
        self._lock(file, folder)
        self.free()
        self._file = file
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%c")}
        with suppress(OSError):  # on a full disk it holds without saying for whom
            file.truncate(0)
            file.write(json.dumps(holder))
            file.flush()

    def free(self) -> None:
        """Let go of it. The file stays: removing it would part two runs that wait for it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _holds(self, path: Path) -> bool:
        if self._file is None or not path.exists():
            return False
        return os.path.samestat(os.fstat(self._file.fileno()), path.stat())

    @staticmethod
    def _lock(file: IO[str], folder: Path) -> None:
        end = time.monotonic() + _SECONDS_TO_FREE
        while problem := _refusal(file):
            if problem.errno not in _TAKEN:
                logging.getLogger(__name__).warning(
                    "the file system of %s does not lock (%s): see to it that only one run uses "
                    "this folder",
                    folder,
                    problem.strerror,
                )
                return
            if time.monotonic() > end:
                file.seek(0)
                holder = _holder(file.read())
                file.close()
                raise UserError(
                    f"output.dir, output.name: another run is using {folder} ({holder}); wait for "
                    "its end, or choose another output.name"
                )
            time.sleep(_SECONDS_BETWEEN_TRIES)


def _is_there(folder: Path) -> bool:
    """Whether a folder exists; a name that is taken and leads nowhere is an error, not absence."""
    try:
        folder.stat()
    except FileNotFoundError:
        if folder.is_symlink():
            raise
        return False
    return True


def _refusal(file: IO[str]) -> OSError | None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


def _holder(said: str) -> str:
    try:
        holder = json.loads(said)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has not said who it is"
