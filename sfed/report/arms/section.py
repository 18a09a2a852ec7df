"""What a report says of arms: tables with their notes, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfed.report.arms import figures, tables
from sfed.report.arms.blocks import Arm, Block, blocks
from sfed.report.arms.pairing import Comparison, Measure, check_reference, compare
from sfed.report.arms.rates import Tuned, at_best, tuned
from sfed.report.grouping import differing
from sfed.report.run_figures import Picture, file_name
from sfed.report.series import unit_of
from sfed.report.tables import Table
from sfed.storage.run_record import KINDS, LOSS, RunRecord, words_of

SELECTED = (
    "The rates were selected on the held-out data that is reported, which favours arms with more "
    "rates and makes all of them look better than on new data."
)


@dataclass(frozen=True)
class Questions:
    """What a user may ask of the comparison."""

    reference: str | None = None
    """Name of the arm that others are compared with; None = the first one."""
    target_loss: float | None = None
    """Held-out loss that is to be reached; None asks for none."""


@dataclass(frozen=True)
class Entry:
    """A table of the section."""

    name: str
    """Of its files."""
    heading: str
    table: Table
    notes: Sequence[str]
    """What was left out of it and why, a line each."""


@dataclass(frozen=True)
class ArmsSection:
    """All that a report says of arms."""

    intro: str
    entries: Sequence[Entry]
    pictures: Sequence[Picture]

    @property
    def tables(self) -> dict[str, Table]:
        """The tables by the names of their files."""
        return {entry.name: entry.table for entry in self.entries}


def arms_section(stories: Sequence[RunRecord], asked: Questions) -> ArmsSection | None:
    """Compare the arms of several runs; None where there is nothing to compare or to count.

    Raises:
        UserError: where no arm has the name of the reference.
    """
    found, whole = blocks(stories), blocks(stories, by_rate=False)
    check_reference([*found, *whole], asked.reference)
    measures = _measures(found)
    if not measures:
        return None
    selected = [one for block in whole for one in _tuned(block)]
    best = at_best(selected)
    sets = [_Set(found, "paired", "")]
    if any(len(block.arms) > 1 for block in best):
        sets.append(_Set(best, "best-rate", ", each arm at its own best rate"))
    entries: list[Entry] = []
    pictures: list[Picture] = []
    for one in sets:
        if any(len(block.arms) > 1 for block in one.blocks):
            drawn = figures.loss_pictures(one.blocks, f"{one.name}-loss-curves", one.words)
            more, dots = _compared(one, measures, asked.reference)
            entries, pictures = [*entries, *more], [*pictures, *dots, *drawn]
    if selected:
        entries.insert(0, _rates(selected, measures))
    if entries or asked.target_loss is not None:
        entries.append(_convergence(found, best, asked.target_loss))
    return ArmsSection(_intro(stories), entries, pictures) if entries else None


@dataclass(frozen=True)
class _Set:
    """Blocks that are compared, and what they are."""

    blocks: Sequence[Block]
    name: str
    words: str


def _tuned(block: Block) -> list[Tuned]:
    """The rates of a block, selected by the main measure of its arms."""
    measures = _measures([block])
    return tuned([block], measures[0]) if measures else []


def _measures(found: Sequence[Block]) -> list[Measure]:
    """What is measured of any arm: the main score and the loss, personal and global."""
    firsts = [story for block in found for arm in block.arms if (story := arm.first)]
    mains = dict.fromkeys(story.score_names[0] for story in firsts if story.score_names)
    measures = [Measure(kind, what) for what in (*mains, LOSS) for kind in KINDS]
    return [one for one in measures if any(one.of(story) for story in firsts)]


def _compared(
    one: _Set, measures: Sequence[Measure], reference: str | None
) -> tuple[list[Entry], list[Picture]]:
    entries: list[Entry] = []
    pictures: list[Picture] = []
    for what in dict.fromkeys(measure.what for measure in measures):
        panels = []
        words = "Held-out loss" if what == LOSS else f"Held-out {words_of(what)}"
        for measure in (measure for measure in measures if measure.what == what):
            found = [block for block in one.blocks if measure in _measures([block])]
            results = [compare(block, measure, reference) for block in found]
            rows = [row for result in results for row in result.rows]
            panels.append((KINDS[measure.kind], rows))
            unit = _unit(found) if what == LOSS else ""
            entries.append(
                Entry(
                    f"{one.name}-{file_name(what)}-{measure.kind}",
                    f"{words}{unit}, {KINDS[measure.kind]}{one.words}",
                    tables.paired_table(rows),
                    _notes(results),
                )
            )
        name = f"{one.name}-{file_name(what)}-differences"
        pictures += figures.difference_pictures(panels, name, f"{words}{one.words}")
    return entries, pictures


def _notes(results: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(note for result in results for note in result.notes))


def _unit(found: Sequence[Block]) -> str:
    return unit_of([story for block in found for arm in block.arms for story in arm.runs.values()])


def _rates(selected: Sequence[Tuned], measures: Sequence[Measure]) -> Entry:
    measure, scores = measures[0], dict.fromkeys(one.what for one in measures if one.what != LOSS)
    words = " or ".join(map(words_of, scores)) or "loss"
    return Entry(
        "learning-rates",
        f"Learning rates, selected by held-out {words} after the last round, "
        f"{KINDS[measure.kind]}, mean over the seeds",
        tables.rates_table(selected),
        [SELECTED, *(note for one in selected for note in one.notes)],
    )


def _convergence(found: Sequence[Block], best: Sequence[Block], target: float | None) -> Entry:
    arms: list[Arm] = [arm for block in best for arm in block.arms]
    notes = ["Gradient norms are before clipping, means over steps, clients and seeds."]
    if target is not None:
        notes.append(
            "Rounds and local steps of each seed in the order of the seeds: the first evaluated "
            "round whose mean loss over clients is at most the target. Nothing is estimated "
            "between evaluations; counts are exact up to evaluation.every_rounds. Local steps "
            "are those of a client, mean over clients."
        )
    notes += [note for block in found for arm in block.arms for note in arm.left_out]
    table = tables.convergence_table(found, arms, target)
    return Entry("convergence", "Convergence of held-out losses", table, notes)


def _intro(stories: Sequence[RunRecord]) -> str:
    """In which settings the runs differ."""
    names = ["federated.method"] if len({story.method for story in stories}) > 1 else []
    names += differing(stories)
    return ", ".join([*names, *(["seed"] if _has_seeds(stories) else [])])


def _has_seeds(stories: Sequence[RunRecord]) -> bool:
    return len({story.config.get("seed") for story in stories}) > 1
