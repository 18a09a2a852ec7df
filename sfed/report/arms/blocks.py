"""Which arms can be compared: those under one protocol, at one N, r and learning rate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfed.report.grouping import (
    CLIENTS,
    RANK,
    differing,
    group,
    label_of,
    phrases,
    settings,
)
from sfed.storage.run_record import RunRecord, number

RATE = "train.lr"
_PROTOCOL = ("data", "partition", "evaluation")
# What moves work around, and a kind of adapter that is not evaluated has no values anyway.
_FREE = ("evaluation.batch_size", "evaluation.adapters")


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed."""

    key: str
    """Equal for arms that differ in the learning rate alone."""
    name: str
    """What it is, without its learning rate."""
    rate: float | None
    runs: Mapping[int, RunRecord]
    """By seed: those that are finished and evaluated."""
    left_out: Sequence[str]
    """Why other runs of it are not compared, a line each."""
    label: str
    """The name, with the learning rate where the arms of a block differ in it."""

    @property
    def first(self) -> RunRecord | None:
        """The finished run of the first seed; None where none is finished."""
        return next(iter(self.runs.values()), None)


@dataclass(frozen=True)
class Block:
    """Arms of one protocol: the same data, partition, evaluation and N."""

    condition: str
    """What sets it apart from other blocks, such as N = 4, lr = 0.001; empty where it is alone."""
    arms: Sequence[Arm]


Members = Sequence[Sequence[RunRecord]]


def blocks(stories: Sequence[RunRecord], *, by_rate: bool = True) -> list[Block]:
    """Sort runs into arms, and arms into blocks, in the order of the runs.

    Arms of another protocol are in another block. Arms of one protocol are parted by r, and by
    the learning rate, where some value has several arms. Where every arm was run at one rate, its
    own, the rate is a part of the arm and parts nothing.

    Args:
        stories: the runs.
        by_rate: False leaves all learning rates of an arm in one block.
    """
    members = [one.stories for one in group(stories)]
    differ = differing([some[0] for some in members])
    parts = list(_parted(members, [name for name in differ if _is_protocol(name)]))
    parted_by = [name for name in differ if _is_protocol(name)]
    for name in (RANK, RATE) if by_rate and _has_arm_at_several_rates(members) else (RANK,):
        split = [_parted(part, [name]) for part in parts]
        if any(
            len(few) < len(part) and len(few) > 1 for few, part in zip(split, parts, strict=True)
        ):
            parts = [one for few in split for one in few]
            parted_by.append(name)
    named = [name for name in differ if name not in (*parted_by, RATE)]
    shows_rate = RATE in differ and RATE not in parted_by
    return [
        Block(
            ", ".join(phrases(part[0][0], parted_by)),
            _arms(part, named, shows_rate=shows_rate),
        )
        for part in parts
    ]


def _has_arm_at_several_rates(members: Members) -> bool:
    tried = {(_key(values), values.get(RATE)) for values in (settings(some[0]) for some in members)}
    return len({key for key, _ in tried}) < len(tried)


def _key(values: Mapping[str, Any]) -> str:
    """Equal for arms that differ in the learning rate alone."""
    return json.dumps({k: v for k, v in values.items() if k != RATE}, sort_keys=True)


def _is_protocol(name: str) -> bool:
    is_named = name.partition(".")[0] in _PROTOCOL and name not in _FREE
    return is_named or name == CLIENTS


def _parted(members: Members, names: Sequence[str]) -> list[list[Sequence[RunRecord]]]:
    """Groups with equal values of some settings, together."""
    found: dict[str, list[Sequence[RunRecord]]] = {}
    for some in members:
        values = settings(some[0])
        found.setdefault(json.dumps([values.get(name) for name in names]), []).append(some)
    return list(found.values())


def _arms(members: Members, named: Sequence[str], *, shows_rate: bool) -> list[Arm]:
    labels = [label_of(some[0], [*named, *([RATE] if shows_rate else [])]) for some in members]
    return [
        _arm(some, named, label if labels.count(label) == 1 else f"{label}, {some[0].name}")
        for label, some in zip(labels, members, strict=True)
    ]


def _arm(stories: Sequence[RunRecord], named: Sequence[str], label: str) -> Arm:
    runs, left_out = {}, []
    for story in stories:
        seed, reason = story.config.get("seed"), _why_left_out(story)
        if reason or not isinstance(seed, int):
            left_out.append(f"{story.name}: {reason or 'its seed is unknown'}")
        else:
            runs[seed] = story
    values: dict[str, Any] = settings(stories[0])
    return Arm(
        key=_key(values),
        name=label_of(stories[0], named),
        rate=number(stories[0].config, RATE),
        runs=dict(sorted(runs.items())),
        left_out=left_out,
        label=label,
    )


def _why_left_out(story: RunRecord) -> str:
    """Why a run has no last round to compare; empty where it has one."""
    done = story.rounds[-1]["round"] if story.rounds else 0
    planned = number(story.config, "federated.num_rounds")
    if planned is None or done < planned:
        return story.progress
    if not story.evaluated or story.evaluated[-1]["round"] != done:
        return "its last round is not evaluated"
    return ""
