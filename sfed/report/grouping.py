"""Runs that belong together: seeds of one setting, and one method over N and r. Needs no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfed.observability.metrics import deviation
from sfed.report.plotting import Curve
from sfed.report.series import Reader
from sfed.storage.run_record import RunRecord

CLIENTS, RANK = "federated.num_clients", "lora.rank"
_LETTERS = {CLIENTS: "N", RANK: "r"}
# What moves work around and leaves the numbers as they are.
_PLACEMENT = (
    "federated.clients_per_pass",
    "train.micro_batch_size",
    "evaluation.batch_size",
    "backbone.sharding",
    "backbone.offload",
    "backbone.gradient_checkpointing",
)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    stories: Sequence[RunRecord]

    def curve(self, read: Reader, label: str | None = None) -> Curve:
        """Mean over the seeds of a number, for the rounds that all of them have."""
        by_round: dict[float, list[float]] = {}
        for story in self.stories:
            for event in story.rounds:
                if (value := read(story, event)) is not None:
                    by_round.setdefault(float(event["round"]), []).append(value)
        whole = {x: ys for x, ys in sorted(by_round.items()) if len(ys) == len(self.stories)}
        spread = [deviation(ys) for ys in whole.values()] if len(self.stories) > 1 else []
        points = [(x, statistics.fmean(ys)) for x, ys in whole.items()]
        return Curve(self.label if label is None else label, points, spread)

    @property
    def last_round(self) -> int | None:
        """The last round that all runs have evaluated."""
        rounds = [{event["round"] for event in story.evaluated} for story in self.stories]
        return max(set.intersection(*rounds), default=None) if rounds else None

    def last(self, read: Reader) -> list[float]:
        """A number of each run after ``last_round``; nothing where a run has none.

        A mean over the others would be that of the seeds that went well.
        """
        at = self.last_round
        ends = [
            read(story, event)
            for story in self.stories
            for event in story.evaluated
            if event["round"] == at
        ]
        known = [value for value in ends if value is not None]
        return known if len(known) == len(ends) else []


def settings(story: RunRecord) -> dict[str, Any]:
    """What may set a run apart from another, as dotted names; N as it was in fact."""
    flat: dict[str, Any] = {CLIENTS: story.num_clients}
    for section, values in story.config.items():
        if section not in ("resolved", "versions", "output", "seed"):
            pairs = values.items() if isinstance(values, dict) else ()
            flat |= {f"{section}.{name}": value for name, value in pairs}
    for name, own in list(flat.items()):
        if name.startswith("clients.") and isinstance(own, dict):  # each of what a client has
            del flat[name]
            flat |= {f"{name} {key}": value for key, value in own.items() if value is not None}
    flat[CLIENTS] = story.num_clients
    return flat


def group(stories: Sequence[RunRecord], ignored: Sequence[str] = ()) -> list[Group]:
    """Put runs together that differ only in the seed (and in ``ignored`` settings).

    Two runs with equal settings and an equal seed are no repetition: each is a group of its own.
    """
    found: list[tuple[str, list[RunRecord]]] = []
    for story in stories:
        kept = {key: value for key, value in settings(story).items() if key not in ignored}
        key = json.dumps(kept, sort_keys=True)
        for known, members in found:
            seeds = [member.config.get("seed") for member in members]
            if known == key and (ignored or story.config.get("seed") not in seeds):
                members.append(story)
                break
        else:
            found.append((key, [story]))
    names = [n for n in differing([members[0] for _, members in found]) if n not in ignored]
    labels = [label_of(members[0], names) for _, members in found]
    return [
        Group(label if labels.count(label) == 1 else f"{label}, {members[0].name}", members)
        for label, (_, members) in zip(labels, found, strict=True)
    ]


def differing(stories: Sequence[RunRecord]) -> list[str]:
    """The settings in which runs differ, beside the method, as dotted names."""
    all_settings = [settings(story) for story in stories]
    names = dict.fromkeys(name for one in all_settings for name in one)
    return [
        name
        for name in names
        if name != "federated.method"
        and len({json.dumps(one.get(name), sort_keys=True) for one in all_settings}) > 1
    ]


def label_of(story: RunRecord, names: Sequence[str]) -> str:
    """The method of a run and its values of the first three settings: sfed, N = 4, r = 8."""
    first = sorted(names, key=lambda name: name not in _LETTERS)[:3]
    return ", ".join([story.method, *phrases(story, first)])


def phrases(story: RunRecord, names: Sequence[str]) -> list[str]:
    """The values of settings, each with its name, such as r = 8; a word says what it is."""
    values = settings(story)
    return [
        value
        if isinstance(value := values.get(name), str)
        else f"{_LETTERS.get(name, name.rpartition('.')[2])} = {_short(value)}"
        for name in names
    ]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


@dataclass(frozen=True)
class Axis:
    """N or r as what a figure runs along."""

    name: str
    letter: str
    words: str
    position: int
    """Where it stands in the pair (N, r)."""

    @property
    def other(self) -> Axis:
        """The one that is held fixed."""
        return BY_CLIENTS if self is BY_RANK else BY_RANK


BY_CLIENTS = Axis("num-clients", "N", "number of clients N", 0)
BY_RANK = Axis("rank", "r", "LoRA rank r", 1)


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in N, in r and in the seed: one method, as a rule."""

    label: str
    cells: Mapping[tuple[float, float], Group]
    """The seeds of each pair (N, r)."""

    def along(self, axis: Axis, fixed: float) -> dict[float, Group]:
        """The runs along an axis where the other one has a value."""
        return {
            pair[axis.position]: cell
            for pair, cell in sorted(self.cells.items())
            if pair[axis.other.position] == fixed
        }

    def fixed_values(self, axis: Axis) -> list[float]:
        """Values of the other axis that have at least two points along this one."""
        values = sorted({pair[axis.other.position] for pair in self.cells})
        return [value for value in values if len(self.along(axis, value)) > 1]


def sweeps(stories: Sequence[RunRecord]) -> list[Sweep]:
    """Sort the runs with a known N and one r by all other settings, then by (N, r)."""
    placed = [
        story
        for story in stories
        if story.num_clients and len(set(story.ranks)) == 1 and story.ranks[0] > 0
    ]
    found = []
    for one in group(placed, ignored=(CLIENTS, RANK, *_PLACEMENT)):
        cells: dict[tuple[float, float], list[RunRecord]] = {}
        for story in one.stories:
            pair = story.num_clients or 0.0, story.ranks[0]
            cells.setdefault(pair, []).append(story)
        groups = {pair: Group(one.label, members) for pair, members in sorted(cells.items())}
        found.append(Sweep(one.label, groups))
    return found
