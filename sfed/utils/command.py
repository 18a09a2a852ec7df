"""How a command of sfed runs: messages for users, and exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from sfed.utils.errors import UserError
from sfed.utils.launcher import rank_or_first
from sfed.utils.redaction import mask
from sfed.utils.text import printable

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
"""As shells say of a program that Ctrl-C has ended: 128 + SIGINT."""
_SECONDS_FOR_PROCESS_0 = 3.0
_LAYOUT = "\n\t"
_OF_FOLDERS = ("CACHE", "HOME", "TMP", "DIR")
"""Words in the names of variables that lead libraries to folders."""
_form: Callable[[str], str] = str


class Parser(argparse.ArgumentParser):
    """Parses the arguments of a command; an error in them is a ``UserError``."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise the error with where the help is."""
        raise UserError(f"{message}; see {self.prog} --help")

    def add_json(self, meaning: str) -> None:
        """Add ``--json FILE``; see ``check_json`` and ``write_json``."""
        self.add_argument("--json", metavar="FILE", type=Path, help=meaning)


def count(text: str) -> int:
    """Return an argument that is a whole number from 1 up.

    Raises:
        ArgumentTypeError: for other texts.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def tell(line: str) -> None:
    """Tell who waits what is under way, on stderr; the results of a command go to stdout."""
    sys.stderr.write(f"{printable(mask(line))}\n")
    sys.stderr.flush()


def check_json(path: Path | None) -> None:
    """Refuse a ``--json FILE`` in a folder that does not exist, before anything is computed."""
    if path is not None and not path.parent.is_dir():
        raise UserError(f"--json {path}: the folder {path.parent} does not exist")


def write_json(path: Path | None, results: object) -> None:
    """Write the results of a command to its ``--json FILE``, where one is given.

    Raises:
        UserError: where it cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None


def run_command(command: Callable[[Sequence[str]], None]) -> None:
    """Run ``command(sys.argv[1:])`` and turn a user's error into one message and exit code 2.

    Only process 0 speaks: under a launcher every process meets the same mistake. Nothing that the
    command makes can be written by everybody, whatever the umask, and no traceback shows a secret.
    """
    os.umask(os.umask(0) | stat.S_IWOTH)
    sys.excepthook = print_masked
    quieten_imports()
    try:
        command(sys.argv[1:])
    except UserError as mistake:
        leave(str(mistake), EXIT_MISTAKE)
    except KeyboardInterrupt:
        leave("stopped by Ctrl-C", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.exit(1)
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        # It has lost another process, and a thread may wait for that one, in a call that does not
        # come back; Python's own way out would trip over it.
        sys.stdout.flush()
        say_error(end.code)
        os._exit(1)


@contextmanager
def importing() -> Iterator[None]:
    """Name the variable of the environment that leads a library, as it is imported, nowhere.

    Raises:
        UserError: where a library cannot make the folder of its cache.
    """
    try:
        yield
    except OSError as error:
        folder = str(error.filename or "")
        above = [
            (len(value), name)
            for name, value in os.environ.items()
            if value and folder.startswith(value) and any(word in name for word in _OF_FOLDERS)
        ]
        if not above:
            raise
        _, name = max(above)
        raise UserError(
            f"{name}={os.environ[name]!r} of the environment: a library cannot write to {folder} "
            f"({error.strerror}); set {name} to a folder that can be written to, or unset it"
        ) from None


def quieten_imports() -> None:
    """Silence what PEFT's import of bitsandbytes says: it asks for a kernel of no use here."""
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)


def print_masked(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback, as Python does, without secrets."""
    say_error("".join(traceback.format_exception(kind, error, trace)).rstrip())


def say_error(text: str) -> None:
    """Print an error on stderr, without secrets; as an object where log lines are objects."""
    sys.stderr.write(f"{_form(printable(mask(text), keep=_LAYOUT))}\n")
    sys.stderr.flush()


def print_errors_as(form: Callable[[str], str]) -> None:
    """Set how errors are printed from now on: ``form`` makes a line of a text."""
    global _form  # noqa: PLW0603  (a process has one stderr, as it has one sys.excepthook)
    _form = form


def leave(message: str, code: int) -> NoReturn:
    """End this process; process 0 says why.

    A launcher ends all processes as soon as one has failed, so the others leave a little later:
    otherwise process 0 might be ended before it has spoken.
    """
    if rank_or_first() == 0:
        say_error(f"sfed: {message}")
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_SECONDS_FOR_PROCESS_0)
    sys.exit(code)
