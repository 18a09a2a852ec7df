"""Checks of a configuration that need no torch and no model.

They run before anything heavy is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from sfed.config.schema import Config
from sfed.methods import method as methods
from sfed.observability import trackers
from sfed.storage import previous_run
from sfed.utils.errors import ConfigError, UserError
from sfed.utils.launcher import launch


def check(config: Config, num_processes: int | None = None) -> None:
    """Check what needs neither torch nor a model, before anything is loaded.

    That is: a method that is unstable with this scaling, more processes than clients, files that do
    not exist, an ``output.resume`` that is no folder, trackers that are not installed.

    Args:
        config: the configuration.
        num_processes: number of processes that hold its clients; None = all of the launcher.

    Raises:
        ConfigError: with all errors at once, a line for each.
    """
    mistakes: list[str] = []
    try:
        methods.resolve(config)
    except UserError as mistake:
        mistakes.append(str(mistake))
    num_processes = num_processes or launch().size
    num_clients = config.federated.num_clients
    if num_clients is not None and num_clients < num_processes:
        mistakes.append(
            f"federated.num_clients = {num_clients} is less than the {num_processes} processes; "
            "every process holds at least one client: start fewer processes or raise it"
        )
    mistakes += [
        f"data.{split}_files: {name!r} {'is a folder' if Path(name).is_dir() else 'does not exist'}"
        "; name files, from the folder in which the command runs"
        for split in ("train", "eval")
        for name in config.files(split)
        if "{client}" not in name and not Path(name).is_file()
    ]
    if config.output.resume not in ("auto", "never") and not Path(config.output.resume).is_dir():
        mistakes.append(
            f"output.resume = {config.output.resume!r}: neither auto nor never nor a folder"
        )
    mistakes += trackers.mistakes(config.output.trackers)
    mistakes += _unwritable(Path(config.output.dir))
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _unwritable(folder: Path) -> list[str]:
    """What keeps run folders from being made in a folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return []
    reason = "cannot be written to" if there.is_dir() else "is not a folder"
    return [f"output.dir = {str(folder)!r}: {there} {reason}; name a folder that can be written to"]


def look_back(config: Config) -> list[str] | None:
    """Look at what an earlier start of this run has left, before anything heavy is imported.

    Returns:
        Where everything is, a line each, where the run is complete and there is nothing to do;
        else None. Never said of a job on several machines, which may not all see the folder.

    Raises:
        CheckpointError: where the run was made with other settings.
    """
    if config.output.resume != "auto":
        return None
    folder, here = Path(config.output.dir) / config.run_name, launch()
    previous_run.refuse_other_settings(folder, config)
    if here.size != here.local_size or not previous_run.is_finished(folder, config):
        return None
    return [
        f"complete, nothing to do: {folder} has all {config.federated.num_rounds} rounds",
        f"adapters   {folder / 'adapters'}  (PeftModel.from_pretrained loads each folder)",
        f"report     sfed report {folder}",
        "train longer with a larger federated.num_rounds; begin anew with output.resume=never",
    ]
