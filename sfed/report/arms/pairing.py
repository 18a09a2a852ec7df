"""The arms of a block against its reference, client by client of the same seed.

A pair is the same client of the same seed: its data, partition and batches are the same. What has
no partner is named and is in no difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfed.report.arms.blocks import Arm, Block
from sfed.report.arms.differences import Difference, difference, verdict
from sfed.storage.run_record import LOSS, RunRecord, clients_of, number
from sfed.utils.errors import UserError
from sfed.utils.text import some_of

REFERENCE, ALONE, MISSING = "reference", "nothing to compare with", "values missing"
NOT_MEASURED, NO_PAIR = "not measured", "no pair"
_TENTH = 10
Values = Mapping[int, float]
"""By client: its held-out score or loss."""


@dataclass(frozen=True)
class Measure:
    """A held-out loss or score of one kind of adapter."""

    kind: str
    what: str

    @property
    def lower_is_better(self) -> bool:
        """Whether it is a loss."""
        return self.what == LOSS

    def of(self, story: RunRecord) -> Values:
        """The value of each client that has one, after the last evaluated round."""
        pairs = (
            (entry["client"], number(entry, f"{self.kind}_{self.what}"))
            for entry in clients_of(story.evaluated[-1])
        )
        return {client: value for client, value in pairs if value is not None}

    def is_asked(self, story: RunRecord) -> bool:
        """Whether the last evaluated round measured it, even where nothing was finite."""
        key = f"{self.kind}_{self.what}"
        return any(key in entry for entry in clients_of(story.evaluated[-1]))

    def worst(self, values: Sequence[float], count: int) -> float:
        """The mean of the worst clients."""
        return statistics.fmean(sorted(values, reverse=self.lower_is_better)[:count])


@dataclass(frozen=True)
class Compared:
    """An arm beside the reference."""

    condition: str
    label: str
    seeds: int
    """Runs that the means are over."""
    clients: int
    """Most clients of a run."""
    mean: float | None
    worst: float | None
    tenth: float | None
    """Mean of the worst tenth of the clients, rounded up; all three are means over the seeds, and
    None where nothing is measured."""
    difference: Difference | None
    word: str


@dataclass(frozen=True)
class Comparison:
    """The arms of a block, for one measure."""

    rows: Sequence[Compared]
    notes: Sequence[str]
    """What was left out and why, a line each."""


def compare(block: Block, measure: Measure, reference: str | None = None) -> Comparison:
    """Compare the arms of a block with its reference.

    Args:
        block: the arms.
        measure: what is compared.
        reference: name or label of the reference; None, or one that is not here, is the first arm.
    """
    notes = [note for arm in block.arms for note in arm.left_out]
    measured, incomplete = [], set[int]()
    whole = _clients_by_seed(block, measure)
    for place, arm in enumerate(block.arms):
        kept, lines = _complete(arm, measure, whole)
        measured.append(kept)
        notes += lines
        incomplete |= {place} if lines else set()
    base = _place_of(block, reference)
    if reference and not _is_named(block.arms[base], reference):
        where = f" at {block.condition}" if block.condition else ""
        notes.append(f"{reference} is not there{where}: {block.arms[base].label} is the reference")
    rows = []
    for place, (arm, values) in enumerate(zip(block.arms, measured, strict=True)):
        found, word = None, ALONE if len(block.arms) == 1 else REFERENCE
        if place != base:
            pairs, lines = _pairs((arm, values), (block.arms[base], measured[base]))
            notes += lines
            found = difference(pairs) if pairs else None
            word = NO_PAIR if values and measured[base] else NOT_MEASURED
            if found:
                word = verdict(found, lower_is_better=measure.lower_is_better)
            word = MISSING if {place, base} & incomplete else word
        rows.append(_row(block.condition, arm, measure, values, (found, word)))
    return Comparison(rows, list(dict.fromkeys(notes)))


def check_reference(found: Sequence[Block], reference: str | None) -> None:
    """Refuse a reference that is in no block.

    Raises:
        UserError: with those that there are.
    """
    arms = [arm for block in found for arm in block.arms]
    if reference and not any(_is_named(arm, reference) for arm in arms):
        names = list(dict.fromkeys(arm.label for arm in arms))
        raise UserError(f"--reference {reference}: no such arm; there are {some_of(names)}")


def _is_named(arm: Arm, reference: str) -> bool:
    return reference in (arm.name, arm.label)


def _place_of(block: Block, reference: str | None) -> int:
    places = [i for i, arm in enumerate(block.arms) if reference and _is_named(arm, reference)]
    return places[0] if places else 0


def _clients_by_seed(block: Block, measure: Measure) -> dict[int, set[int]]:
    """The clients that have a value in any run of a seed."""
    found: dict[int, set[int]] = {}
    for arm in block.arms:
        for seed, story in arm.runs.items():
            found.setdefault(seed, set()).update(measure.of(story))
    return found


def _complete(
    arm: Arm, measure: Measure, whole: Mapping[int, set[int]]
) -> tuple[dict[int, Values], list[str]]:
    """The values of runs that lack no client; those that lack some are named.

    A client without a value was not finite. Its run is left out of the means, too: the others
    alone would look better than they are.
    """
    kept, notes = dict[int, Values](), []
    for seed, story in arm.runs.items():
        values = measure.of(story)
        lacking = sorted(whole[seed] - values.keys())
        if values and not lacking:
            kept[seed] = values
        elif values or measure.is_asked(story):
            of = f"client {some_of(lacking, str)}" if lacking else "any client"
            notes.append(f"{story.name}: no finite {measure.kind} {measure.what} of {of}")
    return kept, notes


def _pairs(
    one: tuple[Arm, Mapping[int, Values]], base: tuple[Arm, Mapping[int, Values]]
) -> tuple[dict[int, list[float]], list[str]]:
    """The clients' differences by seed, and a line for each run without a partner."""
    (arm, values), (reference, expected) = one, base
    pairs, notes = dict[int, list[float]](), []
    for seed in sorted({*values, *expected}):
        if seed not in values or seed not in expected:
            there, lacking = (reference, arm) if seed in expected else (arm, reference)
            name = there.runs[seed].name
            if values and expected:
                notes.append(f"{name}: {lacking.label} has no such run of seed {seed} to pair with")
            continue
        odd = _other_data(arm.runs[seed], reference.runs[seed])
        if odd:
            notes.append(odd)
        else:
            own, other = values[seed], expected[seed]
            pairs[seed] = [own[client] - other[client] for client in sorted(own)]
    return pairs, notes


def _other_data(one: RunRecord, other: RunRecord) -> str:
    """Why two runs of a seed cannot be paired; empty where their clients hold the same data."""
    clients = sorted({*one.sizes, *other.sizes})
    unknown = [
        story.name for story in (one, other) if not all(story.digests.get(c) for c in clients)
    ]
    if unknown or not clients:
        names = " and ".join(unknown or [one.name, other.name])
        return (
            f"{one.name} and {other.name} are not paired: partition.json of {names} has no digests "
            "of the clients' data, as of an older version"
        )
    odd = [c for c in clients if one.digests[c] != other.digests[c]]
    if odd:
        return (
            f"{one.name} and {other.name} are not paired: the examples of client "
            f"{some_of(odd, str)} are not the same"
        )
    return ""


def _row(
    condition: str,
    arm: Arm,
    measure: Measure,
    values: Mapping[int, Values],
    compared: tuple[Difference | None, str],
) -> Compared:
    runs = [list(one.values()) for one in values.values()]
    tenths = [math.ceil(len(run) / _TENTH) for run in runs]

    def over_seeds(summaries: Sequence[float]) -> float | None:
        return statistics.fmean(summaries) if summaries else None

    return Compared(
        condition=condition,
        label=arm.label,
        seeds=len(runs),
        clients=max(map(len, runs), default=0),
        mean=over_seeds([statistics.fmean(run) for run in runs]),
        worst=over_seeds([measure.worst(run, 1) for run in runs]),
        tenth=over_seeds([measure.worst(run, n) for run, n in zip(runs, tenths, strict=True)]),
        difference=compared[0],
        word=compared[1],
    )
