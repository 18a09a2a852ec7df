"""The HTML page of a report: sections, tables and images in one file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sfed.report import comparison_tables, confusion, tables
from sfed.report.comparison_figures import comparisons, law_pictures
from sfed.report.run_figures import Picture, pictures_of
from sfed.report.scaling_law import ScalingFit, laws
from sfed.report.series import last_samples
from sfed.report.tables import show
from sfed.storage.run_record import RunRecord
from sfed.utils.errors import UserError
from sfed.utils.text import printable

# With more runs than these the page compares them and leaves each to a report of its own.
MOST_SECTIONS = 16


def page(title: str, **sections: Any) -> str:
    """The whole page: ``runs``, and ``comparison`` and ``law`` or None. All text is escaped."""
    templates = Environment(
        loader=PackageLoader("sfed.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_readable,
    )
    templates.filters["base64"] = lambda data: base64.b64encode(data).decode()
    template = templates.get_template("report.html.j2")
    return template.render(title=title, dash=tables.NONE, **sections)


def _readable(value: Any) -> Any:
    """What a browser would not show, or obey, is written out; pictures and markup stay."""
    return printable(value, keep="\n\t") if type(value) is str else value


def heading(story: RunRecord) -> str:
    """Name, method, N, r and gamma of a run, as plain text."""
    lora_rank, gamma = tables.lora_facts(story)
    return (
        f"{story.name}: {story.method}, N = {show(story.num_clients, 'g')}, "
        f"r = {lora_rank}, gamma = {gamma}, {story.progress}"
    )


def run_section(story: RunRecord, anchor: str, pictures: Sequence[Picture]) -> dict[str, Any]:
    """All about one run, as ``run.html.j2`` shows it."""
    return {
        "anchor": anchor,
        "heading": heading(story),
        "facts": tables.facts_table(story),
        "excluded": tables.excluded(story),
        "last_round": story.evaluated[-1]["round"] if story.evaluated else None,
        "means": tables.means_table(story),
        "pooled_over": tables.pooled_over(story),
        "clients": tables.clients_tables(story),
        "has_scores": bool(story.score_names),
        "confusion": confusion.tables_of(story),
        "confusion_round": confusion.last_confusion(story)[0],
        "unit": story.unit,
        "figures": _folds(pictures),
        "samples": tables.samples_table(story),
        "samples_round": last_samples(story)[0],
        "time": tables.time_table(story),
    }


def comparison_section(stories: Sequence[RunRecord], pictures: Sequence[Picture]) -> dict[str, Any]:
    """Several runs against each other, as ``comparison.html.j2`` shows them."""
    return {
        "runs": comparison_tables.runs_table(stories),
        "seeds": comparison_tables.seeds_table(stories),
        "figures": _folds(pictures),
    }


def law_section(found: Sequence[ScalingFit], pictures: Sequence[Picture]) -> dict[str, Any]:
    """Growth with N and r beside what theory says, as ``law.html.j2`` shows it."""
    return {"rows": comparison_tables.law_rows(found), "figures": _folds(pictures)}


def _folds(pictures: Sequence[Picture]) -> list[tuple[str, list[Picture]]]:
    """Neighbours that are folded away under the same heading, together; in their order."""
    return [(folded, list(members)) for folded, members in groupby(pictures, lambda p: p.folded)]


def write_report(stories: Sequence[RunRecord], out: Path | str) -> Path:
    """Write ``report.html`` and ``figures/`` into a folder; needs no torch.

    Args:
        stories: the runs, from ``open_run`` or ``fit``; several are compared.
        out: folder of the report; it is made where it does not exist.

    Returns:
        The page, one file that loads nothing.

    Raises:
        UserError: where it cannot be written.
    """
    out = Path(out)
    several = len(stories) > 1
    comparison, law, runs, written = None, None, [], []
    if several:
        compared, found = comparisons(stories), laws(stories)
        drawn = law_pictures(found)
        comparison = comparison_section(stories, compared)
        law = law_section(found, drawn) if found else None
        written += [(picture.name, picture.png) for picture in (*compared, *drawn)]
    for i, story in enumerate(stories if len(stories) <= MOST_SECTIONS else (), start=1):
        matrix = confusion.picture_of(story)
        pictures = [*pictures_of(story), *([matrix] if matrix else [])]
        prefix = f"{i:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', story.name)}-" if several else ""
        runs.append(run_section(story, f"run-{i}", pictures))
        written += [(prefix + picture.name, picture.png) for picture in pictures]
    title = f"{len(stories)} federated runs" if several else f"Federated run {stories[0].name}"
    html = page(title, runs=runs, comparison=comparison, law=law)
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name, png in written:
            (out / "figures" / f"{name}.png").write_bytes(png)
        path = out / "report.html"
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot be written to {str(out)!r}: {error.strerror}") from None
    return path
