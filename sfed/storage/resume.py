"""Which checkpoint a run resumes from: the newest whole one, and never past one that may be whole.

Damage is what is in a checkpoint: a file that is missing or holds other bytes than were written.
Then the checkpoint before is taken. Where the system does not let a checkpoint be read (rights, a
mount that is gone, a disk that returns errors), nothing is known about it: the start is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from sfed.clients.schedule import Course, course_of
from sfed.config.diff import comparable, differences
from sfed.config.schema import Config
from sfed.storage.checkpoint_folder import (
    COMMON,
    FORMATS,
    METADATA_FILE,
    CheckpointRef,
    age_of,
    age_of_name,
    by_age,
    metadata_of,
)
from sfed.utils.errors import CheckpointError
from sfed.utils.files import damage
from sfed.utils.text import shown

_MOST_NAMED = 8
_FACTS: dict[str, tuple[type, ...]] = {
    "finished_rounds": (int,),
    "bad_rounds": (int,),
    "ledger": (list, NoneType),
    "layout_size": (int,),
    "config": (dict,),
    "files": (dict,),
    "data_digests": (list, NoneType),
}
"""What run.json has to say, and of which type."""
_NEWER = {"data_digests"}
"""What earlier versions do not say."""


def find(run_folder: Path, resume: str) -> tuple[CheckpointRef | None, list[str]]:
    """Return the checkpoint to resume from, and a note about each damaged one that was passed over.

    Args:
        run_folder: of the run.
        resume: "auto" for the newest whole one in the run's folder, or a checkpoint folder.

    Raises:
        CheckpointError: where a folder that was asked for is not a whole checkpoint; where there
            are checkpoints and none can be read; where the system keeps a newer one from being
            read.
    """
    if resume != "auto":
        if problem := problem_of(Path(resume)):
            inside = by_age(Path(resume) / "checkpoints")
            hint = f"; its newest checkpoint is {inside[-1]}" if inside else ""
            raise CheckpointError(f"output.resume = {resume!r}: {problem}{hint}")
        return CheckpointRef(Path(resume), metadata_of(Path(resume))), []
    try:
        folders = by_age(run_folder / "checkpoints")
    except OSError as error:
        reason = f"{run_folder / 'checkpoints'} cannot be read ({error.strerror})"
        raise CheckpointError(_no_checkpoint(run_folder, [reason])) from None
    problems: list[tuple[Path, str]] = []
    is_kept_from_us = False
    for folder in reversed(folders):
        problem, is_damage = _look_at(folder)
        if not problem and is_kept_from_us:
            raise CheckpointError(_newest_unreadable(problems, folder))
        if not problem:
            notes = [f"the checkpoint {one} is damaged and passed over: {p}" for one, p in problems]
            return CheckpointRef(folder, metadata_of(folder)), notes
        is_kept_from_us |= not is_damage
        problems.append((folder, problem))
    if problems:
        raise CheckpointError(
            _no_checkpoint(run_folder, [f"{one.name}: {p}" for one, p in problems])
        )
    return None, []


def _no_checkpoint(run_folder: Path, reasons: Sequence[str]) -> str:
    return (
        f"no checkpoint of this run can be read, so nothing in {run_folder} was touched:\n  "
        + "\n  ".join(reasons)
        + "\nmend what keeps them from being read, or put back a copy, and start again; "
        "output.resume=FOLDER resumes from a checkpoint elsewhere, output.resume=never moves this "
        "run aside and begins anew"
    )


def _newest_unreadable(problems: Sequence[tuple[Path, str]], older: Path) -> str:
    lines = "\n  ".join(f"{folder.name}: {problem}" for folder, problem in problems)
    return (
        "the newest checkpoint of this run cannot be read, so nothing in "
        f"{older.parent.parent} was touched:\n  {lines}\nthat is not damage, after which the one "
        "before would be taken: mend what keeps it from being read and start again, or resume from "
        f"the one before with output.resume={older}"
    )


def later_than(found: CheckpointRef, parent: Path) -> list[Path]:
    """The checkpoints in a folder that are of a later state than one that is gone on from.

    Raises:
        OSError: as of ``by_age``.
    """
    age = age_of(found.metadata)
    return [path for path in by_age(parent) if (age_of_name(path.name) or age) > age]


def refuse_other_run(found: CheckpointRef, config: Config, num_clients: int) -> None:
    """Refuse to resume with settings under which the numbers would have been others.

    Raises:
        CheckpointError: naming each key with both values.
    """
    # Keys that an older version did not have are at their defaults.
    before = comparable(Config(), num_clients) | found.metadata["config"]
    before.pop("federated.num_rounds", None)  # of an older version, which refused another number
    changed = differences(before, comparable(config, num_clients))
    if changed:
        raise CheckpointError(
            f"the run in {found.folder.parent.parent} was made with other settings:\n  "
            + "\n  ".join(changed)
            + "\nset them back, or choose another output.name, or set output.resume=never to begin "
            "anew"
        )


def refuse_fewer_rounds(found: CheckpointRef, config: Config) -> None:
    """Refuse to end before a round that has begun.

    Raises:
        CheckpointError: with both numbers.
    """
    begun, asked = begun_rounds(found), config.federated.num_rounds
    if asked < begun:
        raise CheckpointError(
            f"federated.num_rounds = {asked}: the run in {found.folder.parent.parent} has finished "
            f"{found.metadata['finished_rounds']} rounds and begun {begun}; set it to at least "
            f"{begun}, or choose another output.name, or set output.resume=never to begin anew"
        )


def begun_rounds(found: CheckpointRef) -> int:
    """How many rounds have begun: the finished ones, and one that was stopped within."""
    finished, is_within = age_of(found.metadata)
    return finished + is_within


def course_from(found: CheckpointRef | None, config: Config) -> Course:
    """The course of the learning rate of a start.

    Args:
        found: the checkpoint that is resumed; None where the run begins.
        config: of the start.
    """
    total = config.federated.num_rounds
    if found is None:
        return course_of(None, total)
    planned = found.metadata["config"].get("federated.num_rounds", total)
    before = course_of(found.metadata.get("course"), planned)
    return before.resumed(begun_rounds(found), total)


def refuse_other_data(found: CheckpointRef, digests: Sequence[str]) -> None:
    """Refuse to resume with rows that are not those of the run so far.

    Args:
        found: the checkpoint; one of an earlier version does not know its data.
        digests: of what each client reads now.

    Raises:
        CheckpointError: naming the clients.
    """
    known = found.metadata.get("data_digests") or digests
    pairs = enumerate(zip_longest(known, digests))
    changed = [str(client) for client, (before, now) in pairs if before != now]
    if changed:
        more = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
        raise CheckpointError(
            f"data: client {', '.join(changed[:_MOST_NAMED])}{more} reads other rows, or other "
            f"tokens of them, than the run in {found.folder.parent.parent} did so far; put the "
            "data back, or choose another output.name, or set output.resume=never to begin anew"
        )


class _UnknownFormatError(Exception):
    """A checkpoint is of a format that this version does not know."""


def problem_of(folder: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint that can be read; None where nothing does.

    Every byte is compared with its digest.
    """
    return _look_at(folder)[0]


def _look_at(folder: Path) -> tuple[str | None, bool]:
    """What keeps a folder from being a whole checkpoint, and whether that is damage of it."""
    try:
        return _damage(folder), True
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})", False
    except _UnknownFormatError as error:
        return str(error), False


def _damage(folder: Path) -> str | None:
    """What is wrong with the content of a checkpoint; None where nothing is.

    Raises:
        OSError: where it cannot be read; a file that is missing is damage.
    """
    file = folder / METADATA_FILE
    try:
        facts = metadata_of(folder)
        if wrong := _wrong_facts(facts) or _wrong_name(folder.name, facts):
            return wrong
        for name, known in facts["files"].items():
            file = folder / name
            if wrong := damage(file, known):
                return wrong
    except OSError as error:
        leads_nowhere = any(path.is_symlink() and not path.exists() for path in (file, folder))
        if isinstance(error, FileNotFoundError) and not leads_nowhere:
            return f"{file.name} is missing"
        raise OSError(error.errno, error.strerror, str(file)) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{METADATA_FILE} is not readable ({type(error).__name__}: {error})"
    return None


def _wrong_facts(facts: Any) -> str | None:
    """What keeps ``run.json`` from being that of a checkpoint.

    Raises:
        _UnknownFormatError: where a later version of sfed has written it.
    """
    if not isinstance(facts, dict):
        return f"{METADATA_FILE} holds {type(facts).__name__}, not an object"
    if facts.get("format", 1) not in FORMATS:
        raise _UnknownFormatError(
            f"{METADATA_FILE} is of format {facts['format']!r} and this version of sfed reads "
            f"{' and '.join(map(str, FORMATS))}; use the version that wrote it, or a later one"
        )
    if missing := sorted(_FACTS.keys() - _NEWER - facts.keys()):
        return f"{METADATA_FILE} lacks {', '.join(missing)}"
    for name, kinds in _FACTS.items():
        if type(facts.get(name)) not in kinds:
            return f"{METADATA_FILE}: {name} is {type(facts.get(name)).__name__}"
    wrong = _wrong_details(facts)
    return None if wrong is None else f"{METADATA_FILE}: {wrong}"


def _wrong_details(facts: Mapping[str, Any]) -> str | None:
    """What is wrong within the facts, whose types are right."""
    counts = {name: facts[name] for name in ("finished_rounds", "bad_rounds", "layout_size")}
    counts["federated.num_clients"] = facts["config"].get("federated.num_clients", 1)
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**63:
            return f"{name} is {shown(value)}, not a count"
    if not _is_course(facts.get("course")):
        return "course is no list of rounds"
    if not isinstance(facts.get("unreported"), dict | NoneType):
        return "unreported is not an object"
    if not all(isinstance(one, str) for one in facts.get("data_digests") or ()):
        return "data_digests are not texts"
    if facts["ledger"] is not None and np.asarray(facts["ledger"], dtype=np.float64).ndim != 2:
        return "ledger is no table"
    return _wrong_files(facts["files"]) or _wrong_packs(facts)


def _is_course(parts: Any) -> bool:
    """Whether these are parts of a course, as ``clients/schedule`` has them, or None."""
    if parts is None:
        return True
    try:
        firsts = [first for first, total in parts if 0 < total < 2**63]
    except (TypeError, ValueError):
        return False
    whole = all(type(number) is int for part in parts for number in part)
    return (
        whole
        and firsts[:1] == [0]
        and firsts == sorted(set(firsts))
        and (len(firsts) == len(parts))
    )


def _wrong_files(files: Mapping[str, Any]) -> str | None:
    for name, known in files.items():
        if Path(name).name != name or not isinstance(known, dict):
            return f"{shown(name)} is no file of a checkpoint with its size and digest"
    return None if COMMON in files else f"it does not name {COMMON}"


def _wrong_packs(facts: Mapping[str, Any]) -> str | None:
    """What is wrong with whose state is in which file; the files are right."""
    if facts.get("format", 1) == 1:
        return None
    packs = facts.get("packs")
    if not isinstance(packs, dict) or not all(isinstance(some, list) for some in packs.values()):
        return "packs is no object of lists"
    clients = [client for some in packs.values() for client in some]
    if not all(type(client) is int for client in clients) or len(set(clients)) < len(clients):
        return "packs names a client twice, or what is none"
    if missing := packs.keys() - facts["files"].keys():
        return f"packs names {shown(min(missing))}, which is no file of the checkpoint"
    return None


def _wrong_name(name: str, facts: Mapping[str, Any]) -> str | None:
    if age_of_name(name) in (None, age_of(facts)):
        return None
    return f"{METADATA_FILE} is of another checkpoint, after {facts['finished_rounds']} rounds"
