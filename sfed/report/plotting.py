"""The figures of a report as PNG: curves and stacked bars from plain numbers. Reads no files.

Colours are Okabe and Ito's, told apart by dashes, markers and hatches too, so that a figure stays
readable for colour-blind readers and on a grey print.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

# Okabe-Ito without its yellow, which is hard to see as a line on white; black is for means.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BARS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (5, 1.5, 1, 1.5)), (0, (9, 3)))
MARKERS = "osD^vPX*"
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++", "oo")
MOST_WITH_MARKERS = 30
# Letters of a title's line, by how many panels stand beside each other.
_TITLE_WIDTHS = {1: 90, 2: 46, 3: 30}
# Bars up to which each is drawn by itself; more become one area.
_MOST_BARS = 500
# Classes up to which a matrix shows its counts; share from which a cell is dark.
_MOST_NUMBERED, _DARK = 15, 0.6
_BLACK, _GREY = "#000000", "#8A8A8A"
_DATES = {"svg": "Date", "pdf": "CreationDate"}
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.1,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a label with $ in it is just text
    "pdf.fonttype": 42,  # journals take no Type 3 fonts
    "svg.hashsalt": "sfed",  # equal names of its parts in every file
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Curve:
    """Points of one line, with one standard deviation to either side or a band, where there is one.

    Curves with the same label look the same in all panels. ``role`` is mean (thick and black),
    client (thin), crowd (thin and grey, one legend entry for all), compared, ordered (as compared,
    in shades from dark to light) or theory (dotted and grey).
    """

    label: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()
    role: str = "compared"
    band: Sequence[tuple[float, float]] = ()
    """Lowest and highest of what the line is the mean of."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes with curves.

    ``log`` where the heights differ by more than a factor of 5, ``always_log`` in any case.
    ``x_ticks`` are values on a logarithmic x axis; empty = whole numbers on a linear one.
    """

    title: str
    y_label: str
    curves: Sequence[Curve]
    log: bool = False
    always_log: bool = False
    x_label: str = "round"
    x_ticks: Sequence[float] = ()


@dataclass(frozen=True)
class Difference:
    """A dot with two intervals, each where it is known."""

    label: str
    mean: float
    inner: tuple[float, float] | None
    """Drawn as a black line with ends."""
    outer: tuple[float, float] | None
    """Drawn wide and light, behind it."""


@dataclass(frozen=True)
class Differences:
    """One pair of axes with a row per difference, and a line at 0."""

    title: str
    rows: Sequence[Difference]

    def part(self, first: int, count: int) -> Differences:
        """Some rows of it."""
        return Differences(self.title, self.rows[first : first + count])


@dataclass(frozen=True)
class Bars:
    """One pair of axes with stacked bars: a height per position for each part."""

    title: str
    x_label: str
    y_label: str
    positions: Sequence[float]
    parts: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Matrix:
    """One pair of axes with a confusion matrix: counts by class (rows) and predicted class."""

    title: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]


def curves(panels: Sequence[Panel], kind: str = "png", *, share_y: bool = False) -> bytes:
    """Draw panels of curves in rows, with one legend at the right.

    Args:
        panels: what is drawn.
        kind: of file: png, svg or pdf.
        share_y: give all panels the same y axis, so that they can be compared.
    """
    with mpl.rc_context(_STYLE):
        columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
        rows = math.ceil(len(panels) / columns)
        height = 3.6 if rows == 1 else 0.3 + 2.7 * rows
        figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten()
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        looks = _looks(panels)
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid, panels, strict=False):
            for curve in _merged(panel.curves):
                handles.setdefault(_plain(curve.label), _draw(axes, curve, looks[curve.label]))
                band = not panel.x_ticks
                _draw_spread(axes, curve, looks[curve.label]["color"], band=band)
            title = _plain(panel.title, _TITLE_WIDTHS[columns])
            axes.set(title=title, ylabel=panel.y_label, xlabel=panel.x_label)
            axes.tick_params(labelleft=True)
            _set_scales(axes, panel, panels if share_y else [panel])
        return _written(figure, handles, kind)


def stacked(panels: Sequence[Bars], kind: str = "png") -> bytes:
    """Draw panels of stacked bars side by side; a part looks the same in all panels."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
        names = list(dict.fromkeys(name for panel in panels for name in panel.parts))
        handles: dict[str, Any] = {}
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            base = [0.0] * len(panel.positions)
            for name, heights in panel.parts.items():
                bars = _bars(axes, panel.positions, heights, base, names.index(name))
                handles.setdefault(_plain(name), bars)
                base = [low + height for low, height in zip(base, heights, strict=True)]
            axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            axes.grid(visible=False, axis="x")
            axes.set_ylim(0, 1.05 * max(base, default=0.0) or 1.0)
            axes.xaxis.set_major_locator(
                MaxNLocator(10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
            )
        return _written(figure, handles, kind)


def _merged(curves: Sequence[Curve]) -> list[Curve]:
    """The curves, with each crowd as one line with gaps: thousands of lines take a minute."""
    crowds: dict[str, list[tuple[float, float]]] = {}
    for curve in curves:
        if curve.role == "crowd":
            crowds.setdefault(curve.label, []).extend([*curve.points, (math.nan, math.nan)])
    merged = [Curve(label, points, role="crowd") for label, points in crowds.items()]
    return [*(curve for curve in curves if curve.role != "crowd"), *merged]


def _looks(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and marker of each label."""
    roles = {curve.label: curve.role for panel in panels for curve in panel.curves}
    named = [label for label, role in roles.items() if role in ("client", "compared", "ordered")]
    ordered = [label for label, role in roles.items() if role == "ordered"]
    looks: dict[str, dict[str, Any]] = {
        label: {
            "color": LINES[i % len(LINES)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
            "first_marker": i,
        }
        for i, label in enumerate(named)
    }
    for i, label in enumerate(ordered):
        shade = 0.75 * i / max(1, len(ordered) - 1)
        looks[label]["color"] = to_hex(mpl.colormaps["viridis"](shade))
    for label, role in roles.items():
        style = {
            "color": _BLACK if role == "mean" else _GREY,
            "linestyle": (0, (1, 2)) if role == "theory" else "-",
            "marker": "" if role == "theory" else "o",
            "first_marker": 0,
        }
        looks.setdefault(label, style)
    return looks


def _draw(axes: Axes, curve: Curve, look: Mapping[str, Any]) -> Any:
    thick, size = {"mean": (2.4, 5.0), "client": (1.0, 3.0), "crowd": (0.6, 2.0)}.get(
        curve.role, (1.3, 0.0) if curve.role == "theory" else (1.8, 5.0)
    )
    xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
    many = len(set(xs)) > MOST_WITH_MARKERS
    every = max(1, math.ceil(len(xs) / 8)) if curve.role == "ordered" else 1
    (line,) = axes.plot(
        xs,
        ys,
        color=look["color"],
        linestyle=look["linestyle"],
        marker="" if many and every == 1 else look["marker"],
        linewidth=thick,
        markersize=size,
        markevery=(look["first_marker"] % every, every),
        zorder=3 if curve.role == "mean" else 2,
    )
    return line


def _draw_spread(axes: Axes, curve: Curve, color: str, *, band: bool) -> None:
    """A band along rounds; bars where nothing lies between the points, or there is only one."""
    xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
    ends = curve.band or [(y - one, y + one) for y, one in zip(ys, curve.spread, strict=False)]
    if not ends:
        return
    low, high = [a for a, _ in ends], [b for _, b in ends]
    if band and len(xs) > 1:
        axes.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
    else:
        below = [y - a for y, a in zip(ys, low, strict=True)]
        above = [b - y for y, b in zip(ys, high, strict=True)]
        axes.errorbar(xs, ys, [below, above], color=color, linestyle="", capsize=4, linewidth=1.2)


def differences(panels: Sequence[Differences], kind: str = "png") -> bytes:
    """Draw differences below each other, the first one on top; panels stand side by side."""
    with mpl.rc_context(_STYLE):
        most = max(len(panel.rows) for panel in panels)
        figure = Figure(figsize=(9, 1.2 + 0.34 * most), dpi=150, layout="constrained")
        same = len({tuple(row.label for row in panel.rows) for panel in panels}) == 1
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=same)[0]
        for axes, panel in zip(grid, panels, strict=True):
            axes.axvline(0, color=_GREY, linewidth=1.0, zorder=1)
            for place, row in enumerate(panel.rows):
                _draw_difference(axes, place, row)
            labels = [_plain(row.label, 34) for row in panel.rows]
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.grid(visible=False, axis="y")
            axes.set(title=_plain(panel.title, _TITLE_WIDTHS[2]), xlabel="arm minus reference")
            axes.xaxis.set_major_locator(MaxNLocator(5))
        return _written(figure, {}, kind)


def _draw_difference(axes: Axes, place: int, row: Difference) -> None:
    if row.outer:
        axes.plot(row.outer, [place, place], color=LINES[5], linewidth=7, solid_capstyle="butt")
    if row.inner:
        axes.plot(row.inner, [place, place], color=_BLACK, linewidth=1.4, marker="|", markersize=8)
    axes.plot([row.mean], [place], color=_BLACK, marker="o", markersize=5, zorder=3)


def matrices(panels: Sequence[Matrix], kind: str = "png") -> bytes:
    """Draw confusion matrices side by side, each row shaded by its own shares."""
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            shares = [[count / (sum(row) or 1) for count in row] for row in panel.counts]
            axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
            labels = [_plain(name, 14) for name in panel.names]
            places = range(len(labels))
            axes.set(title=_plain(panel.title, 46), xlabel="predicted class", ylabel="class")
            axes.set_xticks(places, labels, rotation=0 if len(labels) <= 4 else 90)
            axes.set_yticks(places, labels)
            if len(labels) <= _MOST_NUMBERED:
                _number_cells(axes, panel, shares)
        return _written(figure, {}, kind)


def _number_cells(axes: Axes, panel: Matrix, shares: Sequence[Sequence[float]]) -> None:
    """Write each count into its cell, white on a dark one."""
    for row, counts in enumerate(panel.counts):
        for column, count in enumerate(counts):
            color = "white" if shares[row][column] > _DARK else _BLACK
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)


def _bars(
    axes: Axes,
    positions: Sequence[float],
    heights: Sequence[float],
    base: Sequence[float],
    index: int,
) -> BarContainer | PolyCollection:
    few = len(positions) <= 60
    if len(positions) > _MOST_BARS:
        tops = [low + height for low, height in zip(base, heights, strict=True)]
        color = BARS[index % len(BARS)]
        return axes.fill_between(positions, base, tops, step="mid", color=color, linewidth=0)
    return axes.bar(
        positions,
        heights,
        width=0.75 if few else 1.0,
        bottom=base,
        color=BARS[index % len(BARS)],
        hatch=HATCHES[(index + index // len(BARS)) % len(HATCHES)] if few else "",
        edgecolor="white",
        linewidth=0.4 if few else 0.0,
    )


def _set_scales(axes: Axes, panel: Panel, compared: Sequence[Panel]) -> None:
    """Scales and ticks; ``compared`` are the panels that share the y axis."""
    heights = [y for one in compared for curve in one.curves for _, y in curve.points]
    low, high = min(heights), max(heights)
    if low > 0 and (panel.always_log or (panel.log and high > 5 * low)):
        axes.set_yscale("log")
        if high < 10 * low:  # else a flat line looks steep, and there is no tick to read
            middle = math.sqrt(low * high)
            axes.set_ylim(middle / 4, middle * 4)
        subs = (1, 2, 5) if high < 1000 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.x_ticks:
        axes.set_xscale("log")
        axes.set_xticks(panel.x_ticks, [f"{tick:g}" for tick in panel.x_ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(
            MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
        )
    if len({x for curve in panel.curves for x, _ in curve.points}) == 1:
        only = next(x for curve in panel.curves for x, _ in curve.points)
        axes.set_xlim((only / 2, only * 2) if panel.x_ticks else (only - 1, only + 1))


def _plain(label: str, width: int = 30) -> str:
    """A label that fits: short lines, not too many, and shown even if it begins with _."""
    text = "\n".join(textwrap.wrap(label, width, max_lines=3, placeholder=" …"))
    return f" {text}" if text.startswith("_") else text


def _written(figure: Figure, handles: Mapping[str, Any], kind: str) -> bytes:
    """The figure with its legend as a file of this kind."""
    if handles:
        columns = 1 if len(handles) <= 16 else 2
        figure.legend(
            list(handles.values()), list(handles), loc="outside right upper", ncols=columns,
            handlelength=3.2,
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in another script
        return _png(figure) if kind == "png" else _vector(figure, kind)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    draw: Any = FigureCanvasAgg(figure).print_png  # half the time of savefig, which draws twice
    draw(buffer)
    # A palette makes the file a third of its size, and a page holds hundreds of figures.
    picture, small = Image.open(buffer).convert("RGB"), io.BytesIO()
    picture.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()


def _vector(figure: Figure, kind: str) -> bytes:
    """Without a date, so that equal numbers make equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={_DATES[kind]: None})
    return buffer.getvalue()
