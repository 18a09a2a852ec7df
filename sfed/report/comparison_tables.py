"""The tables that compare several runs. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sfed.observability import metrics
from sfed.observability.metrics import deviation
from sfed.report.grouping import BY_CLIENTS, BY_RANK, Axis, Group, group
from sfed.report.scaling_law import ScalingFit
from sfed.report.series import held_out_reader, main_scores, unit_of
from sfed.report.tables import NONE, Table, lora_facts, mebibytes, show, total
from sfed.storage.card_facts import PRIVACY, privacy_numbers
from sfed.storage.run_record import KINDS, LOSS, RunRecord, number, words_of
from sfed.utils.text import duration

_MOST_SCORES = 2
_STARTS = {"mean": "mean of N", "shared": "shared", "apart": "apart"}


def runs_table(stories: Sequence[RunRecord]) -> Table:
    """A row per run: what it was, and how it ended."""
    shown, private = _compared(stories), [_privacy(story) for story in stories]
    names = PRIVACY if any(private) else ()
    rows = [
        [
            story.name,
            story.method,
            show(number(story.config, "seed"), ".0f"),
            show(story.num_clients, "g"),
            *lora_facts(story),
            str(story.evaluated[-1]["round"]) if story.evaluated else NONE,
            *(_end(story, kind, what) for what in shown for kind in KINDS),
            *(show(guarantee.get(name), ".4g") for name in names),
            mebibytes(total(story, metrics.UPLOADED_BYTES)),
            duration(total(story, metrics.ROUND_SECONDS)),
        ]
        for story, guarantee in zip(stories, private, strict=True)
    ]
    head = ["run", "method", "seed", "N", "r", "gamma", "round"]
    groups = [("", len(head)), *_headings(stories, shown)]
    groups += [*([("privacy of what was sent", len(names))] if names else []), ("", 2)]
    head += [*(list(KINDS) * len(shown)), *map(words_of, names), "sent", "time"]
    return Table(head, rows, text_columns=2, groups=groups)


def _privacy(story: RunRecord) -> dict[str, float | None]:
    """What the releases of a run have cost; nothing where privacy is off."""
    resolved = story.config.get("resolved", {})
    return privacy_numbers(resolved, story.rounds[-1] if story.rounds else None)


def seeds_table(stories: Sequence[RunRecord]) -> Table:
    """Mean and standard deviation of runs that differ only in the seed; no row without such.

    After the last round that all of them have evaluated; a dash where one has no finite value.
    """
    shown = _compared(stories)
    rows = [
        [
            one.label,
            str(len(one.stories)),
            NONE if one.last_round is None else str(one.last_round),
            *(_mean_and_deviation(one, kind, what) for what in shown for kind in KINDS),
        ]
        for one in group(stories)
        if len(one.stories) > 1
    ]
    head = ["settings", "seeds", "round", *(list(KINDS) * len(shown))]
    return Table(head, rows, groups=[("", 3), *_headings(stories, shown)])


def _compared(stories: Sequence[RunRecord]) -> list[str]:
    """What the runs are compared by: their scores, and the loss.

    An empty name stands for the main score of each run, where runs have different ones.
    """
    mains = main_scores(stories)
    if len(mains) > 1:
        return ["", LOSS]
    scores = list(dict.fromkeys(name for story in stories for name in story.score_names))
    return [*(scores if len(scores) <= _MOST_SCORES else mains), LOSS]


def _headings(stories: Sequence[RunRecord], shown: Sequence[str]) -> list[tuple[str, int]]:
    names = {"": "main score", LOSS: f"loss{unit_of(stories)}"}
    return [(names.get(what) or words_of(what), len(KINDS)) for what in shown]


def _end(story: RunRecord, kind: str, what: str) -> str:
    if not what and not story.score_names:
        return NONE
    name = what or story.score_names[0]
    text = show(next(iter(Group("", [story]).last(held_out_reader(kind, name))), None))
    return text if what else f"{text} {words_of(name)}"


def _mean_and_deviation(one: Group, kind: str, what: str) -> str:
    scores = one.stories[0].score_names
    name = what or (scores[0] if scores else "")
    values = one.last(held_out_reader(kind, name))
    if not values:
        return NONE
    text = f"{show(statistics.fmean(values))} ± {show(deviation(values))}"
    return text if what else f"{text} {words_of(name)}"


@dataclass(frozen=True)
class Slope:
    """A slope over N or over r: its mean, the lowest and the highest of several, the predicted."""

    fitted: str
    span: str
    theory: str


@dataclass(frozen=True)
class LawRow:
    """One quantity of one method."""

    label: str
    is_first: bool
    """Whether the row before is of another method."""
    powers: Sequence[tuple[str, str]] | None
    """gamma is alpha times these: (N or r, exponent); None where that is not known."""
    start: str
    optimizer: str
    quantity: str
    after_round: int
    slopes: Sequence[Slope]
    """Over N, over r."""


def law_rows(laws: Sequence[ScalingFit]) -> list[LawRow]:
    """Slopes in N and r, measured and predicted."""
    return [
        LawRow(
            label=law.label,
            is_first=i == 0 or laws[i - 1].label != law.label,
            powers=_powers(law),
            start=_STARTS[law.theory.start],
            optimizer=law.theory.optimizer,
            quantity=law.quantity,
            after_round=law.after_round,
            slopes=[_slope(law, axis) for axis in (BY_CLIENTS, BY_RANK)],
        )
        for i, law in enumerate(laws)
    ]


def _powers(law: ScalingFit) -> list[tuple[str, str]] | None:
    if law.theory.exponents is None:
        return None
    axes = (BY_CLIENTS, BY_RANK)
    pairs = [(axis.letter, law.theory.exponents[axis.position]) for axis in axes]
    return [(letter, f"{exponent:g}") for letter, exponent in pairs if exponent]


def _slope(law: ScalingFit, axis: Axis) -> Slope:
    fit, theory = law.fit(axis), _signed(law.predicted(axis))
    if fit is None:
        return Slope(NONE, NONE, theory)
    span = f"{_signed(fit.lowest)}, {_signed(fit.highest)}" if fit.fits > 1 else NONE
    return Slope(_signed(fit.slope), span, theory)


def _signed(value: float | None) -> str:
    if value is None:
        return NONE
    rounded = round(value, 2) + 0.0  # no -0.00
    return f"{rounded:+.2f}" if rounded else "0.00"


def law_table(laws: Sequence[ScalingFit]) -> Table:
    """The rows of the law as a table of plain text."""
    rows = [
        [
            row.label,
            NONE if row.powers is None else " ".join(["alpha", *map("^".join, row.powers)]),
            row.start,
            row.optimizer,
            row.quantity,
            str(row.after_round),
            *(cell for one in row.slopes for cell in (one.fitted, one.span, one.theory)),
        ]
        for row in law_rows(laws)
    ]
    head = ["runs", "gamma", "A starts", "optimizer", "quantity", "round"]
    groups = [("", len(head)), ("over N", 3), ("over r", 3)]
    return Table([*head, *(["slope", "from, to", "theory"] * 2)], rows, 5, groups)
