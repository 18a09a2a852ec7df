"""The HTML page of a report: sections, tables and images in one file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sfed.report import comparison_tables, confusion, tables
from sfed.report.arms.section import ArmsSection, Questions, arms_section
from sfed.report.comparison_figures import comparisons, law_pictures
from sfed.report.files import write_files
from sfed.report.opening.picture import opening_of
from sfed.report.paper import paper_files, tables_of_run, tables_of_several
from sfed.report.run_figures import Picture, pictures_of
from sfed.report.scaling_law import ScalingFit, laws
from sfed.report.series import last_samples
from sfed.report.tables import show
from sfed.storage.run_record import REPORT_FILE, RunRecord
from sfed.utils.errors import UserError
from sfed.utils.files import replacing
from sfed.utils.text import printable

# With more runs than these the page compares them and leaves each to a report of its own.
MOST_SECTIONS = 16


def page(title: str, **sections: Any) -> str:
    """The whole page: ``runs``, and perhaps ``comparison``, ``arms``, ``law``. Text is escaped."""
    sections = {**dict.fromkeys(("comparison", "arms", "law")), **sections}
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
    return printable(value, keep="\n\t\u00a0") if type(value) is str else value


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
        "opening": opening_of(story),
        "facts": tables.facts_table(story),
        "excluded": tables.excluded(story),
        "last_round": story.evaluated[-1]["round"] if story.evaluated else None,
        "sample": tables.sample_words(story),
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


def arms_part(found: ArmsSection) -> dict[str, Any]:
    """Arms against each other, as ``arms.html.j2`` shows them."""
    return {"intro": found.intro, "entries": found.entries, "figures": _folds(found.pictures)}


def law_section(found: Sequence[ScalingFit], pictures: Sequence[Picture]) -> dict[str, Any]:
    """Growth with N and r beside what theory says, as ``law.html.j2`` shows it."""
    return {"rows": comparison_tables.law_rows(found), "figures": _folds(pictures)}


def _folds(pictures: Sequence[Picture]) -> list[tuple[str, list[Picture]]]:
    """Neighbours that are folded away under the same heading, together; in their order."""
    return [(folded, list(members)) for folded, members in groupby(pictures, lambda p: p.folded)]


def write_report(
    stories: Sequence[RunRecord],
    out: Path | str,
    *,
    paper: bool = False,
    reference: str | None = None,
    target_loss: float | None = None,
) -> Path:
    """Write ``report.html`` and ``figures/`` into a folder; needs no torch.

    Figures that an earlier report has written there and this one lacks are removed.

    Args:
        stories: the runs, from ``open_run`` or ``fit``; several are compared.
        out: folder of the report; it is made where it does not exist.
        paper: also write ``paper/``: the figures as SVG and PDF, the tables as LaTeX and CSV.
        reference: name of the arm that others are compared with, such as a method; None = the
            first one.
        target_loss: count rounds and local steps to this held-out loss.

    Returns:
        The page, one file that loads nothing.

    Raises:
        UserError: where it cannot be written, or no arm has the name of the reference.
    """
    out, found = Path(out), _Contents()
    several = len(stories) > 1
    if several:
        found.add_comparison(stories, Questions(reference, target_loss))
    for number, story in enumerate(stories if len(stories) <= MOST_SECTIONS else (), start=1):
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", story.name)
        found.add_run(story, f"run-{number}", f"{number:02d}-{name}-" if several else "")
    title = f"{len(stories)} federated runs" if several else f"Federated run {stories[0].name}"
    html = page(title, runs=found.runs, **found.sections)
    try:
        pngs = {f"{name}.png": picture.png for name, picture in found.pictures.items()}
        write_files(out / "figures", pngs)
        if paper:
            write_files(out / "paper", paper_files(found.pictures, found.tables))
        path = out / REPORT_FILE
        with replacing(path) as temporary:
            temporary.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot be written to {str(out)!r}: {error.strerror}") from None
    return path


@dataclass
class _Contents:
    """The sections of a page, and the pictures and tables that have files of their own."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)
    """Those of several runs: ``comparison``, ``law``, ``arms``."""
    pictures: dict[str, Picture] = field(default_factory=dict)
    tables: dict[str, tables.Table] = field(default_factory=dict)

    def add_comparison(self, stories: Sequence[RunRecord], questions: Questions) -> None:
        """Compare several runs."""
        compared, fits = comparisons(stories), laws(stories)
        of_law = law_pictures(fits)
        self.sections["comparison"] = comparison_section(stories, compared)
        if fits:
            self.sections["law"] = law_section(fits, of_law)
        self.pictures |= {picture.name: picture for picture in (*compared, *of_law)}
        self.tables |= tables_of_several(stories, fits)
        if (arms := arms_section(stories, questions)) is not None:
            self.sections["arms"] = arms_part(arms)
            self.pictures |= {picture.name: picture for picture in arms.pictures}
            self.tables |= arms.tables

    def add_run(self, story: RunRecord, anchor: str, prefix: str) -> None:
        """Add the section of one run; its files begin with the prefix."""
        matrix = confusion.picture_of(story)
        pictures = [*pictures_of(story), *([matrix] if matrix else [])]
        self.runs.append(run_section(story, anchor, pictures))
        self.pictures |= {prefix + picture.name: picture for picture in pictures}
        self.tables |= {prefix + name: one for name, one in tables_of_run(story).items()}
