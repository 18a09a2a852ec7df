"""What a check found; what a person sees of it, the summary and the JSON. Needs no torch."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sfed.utils.command import write_json
from sfed.utils.redaction import mask, masked
from sfed.utils.text import duration
from sfed.utils.version import __version__

_WIDEST_NAME = 21
_LEAST_WIDTH = 80
_INDENT = " " * 4

Status = Literal["ok", "warning", "failed", "skipped"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "failed", "skipped")


@dataclass(frozen=True)
class Result:
    """What a check found."""

    status: Status
    seen: str
    """What was seen, in one sentence; of a skipped check, why."""
    remedy: str = ""
    """What to do, in one sentence; empty where there is nothing to do."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Numbers, as they go into JSON."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def ok(seen: str, **figures: Any) -> Result:
    """Return the result of a check that found nothing wrong."""
    return Result("ok", seen, figures=figures)


def warning(seen: str, remedy: str, **figures: Any) -> Result:
    """Return the result of a check that found what costs speed or may go wrong later."""
    return Result("warning", seen, remedy, figures)


def failed(seen: str, remedy: str, **figures: Any) -> Result:
    """Return the result of a check that found what makes a run fail or its numbers wrong."""
    return Result("failed", seen, remedy, figures)


def skipped(reason: str) -> Result:
    """Return the result of a check that cannot be made here."""
    return Result("skipped", reason)


class Report:
    """The results so far; process 0 prints them."""

    def __init__(self, *, speaks: bool, command: Sequence[str]) -> None:
        """Begin a report.

        Args:
            speaks: whether this process prints and writes.
            command: arguments of the command, for the record.
        """
        self._speaks, self._begun = speaks, time.monotonic()
        self._command = list(command)
        self._check, self._check_begun = "", self._begun
        self.results: dict[str, tuple[Result, float]] = {}
        self.facts: dict[str, Any] = {}
        """What goes into JSON beside the checks."""

    def begin(self, check: str) -> None:
        """A check begins; its name is seen while it lasts."""
        self._check, self._check_begun = check, time.monotonic()
        self._write(f"{check:<{_WIDEST_NAME}} ")

    def end(self, result: Result) -> None:
        """The check that began last has its result."""
        seconds = time.monotonic() - self._check_begun
        self.results[self._check] = (result, seconds)
        self._check = ""
        self._write(f"{result.status:<8}{seconds:6.1f} s  {mask(result.seen)}\n")

    def break_off(self, cause: str) -> None:
        """The examination cannot go on; the check that is under way has failed."""
        remedy = (
            "read what that process and its machine wrote last; repair that first, then run the "
            "doctor again: the checks after this one were not made"
        )
        if not self._check:
            self.begin("the end")
        self.end(failed(cause, remedy))

    @property
    def counts(self) -> dict[str, int]:
        """How many checks ended how."""
        statuses = [result.status for result, _ in self.results.values()]
        return {status: statuses.count(status) for status in STATUSES}

    def summarise(self) -> None:
        """Print what is wrong and what to do."""
        seconds = duration(time.monotonic() - self._begun)
        counts = [f"{count} {status}" for status, count in self.counts.items() if count]
        self._write(f"\n{', '.join(counts)} in {seconds}\n")
        for status, heading in (("failed", "What is wrong"), ("warning", "What may go wrong")):
            found = [
                (name, result)
                for name, (result, _) in self.results.items()
                if result.status == status
            ]
            if found:
                self._write(f"\n{heading}:\n")
            for name, result in found:
                self._write(_wrapped(f"{name}: {result.seen}", 1))
                self._write(_wrapped(f"What to do: {result.remedy}", 2))
        if not self.counts["failed"]:
            self._write("\nNothing that was checked prevents training here.\n")

    def write(self, path: Path | None) -> None:
        """Write the JSON as far as it goes, where a file is given.

        Raises:
            UserError: where it cannot be written.
        """
        if self._speaks:
            write_json(path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values, without secrets."""
        checks = [
            {"name": name, **result.as_json(), "seconds": round(seconds, 3)}
            for name, (result, seconds) in self.results.items()
        ]
        whole = {
            "sfed": __version__,
            "command": self._command,
            "seconds": round(time.monotonic() - self._begun, 3),
            "summary": self.counts,
            **self.facts,
            "checks": checks,
        }
        found: dict[str, Any] = masked(whole)
        return found

    def _write(self, text: str) -> None:
        if self._speaks:
            sys.stdout.write(text)
            sys.stdout.flush()


def _wrapped(text: str, level: int) -> str:
    """Indented, and broken between words."""
    width = max(_LEAST_WIDTH, shutil.get_terminal_size((100, 24)).columns)
    lines = [
        textwrap.fill(
            line,
            width,
            initial_indent=_INDENT * level,
            subsequent_indent=_INDENT * (level + 1),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in mask(text).splitlines()
    ]
    return "\n".join(lines) + "\n"
