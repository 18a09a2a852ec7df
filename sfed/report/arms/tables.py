"""The tables of arms: paired comparisons, learning rates, convergence."""

from __future__ import annotations

from collections.abc import Sequence

from sfed.report.arms.blocks import Arm, Block
from sfed.report.arms.convergence import final_loss, gradient_norms, reached
from sfed.report.arms.differences import Interval
from sfed.report.arms.pairing import Compared
from sfed.report.arms.rates import Tuned
from sfed.report.tables import NONE, Table, show
from sfed.storage.run_record import KINDS

_SIGNED, _STYLE = "+.4f", "arms"
_MOST_OF_ONE = 10  # clients up to which the worst tenth is the worst client


def paired_table(rows: Sequence[Compared]) -> Table:
    """A row per arm: its means, its difference to the reference, and what that shows."""
    has_tenth = any(row.clients > _MOST_OF_ONE for row in rows)
    has_condition = any(row.condition for row in rows)
    texts = [*(["at"] if has_condition else []), "arm", "shown"]
    own = ["seeds", "mean", "worst client", *(["worst tenth"] if has_tenth else [])]
    compared = ["pairs", "mean"]
    head = [*texts, *own, *compared, "from", "to", "from", "to"]
    groups = [
        ("", len(texts)),
        ("the arm", len(own)),
        ("arm minus reference", len(compared)),
        ("95 % over seeds", 2),
        ("95 % over clients", 2),
    ]
    return Table(
        head,
        [
            [
                *([row.condition] if has_condition else []),
                row.label,
                row.word,
                str(row.seeds),
                show(row.mean),
                show(row.worst),
                *([show(row.tenth if row.clients > _MOST_OF_ONE else None)] if has_tenth else []),
                *_difference(row),
            ]
            for row in rows
        ],
        text_columns=len(texts),
        groups=groups,
        style=_STYLE,
    )


def _difference(row: Compared) -> list[str]:
    one = row.difference
    if one is None:
        return [NONE] * 6
    return [
        str(one.seeds),
        show(one.mean, _SIGNED),
        *_ends(one.over_seeds),
        *_ends(one.over_clients),
    ]


def _ends(one: Interval | None) -> list[str]:
    return [NONE, NONE] if one is None else [show(one.low, _SIGNED), show(one.high, _SIGNED)]


def rates_table(found: Sequence[Tuned]) -> Table:
    """A row per arm: what was selected by at each rate of the grid, and the best rate."""
    grid = sorted({rate for one in found for rate in one.means})
    has_condition = any(one.condition for one in found)
    rows = [
        [
            *([one.condition] if has_condition else []),
            one.name,
            one.edge,
            NONE if one.best is None else f"{one.best.rate:g}",
            str(len(one.seeds)),
            *(show(one.means.get(rate)) for rate in grid),
        ]
        for one in found
    ]
    texts = [*(["at"] if has_condition else []), "arm", "edge"]
    head = [*texts, "best rate", "seeds", *(f"{rate:g}" for rate in grid)]
    groups = [("", len(texts) + 2), ("mean at each learning rate", len(grid))]
    return Table(head, rows, text_columns=len(texts), groups=groups, style=_STYLE)


def convergence_table(found: Sequence[Block], best: Sequence[Arm], target: float | None) -> Table:
    """A row per arm: final losses, gradient norms, and when the target was reached.

    Args:
        found: the arms.
        best: those at their own best learning rate; none where there is one rate.
        target: held-out loss; None leaves its columns out.
    """
    has_condition = any(block.condition for block in found)
    texts = [*(["at"] if has_condition else []), "arm", *(["own best rate"] if best else [])]
    chosen = {(arm.key, arm.rate) for arm in best}
    rows = [
        [
            *([block.condition] if has_condition else []),
            arm.label,
            *(["yes" if (arm.key, arm.rate) in chosen else ""] if best else []),
            ", ".join(map(str, arm.runs)) or NONE,
            *(show(final_loss(arm, kind)) for kind in KINDS),
            *map(show, gradient_norms(arm)),
            *([] if target is None else _times(arm, target)),
        ]
        for block in found
        for arm in block.arms
    ]
    groups = [("", len(texts) + 1), ("final loss", 2), ("gradient norm", 2)]
    head = [*texts, "seeds", *KINDS, "first round", "last round"]
    if target is not None:
        head += ["rounds", "local steps"] * len(KINDS)
        groups += [(f"{kind} loss at most {target:g}", 2) for kind in KINDS]
    return Table(head, rows, text_columns=len(texts) + 1, groups=groups, style=_STYLE)


def _times(arm: Arm, target: float) -> list[str]:
    """Rounds and local steps of each seed, for each kind of adapter."""
    cells = []
    for kind in KINDS:
        found = [reached(story, kind, target) for story in arm.runs.values()]
        lowest = [one.lowest for one in found if one and one.round is None]
        if found and len(lowest) == len(found):
            cells += [f"not reached (lowest {min(lowest):.4f})", NONE]
            continue
        rounds = [
            NONE
            if one is None
            else f"not reached (lowest {one.lowest:.4f})"
            if one.round is None
            else str(one.round)
            for one in found
        ]
        steps = [NONE if one is None or one.steps is None else f"{one.steps:g}" for one in found]
        cells += [_together(rounds), _together(steps)]
    return cells


def _together(of_seeds: Sequence[str]) -> str:
    """A text per seed; one where all are missing."""
    return NONE if set(of_seeds) <= {NONE} else ", ".join(of_seeds)
