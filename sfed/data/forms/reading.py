"""What was read of the data: used and ignored columns, lengths, and what truncation took away.

Needs no torch. Values are plain, so that processes which read different files can add them up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sfed.config.schema import Config

_QUANTILES = (0.5, 0.9, 0.99)
_WARNED_SHARE = 0.01
_NAMES = {"train": "training", "eval": "held-out"}


@dataclass
class Reading:
    """What the tables of some splits hold, added up."""

    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """Split -> tokens before truncation -> rows with a completion, those left out too."""
    gone: Counter[str] = field(default_factory=Counter)
    """Split -> rows above ``data.max_tokens`` that are left out."""
    used: set[str] = field(default_factory=set)
    """The columns of which some row was read."""
    others: set[str] = field(default_factory=set)

    def add(self, split: str, lengths: Mapping[int, int], gone: int) -> None:
        """Add the rows of a table."""
        self.lengths.setdefault(split, Counter()).update(lengths)
        self.gone[split] += gone

    def to_json(self) -> dict[str, Any]:
        """The same as lists and objects."""
        return {
            "lengths": {split: sorted(found.items()) for split, found in self.lengths.items()},
            "gone": dict(self.gone),
            "used": sorted(self.used),
            "others": sorted(self.others),
        }

    @staticmethod
    def of_json(parts: Iterable[Mapping[str, Any]]) -> Reading:
        """Add up what several processes have read."""
        whole = Reading()
        for part in parts:
            for split, found in part["lengths"].items():
                whole.add(split, dict(found), part["gone"][split])
            whole.used.update(part["used"])
            whole.others.update(part["others"])
        return whole


@dataclass(frozen=True)
class Truncated:
    """Of a split: how many examples each client holds, and how many of them are truncated."""

    counts: Sequence[int]
    truncated: Sequence[int]

    def shares(self) -> list[float]:
        """Share of the truncated examples of each client."""
        return [
            cut / count if count else 0.0
            for count, cut in zip(self.counts, self.truncated, strict=True)
        ]

    def worst(self) -> str:
        """The client with the largest share, in words; empty where nothing is truncated."""
        shares = self.shares()
        client = int(np.argmax(shares))
        if not shares[client] or len(shares) == 1:
            return ""
        return f" (most of client {client}: {self.truncated[client]:,} of {self.counts[client]:,})"


def column_line(config: Config, reading: Reading) -> str:
    """Say what is used and what is ignored of the rows; empty where no row was read."""
    own = {name: column for name, column in config.data.columns.items() if column in reading.used}
    ignored = sorted(reading.others - reading.used - {config.partition.key})
    named = [
        *(f"{name} from {column!r}" for name, column in own.items()),
        *sorted(reading.used - set(own.values())),
    ]
    if not named:
        return ""
    return f"columns: {', '.join(named)}; ignored: {', '.join(ignored) or 'none'}"


def length_lines(
    config: Config, reading: Reading, by_split: Mapping[str, Truncated]
) -> tuple[list[str], list[str]]:
    """Return what is said of lengths and truncation, and what is warned of.

    Args:
        config: of the run.
        reading: of all processes.
        by_split: of each split, what the clients hold.
    """
    lines, warnings, limit = [], [], config.data.max_tokens
    for split, name in _NAMES.items():
        lengths, held, gone = reading.lengths.get(split), by_split[split], reading.gone[split]
        parts, cut = [_quantiles(lengths)] if lengths else [], sum(held.truncated)
        if config.data.on_long == "drop" and gone:
            parts.append(
                f"{gone:,} are longer than data.max_tokens = {limit} and are dropped "
                "(data.on_long=drop)"
            )
        elif cut or gone:
            parts.append(
                f"data.max_tokens = {limit} truncates {cut:,} of {sum(held.counts):,}{held.worst()}"
            )
            if gone:
                parts.append(f"{gone:,} more are left out, as nothing of their answer is left")
        line = f"lengths of {name} examples: {'; '.join(parts)}"
        if parts:
            lines.append(line)
        if max([_share_above(limit, lengths), *held.shares()]) > _WARNED_SHARE:
            warnings.append(f"{line}; raise data.max_tokens, or see data.on_long")
    return lines, warnings


def _share_above(limit: int, lengths: Counter[int] | None) -> float:
    """Share of the rows that are longer, those left out too; 0 where no row was read."""
    counts = lengths or Counter()
    return sum(n for length, n in counts.items() if length > limit) / max(1, counts.total())


def _quantiles(lengths: Counter[int]) -> str:
    """Quantiles in words, each a length that a row has."""
    values = np.array(sorted(lengths))
    below = np.cumsum([lengths[value] for value in values.tolist()])
    places = [np.searchsorted(below, share * below[-1]) for share in _QUANTILES]
    parts = [
        f"{100 * share:.0f} % have at most {values[place]:,}"
        for share, place in zip(_QUANTILES, places, strict=True)
    ]
    return f"{', '.join(parts)}, the longest {values[-1]:,} tokens"


def header_lines(
    config: Config, reading: Reading, tables: Sequence[dict[str, Any]]
) -> tuple[list[str], list[str]]:
    """What the header says of columns and lengths, and what is warned of."""
    truncated = {
        split: Truncated([len(t[split]) for t in tables], [t["truncated"][i] for t in tables])
        for i, split in enumerate(("train", "eval"))
    }
    lines, warnings = length_lines(config, reading, truncated)
    columns = column_line(config, reading)
    return ([columns] if columns else []) + lines, warnings
