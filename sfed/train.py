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
from pathlib import Path

from sfed import cli, logs, methods, trackers
from sfed.cli import UserError
from sfed.config import Config

USAGE = """usage: python -m sfed.train [CONFIG.yaml] [key=value ...]
       torchrun --nproc_per_node 8 -m sfed.train [CONFIG.yaml] [key=value ...]
       deepspeed --num_gpus 8 --module sfed.train [CONFIG.yaml] [key=value ...]

Federated LoRA fine-tuning: each process is one client or several. Without arguments it runs the
embedded demo. A configuration is a YAML or JSON file; key=value goes over it, or over the defaults
below where there is no file; with data.task=demo, over the demo's configuration.
"""


def main(arguments: Sequence[str]) -> None:
    """Parse, check what can be checked without torch, then run."""
    config = cli.parse(logs.take_options(arguments))
    process = int(os.environ.get("RANK", "0"))
    if config is None:
        if process == 0:
            print(cli.help_text(USAGE + logs.USAGE))
        return
    check_before_torch(config)
    logs.begin(process)
    started = time.monotonic()
    if process == 0:
        logs.LOG.info("importing torch, transformers, PEFT and DeepSpeed")
    from sfed.session import run_session

    run_session(config, import_seconds=time.monotonic() - started)


def check_before_torch(config: Config, num_processes: int | None = None) -> None:
    """Refuse early what needs no model: missing files, too many processes, unstable methods.

    Args:
        config: the configuration.
        num_processes: that hold its clients; None = all of the launcher.

    Raises:
        UserError: with all mistakes at once.
    """
    mistakes: list[str] = []
    try:
        methods.resolve(config)
    except UserError as mistake:
        mistakes.append(str(mistake))
    num_processes = num_processes or int(os.environ.get("WORLD_SIZE", "1"))
    num_clients = config.federated.num_clients
    if num_clients is not None and num_clients < num_processes:
        mistakes.append(
            f"federated.num_clients = {num_clients} is less than the {num_processes} processes; "
            "every process holds at least one client: start fewer processes or raise it"
        )
    mistakes += [
        f"data.{split}_files: {name!r} {'is a folder' if Path(name).is_dir() else 'does not exist'}"
        for split in ("train", "eval")
        for name in config.files(split)
        if "{client}" not in name and not Path(name).is_file()
    ]
    if config.output.resume not in ("auto", "never") and not Path(config.output.resume).is_dir():
        mistakes.append(
            f"output.resume = {config.output.resume!r}: neither auto nor never nor a folder"
        )
    mistakes += trackers.mistakes(config.output.trackers)
    if mistakes:
        raise UserError("\n".join(mistakes))


if __name__ == "__main__":
    cli.run_command(main)
    sys.exit(0)
