"""Plan: ``python -m sfed.plan CONFIG [key=value ...] --gpus 8 --gpu-memory 80GiB``: does it fit?

No GPU is touched and no weights are read: only the model's own configuration. What a pass costs in
memory is counted on two of its layers, without computing them. Exit codes: 0 it fits, 1 it does not
(and what would), 2 an error in the configuration or the arguments.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from sfed.config import load as config_load
from sfed.plan.checks import check_plan
from sfed.plan.request import H100_FLOPS, LINKS, Machine, Pace
from sfed.storage import origin
from sfed.utils import command
from sfed.utils.command import count
from sfed.utils.text import parse_size

_DOES_NOT_FIT = 1


def _size(text: str) -> int:
    size = parse_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 80GiB")
    return size


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m sfed.plan",
        description="Say whether a run fits on the GPUs, and how long a round takes. No GPU is "
        "touched and no weights are read.",
        epilog="Exit codes: 0 it fits, 1 it does not (and what would), 2 an error. Keys: see "
        "python -m sfed.train --help.",
    )
    add = parser.add_argument
    add("words", metavar="CONFIG | key=value", nargs="+", help="as for sfed.train")
    add("--gpus", metavar="N", type=count, default=8, help="GPUs, a process on each [8]")
    add("--gpu-memory", metavar="SIZE", type=_size, default="80GiB", help="of each [80GiB]")
    add("--link", choices=tuple(LINKS), default="nvlink", help="[nvlink]")
    add("--tokens", metavar="MEAN", type=count, help="of a row, for times [data.max_tokens]")
    add("--tokens-per-second", metavar="X", type=_positive, help="of a GPU, in place of a guess")
    add(
        "--tflops",
        metavar="X",
        type=_positive,
        default=H100_FLOPS / 1e12,
        help="datasheet, bf16 [989: H100]",
    )
    parser.add_json("write everything here")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, predict, show; exit code 1 where it does not fit."""
    given = _parser().parse_intermixed_args(list(arguments))
    words = config_load.split(given.words)
    assert words is not None
    config = origin.adopted(config_load.load(*words))
    check_plan(config, given.gpus)
    command.check_json(given.json)
    warnings.simplefilter("ignore")
    _say("loading PyTorch")
    from sfed.plan import estimate  # torch and all that is behind it

    machine = Machine(given.gpus, given.gpu_memory, given.link, given.tflops * 1e12)
    pace = Pace(given.tokens, given.tokens_per_second)
    results = estimate.predict(config, machine, pace, _say)
    from sfed.plan.tables import show

    show(results)
    command.write_json(given.json, results)
    if not results["fits"]:
        sys.exit(_DOES_NOT_FIT)


def _say(line: str) -> None:
    """Tell who waits what is under way; the plan itself goes to stdout."""
    sys.stderr.write(f"{line} ...\n")
    sys.stderr.flush()


if __name__ == "__main__":
    command.run_command(main)
