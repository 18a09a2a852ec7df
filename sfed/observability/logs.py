"""Log lines: Python's logging, with time and process in every line where nobody watches.

On a terminal a line is what it says. In a file, a Slurm log or a pod's log it begins with time and
process; with ``--log-format json`` it is an object with the numbers beside the text. Every line
goes to stdout at once, warnings of other libraries too, and none holds a secret. A command whose
results are for other programs sends them to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sys
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sfed.utils import command
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask, masked
from sfed.utils.text import printable

LOG = logging.getLogger("sfed")

# Option, the variable that stands for it where there is no command line of one's own (the runs of
# a sweep, a pod's environment), and what it takes, the default first.
_OPTIONS = {
    "--log-level": ("SFED_LOG_LEVEL", ("info", "debug", "warning", "error")),
    "--log-format": ("SFED_LOG_FORMAT", ("text", "json")),
}
USAGE = """
  --log-level debug|info|warning|error   what is said (default info); debug: every step of every
                                         process; or SFED_LOG_LEVEL in the environment
  --log-format text|json                 json: an object per line; or SFED_LOG_FORMAT"""


def take_options(arguments: Sequence[str]) -> list[str]:
    """Take the options of logging out of a command's arguments; returns the others.

    They go into the environment, where the processes that this one starts find them.

    Raises:
        UserError: where a value is missing or unknown.
    """
    rest: list[str] = []
    words = list(arguments)
    while words:
        option, equals, value = words.pop(0).partition("=")
        if option not in _OPTIONS:
            rest.append(option + equals + value)
            continue
        value = value if equals else words.pop(0) if words else ""
        os.environ[_OPTIONS[option][0]] = _checked(option, value)
    return rest


def _chosen(option: str) -> str:
    variable, known = _OPTIONS[option]
    return _checked(option, os.environ.get(variable) or known[0])


def _checked(option: str, value: str) -> str:
    variable, known = _OPTIONS[option]
    if value not in known:
        raise UserError(f"{option} (or {variable}) = {value!r}: it is one of {', '.join(known)}")
    return value


def is_json() -> bool:
    """Whether every line is an object."""
    return _chosen("--log-format") == "json"


def begin(process: int, run: str | None = None, *, to_stderr: bool = False) -> None:
    """Configure logging of this process by the options. A second call replaces the first.

    Args:
        process: number of this process.
        run: name of its run, for lines that are objects.
        to_stderr: whether stdout is for results alone.

    Raises:
        UserError: where an option in the environment is unknown.
    """
    level = logging.getLevelName(_chosen("--log-level").upper())
    handler = _Lines("stderr" if to_stderr else "stdout")
    objects = _Objects(process, run)
    handler.setFormatter(objects if is_json() else _Text(process, handler.stream_name))
    command.print_errors_as(objects.of_error if is_json() else str)
    root = logging.getLogger()
    for earlier in [one for one in root.handlers if isinstance(one, _Lines)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    LOG.setLevel(level)
    # Other libraries' chatter is of use to who looks for a fault.
    root.setLevel(logging.INFO if level == logging.DEBUG else max(level, logging.WARNING))


class _Lines(logging.Handler):
    """To whatever stdout is now: a progress bar takes it over for a while. Flushed at once."""

    def __init__(self, stream_name: str) -> None:
        super().__init__()
        self.stream_name = stream_name

    def emit(self, record: logging.LogRecord) -> None:
        stream = getattr(sys, self.stream_name)
        stream.write(self.format(record) + "\n")
        stream.flush()


class _Text(logging.Formatter):
    def __init__(self, process: int, stream_name: str) -> None:
        super().__init__()
        self._process, self._stream_name = process, stream_name

    def format(self, record: logging.LogRecord) -> str:
        text = printable(mask(_message(record)), keep="\n\t")
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        prefix, lines = f"[process {self._process}] ", text.splitlines() or [""]
        if not getattr(sys, self._stream_name).isatty():
            prefix = f"{datetime.fromtimestamp(record.created):%Y-%m-%d %H:%M:%S} {prefix}"
            return "\n".join(prefix + line for line in lines)
        prefix = "" if self._process == 0 else prefix
        width = shutil.get_terminal_size().columns
        return "\n".join(_wrapped(prefix + line, width) for line in lines)


def _wrapped(line: str, width: int) -> str:
    """Broken between words, as a terminal does not; no name of a file is broken."""
    if len(line) <= width:
        return line
    return textwrap.fill(
        line,
        width,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


class _Objects(logging.Formatter):
    def __init__(self, process: int, run: str | None) -> None:
        super().__init__()
        self._source = {"process": process, "host": socket.gethostname()}
        self._source |= {} if run is None else {"run": run}

    def format(self, record: logging.LogRecord) -> str:
        facts: Mapping[str, Any] = getattr(record, "facts", {})
        moment = datetime.fromtimestamp(record.created).astimezone()
        return json.dumps(
            masked(
                {
                    "time": moment.isoformat(timespec="milliseconds"),
                    "level": record.levelname.lower(),
                    **self._source,
                    **facts,
                    "message": mask(_message(record)),
                }
            )
        )

    def of_error(self, text: str) -> str:
        """The object of an error that ends this process."""
        error = {"name": LOG.name, "levelname": "ERROR", "msg": text}
        return self.format(logging.makeLogRecord(error))


def _message(record: logging.LogRecord) -> str:
    """What a record says, and where it is from, if not from here."""
    text = record.getMessage()
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    return text if record.name.partition(".")[0] == LOG.name else f"{record.name}: {text}"
