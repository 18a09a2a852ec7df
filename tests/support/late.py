"""``python -m tests.support.late FOLDER [ARGUMENT ...]``: training that imports torch late.

Each process says its number in a file ``here-RANK`` of FOLDER, when it has begun and has imported
nothing heavy, and goes on when there is a file ``go``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sfed import train
from sfed.utils import command
from tests.support.deadlines import wait_until


def main() -> None:
    folder = Path(sys.argv.pop(1))
    here = folder / f"here-{os.environ['RANK']}"
    here.with_suffix(".new").write_text(str(os.getpid()))
    here.with_suffix(".new").rename(here)
    wait_until((folder / "go").exists)
    command.run_command(train.main)


if __name__ == "__main__":
    main()
