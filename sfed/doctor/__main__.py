"""Doctor: ``sfed doctor`` examines the machines of a job, first thing on a new cluster.

What is here, whether the processes reach each other and how fast, whether a tiny federation trains
to the numbers of a CPU, ZeRO-3, the memory plan, and how a job ends when one process breaks. Under
torchrun on any number of nodes. Nothing is downloaded. Exit codes: 0 no check failed, 1 one did, 2
an error in the arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sfed.utils import command, versions
from sfed.utils.errors import UserError
from sfed.utils.launcher import launch
from sfed.utils.version import __version__

_NEEDED = (*versions.RECORDED, "tokenizers")


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m sfed.doctor",
        description="Examine the machines of a job: what is here, the links between its "
        "processes, a tiny federation trained and compared with a CPU, ZeRO-3, the memory plan, "
        "and how the job ends when a process breaks. Several processes: torchrun "
        "--nproc_per_node 8 -m sfed.doctor, on every node as for training.",
        epilog="Exit codes: 0 no check failed, 1 one did, 2 an error in the arguments.",
    )
    add = parser.add_argument
    parser.add_json("write everything here, with hardware, versions and all figures")
    add(
        "--dir",
        metavar="FOLDER",
        type=Path,
        default=Path("runs"),
        help="where runs are to be written, on all nodes; what the doctor writes there it removes "
        "[runs]",
    )
    add("--only", metavar="NAME,...", help="these checks [all but the benchmarks]")
    add(
        "--benchmarks",
        action="store_true",
        help="measure speed, kernels, waits and copies too: minutes on a GPU",
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, examine, exit.

    Raises:
        UserError: for wrong arguments, and where a library is missing.
    """
    given = _parser().parse_args(list(arguments))
    command.check_json(given.json)
    missing = [name for name, one in versions.installed(*_NEEDED).items() if one == "not installed"]
    if missing:
        raise UserError(
            f"not installed: {', '.join(missing)}; install sfed with its dependencies (pip "
            "install), in the Python that runs this command"
        )
    if launch().rank == 0:
        sys.stdout.write(f"sfed doctor {__version__}: importing torch, transformers and PEFT\n")
        sys.stdout.flush()
    from sfed.doctor import examination

    only = tuple(given.only.split(",")) if given.only else ()
    options = examination.Options(given.dir, given.json, only, given.benchmarks)
    sys.exit(examination.run(options, arguments))


if __name__ == "__main__":
    command.run_command(main)
