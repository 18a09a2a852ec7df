"""One process of a run on a node: trains several settings in turn and tells what its node sent.

Started as ``python -m tests.support.wire FILE`` with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. FILE holds a list of settings; the answer is a line of JSON, what this node put on
the cable while each trained: bytes sent, and at most so many of them sent again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from sfed import train
from sfed.config import load as config_load
from tests.support.netns import Traffic


def traffic() -> Traffic:
    return Traffic.read(*(Path("/proc/self/net", name).read_text() for name in ("dev", "snmp")))


def main() -> None:
    torch.set_num_threads(1)
    port = int(os.environ["MASTER_PORT"])
    sent = []
    for turn, settings in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        os.environ["MASTER_PORT"] = str(port + turn)
        before = traffic()
        train.run(config_load.validate(settings))
        sent.append(traffic().since(before))
    sys.stdout.write(f"sent {json.dumps(sent)}\n")


if __name__ == "__main__":
    main()
