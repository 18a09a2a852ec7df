"""``python -m tests.support.held CONFIG``: training that rests in round 2 until a test goes on.

After the first step of that round each process says so by a file ``here-RANK`` beside CONFIG, once
the others can know from the store where it is. It rests until there is a file ``go``, or until it
has been asked to stop; where ``go`` is there already it does not rest.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sfed import train
from sfed.distributed.shutdown import StopRequest
from sfed.federated.context import Run
from sfed.utils import command
from tests.support import disturbed
from tests.support.deadlines import wait_until
from tests.support.disturbed import Moment

PLACE = "round 2, step 1"


def rest(run: Run, stop: StopRequest, folder: Path) -> None:
    world, go = run.world, folder / "go"
    if go.exists():
        return

    def is_known() -> bool:
        return PLACE in world.side_store.get(f"at/{world.rank}").decode()

    def may_go() -> bool:
        return go.exists() or stop.came_here or world.watch.is_asked_to_stop

    def stay() -> None:
        world.watch.at(PLACE)  # nothing hangs here

    wait_until(is_known, stay)
    (folder / f"here-{world.rank}").touch()
    wait_until(may_go, stay)


def main() -> None:
    folder, process = Path(sys.argv[1]).parent, int(os.environ["RANK"])
    disturbed.at(Moment(process, 2, 1), lambda run, stop: rest(run, stop, folder))
    command.run_command(train.main)


if __name__ == "__main__":
    main()
