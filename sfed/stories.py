"""Run folders as they are on disk, finished or still going on, and runs that belong together.

Needs no torch.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfed import metrics
from sfed.cli import UserError
from sfed.figures import Curve

Event = Mapping[str, Any]
KINDS = {
    "personal": "each client's own adapter, its own data",
    "global": "global adapter, everybody's data",
}


@dataclass(frozen=True)
class Story:
    """What a run folder tells."""

    folder: Path
    config: Mapping[str, Any]
    rounds: Sequence[Event]
    """Events of the rounds in order; 0 is the state before any training."""
    labels: Mapping[int, Mapping[str, int]]
    """Examples per label of each client, where the partition knows labels."""
    sizes: Mapping[int, int]
    """Training examples of each client."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def evaluated(self) -> list[Event]:
        """The rounds with a held-out loss."""
        return [
            event
            for event in self.rounds
            if any(held_out(event, kind) is not None for kind in KINDS)
        ]

    @property
    def method(self) -> str:
        """Name of the federated method."""
        return str(look(self.config, "federated.method") or "method unknown")

    @property
    def num_clients(self) -> float | None:
        """Number of clients, N."""
        given = number(self.config, "resolved.num_clients")
        return given or number(self.config, "federated.num_clients") or len(self.sizes) or None

    @property
    def progress(self) -> str:
        """Rounds done of rounds planned."""
        done = self.rounds[-1]["round"] if self.rounds else 0
        planned = number(self.config, "federated.num_rounds")
        if planned is None:
            return f"{done} rounds done"
        going = "" if done >= planned else " so far (still going on, or stopped)"
        return f"{done} of {planned:g} rounds{going}"

    def title(self, client: int) -> str:
        """The client's number, and what it holds where that is one thing."""
        one = len(self.labels.get(client, {})) == 1
        return f"{client} {self.holds(client)}" if one else f"client {client}"

    def holds(self, client: int) -> str:
        """What a client holds, in a few words."""
        counts = sorted(self.labels.get(client, {}).items(), key=lambda item: -item[1])
        total = sum(count for _, count in counts)
        if len(counts) == 1:
            return counts[0][0]
        words = [f"{label} {100 * count / total:.0f} %" for label, count in counts[:3] if count]
        return ", ".join(words) + (", ..." if len(counts) > 3 else "")


def look(data: Any, dotted: str) -> Any:
    """Return the value under a dotted name; None where there is none."""
    for part in dotted.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def number(data: Any, dotted: str) -> float | None:
    """Return the finite number under a dotted name; None for anything else."""
    value = look(data, dotted)
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None


def held_out(event: Event, kind: str, mean: str = "_unweighted") -> float | None:
    """The held-out loss of a round: mean over clients, unweighted unless told otherwise."""
    return number(event, f"eval/{kind}_loss{mean}")


def clients_of(event: Event) -> list[Event]:
    """The clients of a round that have a number."""
    entries = event.get("clients")
    return [
        entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("client"), int)
    ]


def read_story(folder: Path) -> Story:
    """Read a run folder.

    Raises:
        UserError: where it is missing, is no run folder, or is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"the run folder {str(folder)!r} does not exist")
    if not (folder / "metrics.jsonl").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        hint = f"; there are runs in it: {', '.join(inside)}" if inside else ""
        raise UserError(f"{str(folder)!r} holds no metrics.jsonl, so it is no run folder{hint}")
    try:
        found = list(metrics.read_events(folder / "metrics.jsonl"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'} is not readable: {error}") from None
    rounds = {
        event["round"]: event
        for event in found
        if event.get("event") == "round" and isinstance(event.get("round"), int)
    }
    config = _read_json(folder / "config.json")
    partition = folder / "partition.json"
    parts = clients_of(_read_json(partition)) if partition.is_file() else []
    last = clients_of(rounds[max(rounds)]) if rounds else []
    return Story(
        folder=folder.resolve(),
        config=config,
        rounds=[rounds[key] for key in sorted(rounds)],
        labels={part["client"]: counts for part in parts if (counts := _counts(part))},
        sizes={part["client"]: len(part.get("train") or ()) for part in parts}
        | {entry["client"]: int(n) for entry in last if (n := number(entry, "examples"))},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} is not readable: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds {type(value).__name__}, not an object")
    return value


def _counts(part: Event) -> dict[str, int]:
    labels = part.get("labels")
    pairs = labels.items() if isinstance(labels, dict) else ()
    return {str(label): count for label, count in pairs if isinstance(count, int) and count > 0}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    label: str
    stories: Sequence[Story]

    def curve(self, kind: str) -> Curve:
        """Mean over the seeds of the held-out loss, for the rounds that all of them have."""
        by_round: dict[float, list[float]] = {}
        for story in self.stories:
            for event in story.rounds:
                if (loss := held_out(event, kind)) is not None:
                    by_round.setdefault(float(event["round"]), []).append(loss)
        whole = {x: ys for x, ys in sorted(by_round.items()) if len(ys) == len(self.stories)}
        spread = [deviation(ys) for ys in whole.values()] if len(self.stories) > 1 else []
        return Curve(self.label, [(x, statistics.fmean(ys)) for x, ys in whole.items()], spread)

    def last(self, kind: str) -> list[float]:
        """Losses of the last evaluated round of each run."""
        ends = [held_out(story.evaluated[-1], kind) for story in self.stories if story.evaluated]
        return [loss for loss in ends if loss is not None]


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation (over n - 1), 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def settings(story: Story) -> dict[str, Any]:
    """What may set a run apart from another, as dotted names; N as it was in fact."""
    flat: dict[str, Any] = {"federated.num_clients": story.num_clients}
    for section, values in story.config.items():
        if section not in ("resolved", "versions", "output", "seed"):
            pairs = values.items() if isinstance(values, dict) else ()
            flat |= {f"{section}.{name}": value for name, value in pairs}
    flat["federated.num_clients"] = story.num_clients
    return flat


def group(stories: Sequence[Story], ignored: Sequence[str] = ()) -> list[Group]:
    """Put runs together that differ only in the seed (and in ``ignored`` settings).

    Two runs with equal settings and an equal seed are no repetition: each is a group of its own.
    """
    found: list[tuple[str, list[Story]]] = []
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
    differing = _differing([json.loads(key) for key, _ in found])
    labels = [_label(members[0], differing) for _, members in found]
    return [
        Group(label if labels.count(label) == 1 else f"{label}, {members[0].name}", members)
        for label, (_, members) in zip(labels, found, strict=True)
    ]


def _differing(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for one in all_settings for name in one)
    return [
        name
        for name in names
        if name != "federated.method"
        and len({json.dumps(one.get(name), sort_keys=True) for one in all_settings}) > 1
    ]


def _label(story: Story, differing: Sequence[str]) -> str:
    values = settings(story)
    short = {"federated.num_clients": "N", "lora.rank": "r"}
    words = [
        f"{short.get(name, name.rpartition('.')[2])} = {_short(values.get(name))}"
        for name in sorted(differing, key=lambda name: name not in short)[:3]
    ]
    return ", ".join([story.method, *words])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
