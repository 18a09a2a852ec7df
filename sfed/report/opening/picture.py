"""Where the marks of the opening picture stand. The template draws them as inline SVG.

Places along an axis are per cent of the picture's width and heights are pixels, so that letters
and marks keep their size on a phone. Few clients have a row each. Of many each state becomes a line
over all clients, sorted.
"""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from sfed.report.opening.outcome import BEFORE, GLOBAL, OWN, Outcome, Traffic, outcome_of, sentences
from sfed.report.tables import Table, mebibytes, show
from sfed.storage.run_record import RunRecord

MOST_ROWS = 40
_LEFT, _RIGHT = 29.0, 97.0  # per cent between which the axis of the rows runs
_POINTS = 100  # of a line over many clients
_ROW_PIXELS, _TOP_PIXELS = 24, 26
_WIDE, _NARROW = 24, 13  # letters of a name beside its row
_LOGARITHMIC_FROM = 100.0
"""Largest value over smallest one from which an axis of losses is logarithmic."""
_FROM_ZERO = 0.4
"""Smallest value over largest one below which an axis begins at 0."""
_WORDS = {BEFORE: "before training", GLOBAL: "global adapter", OWN: "its own adapter"}


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: its place in per cent, and its text."""

    place: float
    text: str


@dataclass(frozen=True)
class Row:
    """A client: the height of its row, its names, its marks by state, all of it in words."""

    y: float
    name: str
    short_name: str
    marks: Sequence[tuple[str, float]]
    words: str


@dataclass(frozen=True)
class Line:
    """A state over many clients, from the best one to the worst: points of an SVG polyline."""

    state: str
    points: str


@dataclass(frozen=True)
class Bar:
    """A number of bytes: what they are, the number in words, the length in per cent."""

    style: str
    label: str
    text: str
    length: float


@dataclass(frozen=True)
class Opening:
    """What the page of a run opens with."""

    sentences: str
    what: str
    """What is measured, with its unit."""
    legend: Sequence[tuple[str, str]]
    """(state, in words)."""
    ticks: Sequence[Tick]
    rows: Sequence[Row]
    """Of few clients."""
    height: int
    """Pixels of the rows with their axis."""
    lines: Sequence[Line]
    """Of many clients."""
    quantiles: Table | None
    """Of many clients: what the lines show, in numbers."""
    bars: Sequence[Bar]
    has_evaluation: bool
    """Whether evaluation sent what training does not."""
    base: str


def opening_of(story: RunRecord) -> Opening | None:
    """What the page of a run opens with; None where no evaluation gave a finite number."""
    outcome = outcome_of(story)
    if outcome is None or not outcome.states:
        return None
    axis = _Axis.over(
        [value for state in outcome.states for value in outcome.values(state)], outcome.is_loss
    )
    few = len(outcome.clients) <= MOST_ROWS
    unit = f" ({outcome.unit})" if outcome.unit else ""
    order = "lower" if outcome.is_loss else "higher"
    return Opening(
        sentences=sentences(outcome),
        what=f"{outcome.what}{unit}, {order} is better",
        legend=[(state, _WORDS[state]) for state in outcome.states],
        ticks=axis.ticks(_LEFT, _RIGHT) if few else axis.ticks(100.0, 0.0),
        rows=_rows(outcome, axis) if few else [],
        height=_TOP_PIXELS + _ROW_PIXELS * len(outcome.clients) + 4,
        lines=[] if few else [_line(outcome, axis, state) for state in outcome.states],
        quantiles=None if few else _quantiles(outcome),
        bars=_bars(outcome.traffic, int(story.num_clients or len(outcome.clients))),
        has_evaluation=bool(outcome.traffic.evaluation),
        base=outcome.base,
    )


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    is_log: bool

    @staticmethod
    def over(values: Sequence[float], is_loss: bool) -> _Axis:
        low, high = min(values), max(values)
        if is_loss and low > 0 and high > _LOGARITHMIC_FROM * low:
            return _Axis(math.floor(math.log10(low)), math.ceil(math.log10(high)), True)
        room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        from_zero = 0 <= low < _FROM_ZERO * high
        return _Axis(0.0 if from_zero else low - room, high + room, False)

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        place = math.log10(value) if self.is_log else value
        return (place - self.low) / (self.high - self.low)

    def ticks(self, start: float, end: float) -> list[Tick]:
        """At most six round numbers, placed between two per cents."""
        if self.is_log:
            step = math.ceil((self.high - self.low) / 4)
            shown = [10.0**exponent for exponent in range(int(self.low), int(self.high) + 1, step)]
        else:
            found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
            shown = [float(value) for value in found if self.low <= value <= self.high]
        return [
            Tick(_place(self.share(value), start, end), f"{value + 0.0:.6g}") for value in shown
        ]


def _place(share: float, start: float, end: float) -> float:
    return round(start + (end - start) * share, 2)


def _rows(outcome: Outcome, axis: _Axis) -> list[Row]:
    return [
        Row(
            y=_TOP_PIXELS + _ROW_PIXELS * (i + 0.5),
            name=_cut(one.title, _WIDE),
            short_name=_cut(one.title, _NARROW),
            marks=[
                (state, _place(axis.share(value), _LEFT, _RIGHT))
                for state, value in one.values.items()
            ],
            words=f"{one.title}: "
            + (
                ", ".join(f"{_WORDS[state]} {show(value)}" for state, value in one.values.items())
                or "not measured"
            ),
        )
        for i, one in enumerate(outcome.clients)
    ]


def _cut(text: str, most: int) -> str:
    """A text that takes no more room than so many letters; those of Chinese take two."""
    room = 0
    for i, letter in enumerate(text):
        room += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if room > most:
            return f"{text[: i - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"
    return text


def _line(outcome: Outcome, axis: _Axis, state: str) -> Line:
    ordered = sorted(outcome.values(state), reverse=not outcome.is_loss)
    last = len(ordered) - 1
    at = sorted({round(i * last / _POINTS) for i in range(_POINTS + 1)})
    points = [(100 * i / max(1, last), _place(axis.share(ordered[i]), 100.0, 0.0)) for i in at]
    return Line(state, " ".join(f"{x:.1f},{y:.2f}" for x, y in points))


def _quantiles(outcome: Outcome) -> Table:
    rows = []
    for state in outcome.states:
        values = sorted(outcome.values(state), reverse=not outcome.is_loss)
        cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values
        if not outcome.is_loss and len(values) > 1:
            cuts = cuts[::-1]
        shown = (cuts[0], cuts[len(cuts) // 2], cuts[-1], statistics.fmean(values))
        rows.append([_WORDS[state], *map(show, shown)])
    return Table(["", "best 5 %", "median", "worst 5 %", "mean"], rows)


def _bars(traffic: Traffic, num_clients: int) -> list[Bar]:
    messages = f" in {traffic.messages:,} message{'' if traffic.messages == 1 else 's'}"
    clients = f"{num_clients:,} client{'' if num_clients == 1 else 's'}"
    of = f": {' and '.join(traffic.factors)} of {clients}" if traffic.factors else ""
    sizes = [("sent", "sent for training", traffic.sent, messages if traffic.messages else "")]
    if traffic.evaluation:
        sizes.append(("extra", "sent for evaluation only", traffic.evaluation, ""))
    if traffic.stayed is not None:
        sizes.append(("stayed", "stayed, in no message of training", traffic.stayed, of))
    most = max(size for _, _, size, _ in sizes) or 1.0
    return [
        Bar(style, label, mebibytes(size) + more, round(100 * size / most, 2))
        for style, label, size, more in sizes
    ]
