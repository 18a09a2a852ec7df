"""The HTML page of a report: sections, tables and images in one file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from sfed.report import comparison_tables, tables
from sfed.report.comparison_figures import comparisons, law_pictures
from sfed.report.run_figures import Picture, pictures_of
from sfed.report.scaling_law import Law, laws
from sfed.report.tables import show
from sfed.storage.run_record import Story, number
from sfed.utils.errors import UserError

_ABOUT_THE_LAW = (
    "A starts as the mean of N independent draws (mean of N), as one draw for all (shared), or as "
    "independent draws that are not averaged (apart). Slopes are log-log, by least squares over N "
    "at each fixed r and over r at each fixed N: the mean of these fits and, where there are "
    "several, the lowest and the highest; of seeds the logarithms are averaged. First gradient "
    "norm: of the first step of round 1, before clipping, mean over clients. Output squared: mean "
    "square of gamma B A x over tokens and layers. Theory holds for B = 0 at the start, small "
    "steps, r well above N and wide layers, under SGD only where no step was clipped. Under Adam "
    "the slope of the output over r comes out lower in layers of finite width: by about 0.3 in "
    "linear layers of width 256."
)


# With more runs than these the page compares them and leaves each to a report of its own.
MOST_SECTIONS = 16
_CSS = """
body { font: 15px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #111;
  background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .5rem 0; font-size: .9rem; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top; }
th:empty { padding: 0; } .over { text-align: center; } .over:empty { border-bottom: 0; }
.law { font-size: .8rem; } .law td, .law th { white-space: nowrap; padding-right: .6rem; }
sup { line-height: 0; } .wide { overflow-x: auto; } details { margin: 1rem 0; }
summary { cursor: pointer; }
.samples { width: 100%; } .samples td { width: 30%; padding-right: 1rem; }
.samples td:first-child { width: 10%; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
th { font-weight: 600; border-bottom: 1.5px solid #111; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .85rem; }
@media print {
  @page { margin: 15mm; } body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  section + section { break-before: page; } h2, h3 { break-after: avoid; }
  table, .law { font-size: 7pt; } th, td { padding-right: .4rem; } .wide { overflow: visible; }
  details::details-content { content-visibility: visible; }
  details > summary { list-style: none; } figure, tr { break-inside: avoid; }
  a { color: inherit; text-decoration: none; } }
"""


def heading(story: Story) -> str:
    """Name, method, N, r and gamma of a run, as plain text."""
    gamma, lora_rank = number(story.config, "resolved.gamma"), number(story.config, "lora.rank")
    return (
        f"{story.name}: {story.method}, N = {show(story.num_clients, 'g')}, "
        f"r = {show(lora_rank, 'g')}, gamma = {show(gamma, '.4g')}, {story.progress}"
    )


def images(pictures: Sequence[Picture]) -> str:
    """Figures with their captions, some folded; the numbers are in the page itself."""
    parts = []
    for folded, members in groupby(pictures, key=lambda picture: picture.folded):
        html = "\n".join(map(_image, members))
        heading = f"<summary>{escape(folded)}</summary>"
        parts.append(f"<details>{heading}{html}</details>" if folded else html)
    return "\n".join(parts)


def _image(picture: Picture) -> str:
    caption, data = escape(picture.caption), base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def run_section(story: Story, anchor: str, pictures: Sequence[Picture]) -> str:
    """All about one run."""
    return (
        f'<section id="{anchor}"><h2>{escape(heading(story))}</h2>\n{tables.facts_table(story)}'
        f"{tables.excluded_note(story)}{tables.means_table(story)}{tables.clients_tables(story)}"
        f"<h3>Figures</h3>{images(pictures)}{tables.samples_table(story)}"
        f"{tables.time_table(story)}</section>"
    )


def comparison_section(stories: Sequence[Story], pictures: Sequence[Picture]) -> str:
    """Several runs against each other."""
    runs = comparison_tables.runs_table(stories, linked=len(stories) <= MOST_SECTIONS)
    seeds = comparison_tables.seeds_table(stories)
    return f"<section><h2>Comparison</h2>{runs}{seeds}{images(pictures)}</section>"


def law_section(found: Sequence[Law], pictures: Sequence[Picture]) -> str:
    """Growth with N and r beside what theory says."""
    return (
        f"<section><h2>The law: growth with N and r</h2>{comparison_tables.law_table(found)}"
        f"<p class=note>{_ABOUT_THE_LAW}</p>{images(pictures)}</section>"
    )


def page(title: str, sections: Sequence[str]) -> str:
    """The whole page; its policy forbids loading anything."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{_CSS}</style></head>
<body>
<h1>{escape(title)}</h1>
{"".join(sections)}
</body></html>
"""


def write_report(stories: Sequence[Story], out: Path) -> Path:
    """Write ``report.html`` and ``figures/`` into ``out``; returns the page."""
    several = len(stories) > 1
    sections, written = [], []
    if several:
        compared = comparisons(stories)
        sections.append(comparison_section(stories, compared))
        found = laws(stories)
        drawn = law_pictures(found)
        sections += [law_section(found, drawn)] if found else []
        written += [(picture.name, picture.png) for picture in (*compared, *drawn)]
    for i, story in enumerate(stories if len(stories) <= MOST_SECTIONS else (), start=1):
        pictures = pictures_of(story)
        prefix = f"{i:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', story.name)}-" if several else ""
        sections.append(run_section(story, f"run-{i}", pictures))
        written += [(prefix + picture.name, picture.png) for picture in pictures]
    title = f"{len(stories)} federated runs" if several else f"Federated run {stories[0].name}"
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name, png in written:
            (out / "figures" / f"{name}.png").write_bytes(png)
        path = out / "report.html"
        path.write_text(page(title, sections), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot be written to {str(out)!r}: {error.strerror}") from None
    return path
