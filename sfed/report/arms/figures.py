"""The figures of arms: held-out loss over rounds, and paired differences with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

from sfed.report import plotting
from sfed.report.arms.blocks import Arm, Block
from sfed.report.arms.pairing import Compared
from sfed.report.plotting import Curve, Difference, Differences, Panel
from sfed.report.run_figures import Picture, curves
from sfed.report.series import unit_of
from sfed.storage.run_record import KINDS, held_out

MOST_PANELS = 9
_MOST_ROWS = 40


def loss_pictures(found: Sequence[Block], name: str, words: str) -> list[Picture]:
    """Held-out loss over rounds: a figure per kind of adapter, a panel per block, a line per arm.

    Args:
        found: the arms; of more blocks than ``MOST_PANELS`` there is no figure.
        name: of the files.
        words: what the arms are, for the caption.
    """
    if len(found) > MOST_PANELS:
        return []
    made = [
        curves(
            f"{name}-{kind}",
            f"Held-out loss over rounds{words}, {meaning}: mean over clients and seeds; band: "
            "lowest and highest of the seeds.",
            [_panel(block, kind) for block in found],
        )
        for kind, meaning in KINDS.items()
    ]
    return [picture for picture in made if picture is not None]


def _panel(block: Block, kind: str) -> Panel:
    stories = [story for arm in block.arms for story in arm.runs.values()]
    lines = [line for arm in block.arms if (line := _line(arm, kind)).points]
    return Panel(block.condition, f"held-out loss{unit_of(stories)}", lines)


def _line(arm: Arm, kind: str) -> Curve:
    """The rounds that all seeds of an arm have evaluated."""
    by_round: dict[float, list[float]] = {}
    for story in arm.runs.values():
        for event in story.rounds:
            if (loss := held_out(event, kind)) is not None:
                by_round.setdefault(float(event["round"]), []).append(loss)
    whole = {x: ys for x, ys in sorted(by_round.items()) if len(ys) == len(arm.runs)}
    band = [(min(ys), max(ys)) for ys in whole.values()] if len(arm.runs) > 1 else []
    return Curve(arm.label, [(x, statistics.fmean(ys)) for x, ys in whole.items()], band=band)


def difference_pictures(
    compared: Sequence[tuple[str, Sequence[Compared]]], name: str, words: str
) -> list[Picture]:
    """Differences to the reference as dots with intervals: a panel per kind of adapter.

    Args:
        compared: title of a panel, and its rows.
        name: of the files.
        words: what is compared, for the caption.
    """
    panels = [
        Differences(
            title,
            [
                Difference(
                    ": ".join(filter(None, [row.condition, row.label])),
                    one.mean,
                    one.over_seeds,
                    one.over_clients,
                )
                for row in rows
                if (one := row.difference) is not None
            ],
        )
        for title, rows in compared
    ]
    shown = [panel for panel in panels if panel.rows]
    if not shown:
        return []
    caption = (
        f"{words}, arm minus reference. Black: 95 % over seeds; wide and light: 95 % over clients "
        "of these seeds."
    )
    most = max(len(panel.rows) for panel in shown)
    return [
        Picture(
            f"{name}-{first // _MOST_ROWS + 1}" if first else name,
            caption,
            partial(plotting.differences, [panel.part(first, _MOST_ROWS) for panel in shown]),
        )
        for first in range(0, most, _MOST_ROWS)
    ]
