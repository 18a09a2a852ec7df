"""One process of a run on a node: trains several settings in turn and tells what its node sent.

Started as ``python -m tests.support.wire FILE`` with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. FILE holds a list of settings; the answer is a line of JSON, bytes sent by this
node while each trained.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from sfed import train
from sfed.config import load as config_load


def sent_bytes() -> int:
    """Bytes that this node's network has sent, without those to itself."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    rows = [line.replace(":", " ").split() for line in lines]
    return sum(int(row[9]) for row in rows if row[0] != "lo")


def main() -> None:
    torch.set_num_threads(1)
    port = int(os.environ["MASTER_PORT"])
    sent = []
    for turn, settings in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        os.environ["MASTER_PORT"] = str(port + turn)
        before = sent_bytes()
        train.run(config_load.validate(settings))
        sent.append(sent_bytes() - before)
    sys.stdout.write(f"sent {json.dumps(sent)}\n")


if __name__ == "__main__":
    main()
