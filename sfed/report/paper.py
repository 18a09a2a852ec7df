"""What a paper takes from runs: figures as SVG and PDF, tables as LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence

from sfed.report import comparison_tables, confusion, tables
from sfed.report.run_figures import Picture
from sfed.report.scaling_law import ScalingFit
from sfed.report.tables import NONE, Table
from sfed.storage.run_record import RunRecord
from sfed.utils.text import printable

_VECTORS = ("svg", "pdf")
_MOST_ROWS = 40  # of a tabular; more go over several pages
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # At the beginning of a row these would be arguments of the line break before it.
    "[": "{[}",
    "*": "{*}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{EN DASH}": "--",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
}
_NUMBER = re.compile(r"([-+]?[\d,]*\d(?:\.\d+)?)( %| s| MiB)?")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def paper_files(pictures: Mapping[str, Picture], shown: Mapping[str, Table]) -> dict[str, bytes]:
    """The files of ``paper/``: name -> content.

    Args:
        pictures: by the name of their file, without its end.
        shown: tables by the same.
    """
    files = {
        f"{name}.{kind}": picture.draw(kind)
        for name, picture in pictures.items()
        for kind in _VECTORS
    }
    for name, table in shown.items():
        if table.rows:
            files[f"{name}.tex"] = latex(table).encode()
            files[f"{name}.csv"] = csv_text(table).encode()
    return files


def tables_of_run(story: RunRecord) -> dict[str, Table]:
    """The tables of one run by their names."""
    clients = {
        f"clients{f'-{i}' if i > 1 else ''}": table
        for i, table in enumerate(tables.clients_tables(story), start=1)
    }
    matrices = {
        f"confusion-{kind}": table
        for kind, (_, table) in zip(
            confusion.last_confusion(story)[1], confusion.tables_of(story), strict=False
        )
    }
    return {
        "facts": tables.facts_table(story),
        "means": tables.means_table(story),
        **clients,
        **matrices,
        "time": tables.time_table(story),
    }


def tables_of_several(
    stories: Sequence[RunRecord], found: Sequence[ScalingFit]
) -> dict[str, Table]:
    """The tables that compare runs, by their names."""
    return {
        "compare-runs": comparison_tables.runs_table(stories),
        "compare-seeds": comparison_tables.seeds_table(stories),
        "law": comparison_tables.law_table(found),
    }


def latex(table: Table) -> str:
    r"""A ``tabular`` in the style of booktabs, or a ``longtable`` of many rows, for ``\input``."""
    is_long = len(table.rows) > _MOST_ROWS
    name = "longtable" if is_long else "tabular"
    columns = "l" * table.text_columns + "r" * (len(table.head) - table.text_columns)
    head = _groups(table)
    if any(table.head):
        head += [_row(table.head), r"\midrule"]
    lines = [
        rf"% Needs \usepackage{{{'booktabs,longtable' if is_long else 'booktabs'}}}.",
        rf"\begin{{{name}}}{{{columns}}}",
        r"\toprule",
        *head,
        *([r"\endhead"] if is_long else []),
        *map(_row, table.rows),
        r"\bottomrule",
        rf"\end{{{name}}}",
    ]
    return "\n".join(lines) + "\n"


def _groups(table: Table) -> list[str]:
    """The line of headings that span columns, and the rules below these."""
    if not table.groups:
        return []
    cells, rules, column = [], [], 1
    for title, width in table.groups:
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{_escaped(title)}}}")
        if title:
            rules.append(rf"\cmidrule(lr){{{column}-{column + width - 1}}}")
        column += width
    return [" & ".join(cells) + r" \\", " ".join(rules)]


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    told = "".join(_LATEX.get(letter, letter) for letter in printable(text))
    is_negative = text.startswith("-") and _NUMBER.fullmatch(text)
    return f"${told[0]}${told[1:]}" if is_negative else told  # a minus, not a hyphen


def csv_text(table: Table) -> str:
    """The table as CSV, with numbers that programs read and units in the headings.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    parts = [title for title, width in table.groups for _ in range(width)] or [""] * len(table.head)
    columns = [list(column) for column in zip(*table.rows, strict=True)]
    head = []
    for i, (part, title) in enumerate(zip(parts, table.head, strict=True)):
        name = f"{part}: {title}" if part and title else part or title
        if i < table.text_columns:
            columns[i] = [_harmless(cell) for cell in columns[i]]
            head.append(_harmless(name))
            continue
        columns[i], unit = _numbers(columns[i])
        head.append(_harmless(f"{name} ({unit})" if unit else name))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def _numbers(cells: Sequence[str]) -> tuple[list[str], str]:
    """Cells without commas, dashes for nothing and a unit that all share; and this unit.

    A column with other cells, such as 1 min 2 s beside 45 s, has no unit that is all of its.
    """
    found = [_NUMBER.fullmatch(cell) for cell in cells]
    units = {match[2] or "" for match in found if match}
    others = [cell for cell, match in zip(cells, found, strict=True) if not match and cell != NONE]
    if len(units) > 1 or (others and units != {""}):
        return ["" if cell == NONE else _harmless(cell) for cell in cells], ""
    plain = [
        match[1].replace(",", "") if match else "" if cell == NONE else _harmless(cell)
        for cell, match in zip(cells, found, strict=True)
    ]
    return plain, units.pop().strip() if units else ""


def _harmless(text: str) -> str:
    shown = printable(text)
    return f"'{shown}" if shown.startswith(_FORMULA) and not _NUMBER.fullmatch(shown) else shown
