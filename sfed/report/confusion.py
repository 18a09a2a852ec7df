"""Confusion matrices of one run: which classes were taken for which. Needs no torch."""

from __future__ import annotations

from functools import partial

from sfed.observability import metrics
from sfed.report import plotting
from sfed.report.plotting import Matrix
from sfed.report.run_figures import Picture
from sfed.report.tables import NONE, Table
from sfed.storage.run_record import KINDS, RunRecord, look

Counts = list[list[int]]
MOST_IN_TABLE, MOST_IN_PICTURE = 12, 60


def last_confusion(story: RunRecord) -> tuple[int | None, dict[str, Counts]]:
    """The last round with confusion matrices, and these by kind of adapter."""
    size = len(_names(story))
    for event in reversed(story.rounds):
        found = event.get(metrics.CONFUSION)
        if isinstance(found, dict):
            return event["round"], {
                kind: found[kind] for kind in KINDS if _is_square(found.get(kind), size)
            }
    return None, {}


def _names(story: RunRecord) -> list[str]:
    names = look(story.config, "resolved.classes")
    return [str(name) for name in names] if isinstance(names, list) else []


def _is_square(counts: object, size: int) -> bool:
    """Whether a value of an event is a matrix of counts of this size."""
    return (
        isinstance(counts, list)
        and len(counts) == size
        and all(isinstance(row, list) and len(row) == size for row in counts)
        and all(type(count) is int and count >= 0 for row in counts for count in row)
    )


def tables_of(story: RunRecord) -> list[tuple[str, Table]]:
    """A table of each kind of adapter with its heading; none of many classes."""
    names, (_, found) = _names(story), last_confusion(story)
    if len(names) > MOST_IN_TABLE:
        return []
    return [(KINDS[kind], _table(names, counts)) for kind, counts in found.items()]


def _table(names: list[str], counts: Counts) -> Table:
    rows = []
    for place, (name, row) in enumerate(zip(names, counts, strict=True)):
        recall = f"{row[place] / sum(row):.4f}" if sum(row) else NONE
        rows.append([name, *(f"{count:,}" for count in row), f"{sum(row):,}", recall])
    sums = [sum(column) for column in zip(*counts, strict=True)]
    precisions = [
        f"{counts[place][place] / total:.4f}" if total else NONE for place, total in enumerate(sums)
    ]
    rows.append(["predicted", *(f"{total:,}" for total in sums), f"{sum(sums):,}", ""])
    rows.append(["precision", *precisions, "", ""])
    head = ["class", *names, "examples", "recall"]
    return Table(head, rows, groups=[("", 1), ("predicted as", len(names)), ("", 2)])


def picture_of(story: RunRecord) -> Picture | None:
    """The matrices of both kinds of adapters side by side; None where there are none to draw."""
    names, (number, found) = _names(story), last_confusion(story)
    if not found or len(names) > MOST_IN_PICTURE:
        return None
    panels = [Matrix(KINDS[kind], names, counts) for kind, counts in found.items()]
    caption = (
        f"Held-out examples by class and predicted class after round {number}; the shade is the "
        "share of the examples of a class."
    )
    return Picture("confusion", caption, partial(plotting.matrices, panels))
