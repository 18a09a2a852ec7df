"""What of several runs is worth a picture. Needs no torch.

Few runs share one pair of axes. Many become small multiples: over rounds a panel per method with a
line per r (or N), the end of the runs against r (or N) in a panel per N (or r) with a line per
method.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from sfed.observability import metrics
from sfed.observability.metrics import deviation
from sfed.report.grouping import BY_CLIENTS, BY_RANK, Axis, Group, Sweep, group, sweeps
from sfed.report.plotting import Curve, Panel
from sfed.report.run_figures import PERPLEXITY, Picture, curves, file_name
from sfed.report.scaling_law import FIRST_GRADIENT, OUTPUT, ScalingFit, fullest
from sfed.report.series import (
    Reader,
    held_out_reader,
    main_scores,
    perplexity_reader,
    reader,
    unit_of,
)
from sfed.storage.run_record import KINDS, LOSS, RunRecord, words_of

MOST_ON_ONE_PANEL = 8
_ERRORS = "; mean over the seeds and one standard deviation"
_SEEDS = " Line: mean over the seeds; band: one standard deviation to either side."


_LAW_FIGURES = {FIRST_GRADIENT: "law-first-gradient", OUTPUT: "law-output"}


@dataclass(frozen=True)
class Quantity:
    """What is held against each other, for an adapter on its data where ``kind`` is given."""

    name: str
    words: str
    y_label: str
    read: Reader
    kind: str = ""
    log: bool = False


def comparisons(stories: Sequence[RunRecord]) -> list[Picture]:
    """The figures that hold several runs against each other."""
    groups, swept = group(stories), sweeps(stories)
    along = [axis for axis in (BY_RANK, BY_CLIENTS) if any(s.fixed_values(axis) for s in swept)]
    made: list[Picture | None] = []
    if len(groups) <= MOST_ON_ONE_PANEL or not along:
        made += _on_one_panel(stories, groups)
    for axis in along:
        made += _ends(swept, axis, _held_out(stories))
        made += _over_rounds(swept, axis, [*_held_out(stories), _gradient()])
    return [picture for picture in made if picture is not None]


def _held_out(stories: Sequence[RunRecord]) -> list[Quantity]:
    """Main scores, perplexity where losses are by token, losses; for each kind of adapter."""
    found = []
    for kind in KINDS:
        found += [
            Quantity(file_name(s), words_of(s), words_of(s), held_out_reader(kind, s), kind)
            for s in main_scores(stories)
        ]
        if any(story.by_token for story in stories):
            read = perplexity_reader(kind)
            found.append(Quantity("perplexity", "perplexity", PERPLEXITY, read, kind, log=True))
        label = f"held-out loss{unit_of(stories)}"
        found.append(Quantity(LOSS, "held-out loss", label, held_out_reader(kind), kind))
    return found


def _gradient() -> Quantity:
    words = "gradient norm before clipping"
    return Quantity("grad-norm", words, "L2 norm", reader(metrics.GRAD_NORM), log=True)


def _on_one_panel(stories: Sequence[RunRecord], groups: Sequence[Group]) -> list[Picture | None]:
    """All runs over rounds, a line each."""
    seeds = _SEEDS if any(len(one.stories) > 1 for one in groups) else ""
    found: dict[str, list[Quantity]] = {}
    for one in _held_out(stories):
        found.setdefault(one.name, []).append(one)
    found.pop("perplexity", None)
    pictures: list[Picture | None] = [
        curves(
            f"compare-{'held-out-loss' if name == LOSS else name}",
            f"{_capital(parts[0].words)} of all runs, unweighted mean over clients.{seeds}",
            [_all_lines(groups, KINDS[one.kind], one.y_label, one.read) for one in parts],
        )
        for name, parts in found.items()
    ]
    pictures.append(
        curves(
            "compare-grad-norm",
            f"Gradient norm before clipping, mean over steps and clients.{seeds}",
            [_all_lines(groups, "gradient before clipping", "L2 norm", _gradient().read, log=True)],
        )
    )
    similar = [
        _all_lines(groups, f"clients' {factor}", "mean pairwise cosine", reader(key))
        for factor, key in metrics.SIMILARITIES.items()
    ]
    caption = "How alike the clients' factors are after local training, before the mean."
    return [*pictures, curves("compare-similarity", caption + seeds, similar)]


def _all_lines(
    groups: Sequence[Group], title: str, y_label: str, read: Reader, *, log: bool = False
) -> Panel:
    lines = [line for one in groups if (line := one.curve(read)).points]
    return Panel(title, y_label, lines, log=log)


def _over_rounds(
    swept: Sequence[Sweep], axis: Axis, quantities: Sequence[Quantity]
) -> list[Picture | None]:
    """A panel per method and a line per r (or N); a figure per value of the other one.

    The figure of the largest other value is open, the rest are folded. Loss is left to perplexity
    where there is one, and the first kind of adapter speaks for both.
    """
    made: list[Picture | None] = []
    done: set[str] = set()
    seeds = _SEEDS if _has_seeds(swept) else ""
    for one in quantities:
        if one.name in done or (one.name == LOSS and "perplexity" in done):
            continue
        pictures: list[Picture] = []
        for fixed in sorted({v for s in swept for v in s.fixed_values(axis)}, reverse=True):
            at = f"{axis.other.letter} = {fixed:g}"
            caption = (
                f"{_capital(one.words)} over rounds at {at}: a panel per method, a line per "
                f"{axis.letter}.{' ' + _capital(KINDS[one.kind]) + '.' if one.kind else ''}{seeds}"
            )
            name = f"compare-{one.name}-by-{axis.name}" + (
                f"-{axis.other.letter}-{fixed:g}" if pictures else ""
            )
            heading = f"{_capital(one.words)} by {axis.letter}: other values of "
            panels = _panels_by_method(swept, axis, fixed, one)
            folded = f"{heading}{axis.other.letter}" if pictures else ""
            if (picture := curves(name, caption, panels, folded)) is not None:
                pictures.append(picture)
        if pictures:
            done.add(one.name)
        made += pictures
    return made


def _panels_by_method(
    swept: Sequence[Sweep], axis: Axis, fixed: float, one: Quantity
) -> list[Panel]:
    values = sorted({x for sweep in swept for x in sweep.along(axis, fixed)})
    panels = []
    for sweep in swept:
        cells = sweep.along(axis, fixed)
        lines = [
            Curve(line.label, line.points, line.spread, role="ordered")
            for x in values
            for line in [cells.get(x, Group("", [])).curve(one.read, f"{axis.letter} = {x:g}")]
        ]
        if any(line.points for line in lines):
            panels.append(Panel(sweep.label, one.y_label, lines, log=one.log))
    return panels


def _ends(
    swept: Sequence[Sweep], axis: Axis, quantities: Sequence[Quantity]
) -> list[Picture | None]:
    """The last evaluated round against r (or N), a line per method.

    Panels are the adapters (personal, global) where the other variable has one value only, and
    its values where it has several.
    """
    fixed = sorted({value for sweep in swept for value in sweep.fixed_values(axis)})
    names = list(dict.fromkeys(one.name for one in quantities))
    errors = f"{_ERRORS if _has_seeds(swept) else ''}."
    more = f"More against {axis.letter}: the global adapter, losses"
    made: list[Picture | None] = []
    for name in names:
        parts = [one for one in quantities if one.name == name]
        folded = more if name == LOSS and "perplexity" in names else ""
        caption = f"{_capital(parts[0].words)} of the last evaluated round against the {axis.words}"
        file = f"final-{name}-by-{axis.name}"
        if len(fixed) == 1:
            text = f"{caption} at {axis.other.letter} = {fixed[0]:g}{errors}"
            panels = [_end_panel(swept, axis, fixed[0], one, KINDS[one.kind]) for one in parts]
            made.append(curves(file, text, panels, folded))
            continue
        for one in parts:
            panels = [
                _end_panel(swept, axis, value, one, f"{axis.other.letter} = {value:g}")
                for value in fixed
            ]
            text = f"{caption}: {KINDS[one.kind]}{errors}"
            made.append(curves(file, text, panels, folded))
            file, folded = f"final-{name}-by-{axis.name}-global", more
    return sorted(made, key=lambda picture: bool(picture and picture.folded))


def _has_seeds(swept: Sequence[Sweep]) -> bool:
    return any(len(cell.stories) > 1 for sweep in swept for cell in sweep.cells.values())


def _end_panel(
    swept: Sequence[Sweep], axis: Axis, fixed: float, one: Quantity, title: str
) -> Panel:
    lines, ticks = [], set()
    for sweep in swept:
        ends = {x: cell.last(one.read) for x, cell in sweep.along(axis, fixed).items()}
        known = {x: ys for x, ys in ends.items() if ys}
        ticks |= set(known)
        several = any(len(ys) > 1 for ys in known.values())
        spread = [deviation(ys) if len(ys) > 1 else math.nan for ys in known.values()]
        points = [(x, statistics.fmean(ys)) for x, ys in known.items()]
        if points:
            lines.append(Curve(sweep.label, points, spread if several else []))
    return Panel(title, one.y_label, lines, log=one.log, x_label=axis.words, x_ticks=sorted(ticks))


def law_pictures(laws: Sequence[ScalingFit]) -> list[Picture]:
    """The quantities of the law against N and against r, with the slopes of theory."""
    made = []
    optimizers = sorted({law.theory.optimizer for law in laws})
    for (quantity, name), optimizer in product(_LAW_FIGURES.items(), optimizers):
        members = [
            law for law in laws if (law.quantity, law.theory.optimizer) == (quantity, optimizer)
        ]
        panels = [_law_panel(members, axis) for axis in (BY_CLIENTS, BY_RANK)]
        caption = (
            f"{_capital(quantity)} ({optimizer}), both axes logarithmic. Dotted: the slope that "
            "theory predicts, through the middle of the points; it predicts no height."
        )
        suffix = f"-{optimizer}" if len(optimizers) > 1 else ""
        made.append(curves(f"{name}{suffix}", caption, panels))
    return [picture for picture in made if picture is not None]


def _law_panel(laws: Sequence[ScalingFit], axis: Axis) -> Panel:
    fixed = fullest(laws, axis)
    measured, predicted, ticks = [], [], set()
    for law in laws:
        points = law.along(axis, fixed) if fixed is not None else []
        if len(points) < 2:
            continue
        ticks |= {x for x, _ in points}
        measured.append(Curve(law.label, points))
        slope = law.predicted(axis)
        if slope is not None:
            predicted.append(
                Curve("slope of theory", _through_middle(points, slope), role="theory")
            )
    title = f"against {axis.letter} at {axis.other.letter} = {fixed or 0:g}"
    label = laws[0].quantity if laws else ""
    return Panel(
        title, label, [*measured, *predicted], always_log=True, x_label=axis.words,
        x_ticks=sorted(ticks),
    )  # fmt: skip


def _through_middle(
    points: Sequence[tuple[float, float]], slope: float
) -> list[tuple[float, float]]:
    """The ends of a line of this log-log slope through the points' geometric mean."""
    middle_x, middle_y = (statistics.fmean(math.log(point[i]) for point in points) for i in (0, 1))
    return [
        (x, math.exp(middle_y + slope * (math.log(x) - middle_x)))
        for x in (points[0][0], points[-1][0])
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
