"""The tables that hold several runs against each other, as HTML. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from sfed.observability import metrics
from sfed.observability.metrics import deviation
from sfed.report.grouping import BY_CLIENTS, BY_RANK, RANK, Axis, Group, group
from sfed.report.scaling_law import Law
from sfed.report.series import held_out_reader, main_scores, unit_of
from sfed.report.tables import NONE, mebibytes, show, table, total
from sfed.storage.run_record import KINDS, LOSS, Story, number, words_of
from sfed.utils.text import duration

_MOST_SCORES = 2
_STARTS = {"mean": "mean of N", "shared": "shared", "apart": "apart"}


def runs_table(stories: Sequence[Story], *, linked: bool) -> str:
    """A line per run: what it was, and how it ended; linked to its section where it has one."""
    shown = _compared(stories)
    rows = [
        [
            f'<a href="#run-{i}">{escape(story.name)}</a>' if linked else escape(story.name),
            escape(story.method),
            show(number(story.config, "seed"), ".0f"),
            show(story.num_clients, "g"),
            show(number(story.config, RANK), "g"),
            show(number(story.config, "resolved.gamma"), ".4g"),
            str(story.evaluated[-1]["round"]) if story.evaluated else NONE,
            *(_end(story, kind, what) for what in shown for kind in KINDS),
            mebibytes(total(story, metrics.UPLOADED_BYTES)),
            duration(total(story, metrics.ROUND_SECONDS)),
        ]
        for i, story in enumerate(stories, start=1)
    ]
    head = ["run", "method", "seed", "N", "r", "gamma", "round"]
    over = [("", len(head)), *_headings(stories, shown), ("", 2)]
    return (
        table([*head, *(list(KINDS) * len(shown)), "sent", "time"], rows, words=2, over=over)
        + "<p class=note>Held-out data after the last evaluated round, unweighted mean over "
        "clients. Personal: each client's own adapter, its own data; global: the global adapter, "
        "everybody's data.</p>"
    )


def seeds_table(stories: Sequence[Story]) -> str:
    """Mean and standard deviation of runs that differ only in the seed."""
    shown = _compared(stories)
    rows = [
        [
            escape(one.label),
            str(len(one.stories)),
            *(_mean_and_deviation(one, kind, what) for what in shown for kind in KINDS),
        ]
        for one in group(stories)
        if len(one.stories) > 1
    ]
    if not rows:
        return ""
    head, over = ["settings", "seeds"], [("", 2), *_headings(stories, shown)]
    return (
        "<h3>Runs that differ only in the seed</h3>"
        f"{table([*head, *(list(KINDS) * len(shown))], rows, over=over)}"
        "<p class=note>Mean over the runs and one standard deviation (n - 1), after the last "
        "evaluated round.</p>"
    )


def _compared(stories: Sequence[Story]) -> list[str]:
    """What the runs are compared by: their scores, and the loss.

    An empty name stands for the main score of each run, where runs have different ones.
    """
    mains = main_scores(stories)
    if len(mains) > 1:
        return ["", LOSS]
    scores = list(dict.fromkeys(name for story in stories for name in story.scores))
    return [*(scores if len(scores) <= _MOST_SCORES else mains), LOSS]


def _headings(stories: Sequence[Story], shown: Sequence[str]) -> list[tuple[str, int]]:
    names = {"": "main score", LOSS: f"loss{unit_of(stories)}"}
    return [(names.get(what) or escape(words_of(what)), len(KINDS)) for what in shown]


def _end(story: Story, kind: str, what: str) -> str:
    if not what and not story.scores:
        return NONE
    name = what or story.scores[0]
    text = show(next(iter(Group("", [story]).last(held_out_reader(kind, name))), None))
    return text if what else f"{text} {escape(words_of(name))}"


def _mean_and_deviation(one: Group, kind: str, what: str) -> str:
    scores = one.stories[0].scores
    name = what or (scores[0] if scores else "")
    values = one.last(held_out_reader(kind, name))
    if not values:
        return NONE
    text = f"{show(statistics.fmean(values))} ± {show(deviation(values))}"
    return text if what else f"{text} {escape(words_of(name))}"


def law_table(laws: Sequence[Law]) -> str:
    """Slopes in N and r, measured and predicted."""
    rows = []
    for i, law in enumerate(laws):
        same = i > 0 and laws[i - 1].label == law.label
        facts = [
            escape(law.label),
            _gamma(law),
            _STARTS[law.theory.start],
            escape(law.theory.optimizer),
        ]
        slopes = [cell for axis in (BY_CLIENTS, BY_RANK) for cell in _slopes(law, axis)]
        rows.append([*([""] * 4 if same else facts), law.quantity, str(law.after_round), *slopes])
    head = ["runs", "gamma", "A starts", "optimizer", "quantity", "round"]
    columns = ["slope", "from, to", "theory"] * 2
    over = [("", len(head)), ("over N", 3), ("over r", 3)]
    return table([*head, *columns], rows, words=5, over=over, name="law")


def _gamma(law: Law) -> str:
    if law.theory.exponents is None:
        return NONE
    of_clients, of_rank = (f"{x:g}" for x in law.theory.exponents)
    parts = ["alpha"]
    parts += [f"N<sup>{of_clients}</sup>"] if law.theory.exponents[0] else []
    parts += [f"r<sup>{of_rank}</sup>"] if law.theory.exponents[1] else []
    return " ".join(parts)


def _slopes(law: Law, axis: Axis) -> list[str]:
    fit, theory = law.fit(axis), law.predicted(axis)
    if fit is None:
        return [NONE, NONE, _signed(theory)]
    span = f"{_signed(fit.lowest)}, {_signed(fit.highest)}" if fit.fits > 1 else NONE
    return [f"<b>{_signed(fit.slope)}</b>", span, _signed(theory)]


def _signed(value: float | None) -> str:
    if value is None:
        return NONE
    rounded = round(value, 2) + 0.0  # no -0.00
    return f"{rounded:+.2f}" if rounded else "0.00"
