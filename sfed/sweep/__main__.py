"""Sweep: ``torchrun --nproc_per_node 8 -m sfed.sweep GRID.yaml [key=value ...]``.

Runs every configuration of a grid file, one after another, each in processes of its own. The same
command resumes a sweep that was stopped: complete runs are skipped, the others are resumed.
Exit codes: 0 all runs are complete (or stopped by SIGTERM with everything on disk), 1 some failed,
2 an error in the grid file or the arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sfed.config import load as config_load
from sfed.federated import preflight
from sfed.observability import logs
from sfed.sweep import grid
from sfed.sweep.leader import LONGEST_REASON, follow, lead
from sfed.sweep.workers import Workers
from sfed.utils import command
from sfed.utils.errors import UserError
from sfed.utils.text import one_line

USAGE = """usage: python -m sfed.sweep GRID.yaml [key=value ...]
       torchrun --nproc_per_node 8 -m sfed.sweep GRID.yaml [key=value ...]

Runs every configuration of a grid, one after another, and compares them in sweep.csv. The same
command resumes a stopped sweep. key=value overrides every run. A grid file:

    name: methods                  # runs are in <output.dir>/methods/<run>/; default: the file's
    base: gsm8k.yaml               # a configuration, seen from the grid file (optional)
    set:                           # over the base (optional)
      train: {lr: 1.0e-3}
    grid:                          # every combination; any keys of a configuration
      federated.method: [sfed, fedsa]
      lora.rank: [4, 16]
      seed: [0, 1]
    variants:                      # values that belong together (optional), times the grid
      - {federated.num_clients: 2, train.local_steps: 20}
      - {federated.num_clients: 4, train.local_steps: 10}

Keys of a configuration: python -m sfed.train --help"""


def main(arguments: Sequence[str]) -> None:
    """Read and check the grid, then run what is not complete."""
    words = config_load.split(logs.take_options(arguments))
    party = Workers()
    logs.begin(party.rank)
    if words is None:
        if party.is_main:
            sys.stdout.write(USAGE + "\n" + logs.USAGE + "\n")
        return
    path, overrides = words
    if path is None:
        raise UserError("no grid file given, such as python -m sfed.sweep GRID.yaml; see --help")
    check = partial(preflight.check, num_processes=1)
    found = grid.read(Path(path), overrides, party.size, check)
    try:
        with party.met():
            code = lead(party, found) if party.is_main else follow(party, found)
    except RuntimeError as error:
        if not party.is_lost(error):
            raise
        reason = one_line(error, LONGEST_REASON)
        sys.exit(
            f"sfed: process {party.rank} of the sweep stops: {reason}. Start the same command "
            "again: it skips complete runs and resumes the others"
        )
    sys.exit(code)


if __name__ == "__main__":
    command.run_command(main)
