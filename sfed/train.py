"""Train: ``torchrun --nproc_per_node 8 -m sfed.train [CONFIG.yaml] [key=value ...]``.

Without arguments it runs the embedded demo, which downloads nothing. Exit codes: 0 done (or stopped
by SIGTERM with everything on disk), 2 a mistake in configuration, data or arguments, 1 anything
else.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from sfed.config import load as config_load
from sfed.federated.preflight import check_before_torch
from sfed.observability import logs
from sfed.utils import command

USAGE = """usage: python -m sfed.train [CONFIG.yaml] [key=value ...]
       torchrun --nproc_per_node 8 -m sfed.train [CONFIG.yaml] [key=value ...]
       deepspeed --num_gpus 8 --module sfed.train [CONFIG.yaml] [key=value ...]

Federated LoRA fine-tuning: each process is one client or several. Without arguments it runs the
embedded demo. A configuration is a YAML or JSON file; key=value goes over it, or over the defaults
below where there is no file; with data.task=demo, over the demo's configuration.
"""


def main(arguments: Sequence[str]) -> None:
    """Parse, check what can be checked without torch, then run."""
    config = config_load.parse(logs.take_options(arguments))
    process = int(os.environ.get("RANK", "0"))
    if config is None:
        if process == 0:
            print(config_load.help_text(USAGE + logs.USAGE))
        return
    check_before_torch(config)
    logs.begin(process)
    started = time.monotonic()
    if process == 0:
        logs.LOG.info("importing torch, transformers, PEFT and DeepSpeed")
    from sfed.federated.session import run_session

    run_session(config, import_seconds=time.monotonic() - started)


if __name__ == "__main__":
    command.run_command(main)
    sys.exit(0)
