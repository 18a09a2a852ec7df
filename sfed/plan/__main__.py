"""Plan: ``python -m sfed.plan CONFIG [key=value ...] --gpus 8 --gpu-memory 80GiB``: does it fit?

No GPU is touched and no weights are read: only the model's own configuration. What a pass costs in
memory is counted on two of its layers, without computing them. Exit codes: 0 it fits, 1 it does not
(and what would), 2 a mistake in the configuration or the arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sfed.config import load as config_load
from sfed.plan.checks import check_plan
from sfed.plan.request import LINKS, Machine, Pace
from sfed.utils import command
from sfed.utils.errors import UserError
from sfed.utils.text import parse_size

_DOES_NOT_FIT = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m sfed.plan --help")


def _size(text: str) -> int:
    size = parse_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 80GiB")
    return size


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sfed.plan",
        description="Say whether a run fits on the GPUs, and how long a round takes. No GPU is "
        "touched and no weights are read.",
        epilog="Exit codes: 0 it fits, 1 it does not (and what would), 2 a mistake. Keys: see "
        "python -m sfed.train --help.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("words", metavar="CONFIG | key=value", nargs="+", help="as for sfed.train")
    add("--gpus", metavar="N", type=_count, default=8, help="GPUs, a process on each [8]")
    add("--gpu-memory", metavar="SIZE", type=_size, default="80GiB", help="of each [80GiB]")
    add("--link", choices=tuple(LINKS), default="nvlink", help="[nvlink]")
    add("--tokens", metavar="MEAN", type=_count, help="of a row, for times [data.max_tokens]")
    add("--tokens-per-second", metavar="X", type=_positive, help="of a GPU, in place of a guess")
    add("--tflops", metavar="X", type=_positive, default=989.0, help="datasheet, bf16 [989: H100]")
    add("--json", metavar="FILE", type=Path, help="write everything here")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, predict, show; exit code 1 where it does not fit."""
    given = _parser().parse_intermixed_args(list(arguments))
    words = config_load.split(given.words)
    assert words is not None
    config = config_load.load(*words)
    check_plan(config, given.gpus)
    if given.json is not None and not given.json.parent.is_dir():
        raise UserError(f"--json {given.json}: the folder {given.json.parent} does not exist")
    warnings.simplefilter("ignore")
    _say("loading PyTorch")
    from sfed.plan import estimate  # torch and all that is behind it

    machine = Machine(given.gpus, given.gpu_memory, given.link, given.tflops * 1e12)
    pace = Pace(given.tokens, given.tokens_per_second)
    results = estimate.predict(config, machine, pace, _say)
    from sfed.plan.tables import show

    show(results)
    if given.json is not None:
        _write(given.json, results)
    if not results["fits"]:
        sys.exit(_DOES_NOT_FIT)


def _say(line: str) -> None:
    """Tell who waits what is under way; the plan itself goes to stdout."""
    sys.stderr.write(f"{line} ...\n")
    sys.stderr.flush()


def _write(path: Path, results: object) -> None:
    try:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    command.run_command(main)
