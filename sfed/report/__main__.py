"""Report: ``python -m sfed.report RUN [RUN ...]`` turns run folders into one ``report.html``.

A folder of runs stands for all runs in it. The page holds its figures and loads nothing. It works
on a run that is still running. Needs no torch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from sfed.report.files import find_runs
from sfed.report.page import MOST_SECTIONS, write_report
from sfed.storage.run_record import open_run
from sfed.utils import command
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask

_SEVERAL = 8


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m sfed.report",
        description="Make one self-contained report.html, and figures/*.png, of run folders.",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", type=Path, help="a run folder, or a folder of run folders"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to write; default: the one folder that is given, or ./report for several",
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="also write paper/: the figures as SVG and PDF, the tables as LaTeX and CSV",
    )
    parser.add_argument(
        "--reference",
        metavar="ARM",
        help="of several runs: the arm that others are compared with, such as fedsa; default: the "
        "first one",
    )
    parser.add_argument(
        "--target-loss",
        metavar="LOSS",
        type=_loss,
        help="of several runs: count rounds and local steps to this held-out loss",
    )
    return parser


def _loss(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def main(arguments: Sequence[str]) -> None:
    """Read the run folders, write the report, say where it is."""
    options = _parser().parse_args(list(arguments))
    given = {folder.resolve(): folder for folder in options.runs}
    if not given:
        raise UserError("no runs given; name run folders, such as runs/demo, or see --help")
    runs = {run.resolve(): run for folder in given.values() for run in find_runs(folder)}
    stories = [open_run(run) for run in runs.values()]
    for note in filter(None, (story.note for story in stories)):
        sys.stderr.write(mask(f"warning: {note}\n"))
    if len(stories) > _SEVERAL:
        each = "" if len(stories) <= MOST_SECTIONS else ": compared; for one of them, name it alone"
        sys.stdout.write(f"drawing  {len(stories)} runs{each}\n")
        sys.stdout.flush()
    out = options.out or (Path("report") if len(given) > 1 else next(iter(given)))
    for option, value in (
        ("--reference", options.reference),
        ("--target-loss", options.target_loss),
    ):
        if value is not None and len(stories) < 2:
            raise UserError(f"{option} {value}: only one run is given; it compares several")
    path = write_report(
        stories,
        out,
        paper=options.paper,
        reference=options.reference,
        target_loss=options.target_loss,
    )
    sys.stdout.write(f"report   {path}\nfigures  {path.parent / 'figures'}\n")
    if options.paper:
        sys.stdout.write(f"paper    {path.parent / 'paper'}\n")


if __name__ == "__main__":
    command.run_command(main)
