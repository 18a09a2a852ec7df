"""The ledger of releases: on the disk before what it tells of is released. Needs no torch.

    {"event": "start", "key": "0123456789abcdef", "clip": 1.0, "noise_multiplier": 2.0, ...}
    {"event": "release", "round": 1, "tag": "..."}

A tag is a keyed digest of a round's clipped sum. The same sum gets the same noise, so a killed and
repeated round is the same release; another sum is one more.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sfed.utils import files, json_text
from sfed.utils.errors import CheckpointError, UserError

LEDGER_FILE = "privacy.jsonl"
"""In a run folder."""


class Ledger:
    """The releases of a run."""

    def __init__(
        self, path: Path, start: Mapping[str, Any], releases: Iterable[tuple[int, str]] = ()
    ) -> None:
        """Hold what there is; nothing is written.

        Args:
            path: of the file.
            start: what its first line says.
            releases: round, from 1, and tag of each.
        """
        self.path, self.start = path, dict(start)
        self._releases = dict.fromkeys(releases)

    @staticmethod
    def read(path: Path) -> Ledger | None:
        """Read a ledger; None where there is none.

        A last line without its end was not on the disk when the process was killed, so what it
        tells of was not released.

        Raises:
            CheckpointError: where it cannot be read, or a line is none of a ledger.
        """
        try:
            with json_text.open_file(path) as file:
                lines = file.read().split(b"\n")[:-1]
            events = [json_text.parse(line.decode()) for line in lines]
            return Ledger(path, _start(events[0]), map(_release, events[1:])) if events else None
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = str(error.strerror)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path}, which counts what the run has released, cannot be read ({reason}); put back "
            "a copy, or begin anew with output.resume=never"
        ) from None

    @property
    def rounds(self) -> list[int]:
        """The round of each release, from 1."""
        return [number for number, _ in self._releases]

    def begin(self) -> None:
        """Write what is held as the whole file, which drops a last line without its end.

        Raises:
            UserError: where it cannot be written.
        """
        events = [self.start, *(_event(*one) for one in self._releases)]
        try:
            with files.replacing(self.path) as temporary:
                temporary.write_text("".join(map(_line, events)), encoding="utf-8")
                files.sync(temporary)
            files.sync(self.path.parent)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def add(self, number: int, tag: str) -> None:
        """Note a release, on the disk; one that is noted already is the same release.

        Raises:
            UserError: where it cannot be written: then nothing may be released.
        """
        if (number, tag) in self._releases:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(_event(number, tag)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self._releases[number, tag] = None


def _event(number: int, tag: str) -> dict[str, Any]:
    return {"event": "release", "round": number, "tag": tag}


def _start(event: Any) -> dict[str, Any]:
    if event["event"] != "start" or not isinstance(event["key"], str):
        raise ValueError("the first line is no start")
    return dict(event)


def _release(event: Any) -> tuple[int, str]:
    number, tag = event["round"], event["tag"]
    if event["event"] != "release" or type(number) is not int or number < 1:
        raise ValueError("a line is no release")
    if not re.fullmatch(r"[0-9a-f]{64}", tag):
        raise ValueError("a tag is no digest")
    return number, tag


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event) + "\n"


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written ({error.strerror}), so nothing more is released; make room, "
        "then start again: the run resumes from the newest complete checkpoint"
    )
