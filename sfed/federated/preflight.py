"""Checks of a configuration that need no torch and no model.

They run before anything heavy is imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sfed.config.clients import settings_of
from sfed.config.schema import Config
from sfed.config.sections.output import OutputSection
from sfed.data.forms.pair import Pair
from sfed.data.partition import value_of
from sfed.data.tasks import Task, checked_pair, task_of
from sfed.files.checks import Checked, Fault, check_files
from sfed.files.listing import is_local, list_files
from sfed.files.silos import least_rows, num_clients_of, silos_of
from sfed.methods import method as methods
from sfed.observability import trackers
from sfed.privacy import refusals
from sfed.storage import origin, previous_run
from sfed.storage.run_record import REPORT_FILE
from sfed.utils.errors import ConfigError, DataError, UserError
from sfed.utils.launcher import launch
from sfed.utils.text import counted


def check(config: Config, num_processes: int | None = None) -> str:
    """Check what needs neither torch nor a model, before anything is loaded.

    That is: a method that is unstable with this scaling, settings of clients that are not there or
    do not go with the method, adapters to start from that are not there or not plain LoRA, more
    processes than clients, files that do not exist, are of no known kind or hold what cannot be
    learned from, an ``output.resume`` that is no folder, trackers or bitsandbytes that are not
    installed, what privacy cannot stand beside.

    Args:
        config: the configuration.
        num_processes: number of processes that hold its clients; None = all of the launcher.

    Returns:
        What was checked of the files, a line; "" where there are none.

    Raises:
        ConfigError: with all errors at once, a line for each.
        DataError: the same, where all of them are in the files.
    """
    mistakes: list[str] = []
    try:
        mistakes += refusals.mistakes(config, methods.resolve(config))
        _check_origin(config)
    except UserError as mistake:
        mistakes.append(str(mistake))
    num_processes = num_processes or launch().size
    if not mistakes:
        mistakes += _of_settings(config, num_processes)
    listings = [list_files(config, split) for split in ("train", "eval")]
    unlisted = [problem for listing in listings for problem in listing.problems]
    mistakes += unlisted or _of_clients(config, num_processes)
    template = config.data.chat_template or "{"
    if "{" not in template and not Path(template).expanduser().is_file():
        mistakes.append(
            f"data.chat_template: {template!r} is neither a file nor a template, which has braces"
        )
    mistakes += [*_of_output(config.output), *_missing_quantization(config)]
    files = [name for listing in listings for name in listing.files if is_local(name)]
    # What a chat template makes of a conversation is seen when the tokenizer is there.
    task = task_of(config, lambda _turns, _tools: Pair("", ""))
    most = config.data.max_row_characters
    checked = check_files(files, partial(_check_row, config, task), most_characters=most)
    faults = _said(files, checked.faults + _too_few(config, files, checked))
    if mistakes:
        raise ConfigError("\n".join([*mistakes, *faults]))
    if faults:
        raise DataError("\n".join(faults))
    return checked.summary if files else ""


def _of_output(output: OutputSection) -> Iterator[str]:
    """What is wrong with the places that a run reads its checkpoints from and writes to."""
    if output.resume not in ("auto", "never") and not Path(output.resume).is_dir():
        yield f"output.resume = {output.resume!r}: neither auto nor never nor a folder"
    yield from trackers.mistakes(output.trackers)
    yield from _unwritable(Path(output.dir))
    if (prom := output.prometheus_file) and not _can_write(Path(prom).parent):
        yield (
            f"output.prometheus_file = {prom!r}: {Path(prom).parent} is no folder that can be "
            "written to; make it, or name a file in another one"
        )


def _missing_quantization(config: Config) -> list[str]:
    """What is missing of the packages that quantise weights."""
    scheme = config.model.quantization
    if scheme == "none" or importlib.util.find_spec("bitsandbytes") is not None:
        return []
    return [
        f"model.quantization = {scheme}: the package bitsandbytes is not installed; "
        "pip install 'sfed[quantization]', or set model.quantization=none"
    ]


def _check_origin(config: Config) -> None:
    """Check what the run starts from, where that is on disk and the run begins."""
    if config.federated.join is not None and not origin.is_resumed(config):
        found = origin.source(config)
        assert found.run_config is not None
        methods.check_joinable(found.run_config, found.path)  # before what remedies its settings
    origin.adopted(config)


def _of_settings(config: Config, num_processes: int) -> list[str]:
    """What is wrong with the settings of single clients, as far as their names are known.

    The values of a column are known when the data are read.
    """
    if config.partition.kind == "by_key":
        return []
    try:
        num_clients = num_clients_of(config) or num_processes
        names: Sequence[str] = [""] * num_clients
        if config.partition.kind == "by_file":
            names = silos_of(config, num_clients).names
        ranks = [one.lora_rank for one in settings_of(config, names)]
        methods.refuse_mixed_ranks(config, ranks)
        if config.lora.start_from is None and config.federated.join is None:
            methods.resolve(config).gammas(ranks, [1.0] * num_clients)
    except ConfigError as mistake:
        return [str(mistake)]
    except DataError:  # said with the files
        return []
    return []


def _of_clients(config: Config, num_processes: int) -> list[str]:
    """What is wrong with the number of clients, or with which files are whose."""
    try:
        if config.partition.kind == "by_file":
            silos_of(config, config.federated.num_clients)
        num_clients = num_clients_of(config)
    except DataError as mistake:
        return [str(mistake)]
    if num_clients is None or num_clients >= num_processes:
        return []
    if config.federated.num_clients is None:
        return [
            f"data.train_files: {counted(num_clients, 'file')} for {num_processes} processes; each "
            "file is a client and every process holds at least one: start at most "
            f"{num_clients} (--nproc_per_node {num_clients})"
        ]
    return [
        f"federated.num_clients = {num_clients} is less than the {num_processes} processes; "
        "every process holds at least one client: start fewer processes or raise it"
    ]


def _check_row(config: Config, task: Task, row: Any, where: str) -> None:
    checked_pair(task, row, where, config.data.max_row_characters)
    if config.partition.key is not None:
        value_of(row, config.partition.key, where)


def _too_few(config: Config, files: Sequence[str], checked: Checked) -> tuple[Fault, ...]:
    """The files of clients that hold too few rows; files of a pool may be empty."""
    if config.partition.kind != "by_file":
        return ()
    train = set(list_files(config, "train").files)
    least = dict.fromkeys(files, 1) | dict.fromkeys(train, least_rows(config))
    if config.data.on_small_client == "skip":
        least |= dict.fromkeys(train | _held_out_of_left_out(config), 0)
    remedy = {
        True: f"a client needs at least {least_rows(config)}: give more, leave the file out, or "
        "set data.on_small_client=skip",
        False: "nothing can be evaluated on it",
    }
    broken = {name for name, _ in checked.faults}
    return tuple(
        (
            name,
            f"{name}: it holds {counted(count, 'row') if count else 'no rows'}; "
            f"{remedy[name in train]}",
        )
        for name, count in zip(files, checked.rows, strict=True)
        if count < least[name] and name not in broken
    )


def _held_out_of_left_out(config: Config) -> set[str]:
    """The held-out files of the clients that are left out, and of no other."""
    try:
        kept = silos_of(config, config.federated.num_clients).held_out
    except DataError:  # said with the clients
        return set()
    return {*list_files(config, "eval").files} - {*kept}


def _said(files: Sequence[str], faults: Sequence[Fault]) -> list[str]:
    """Faults by file, in the order of the files, under a line that counts them."""
    if not faults:
        return []
    ordered = sorted(faults, key=lambda fault: files.index(fault[0]))
    bad = len({name for name, _ in faults})
    head = f"{bad} of {counted(len(files), 'file')} cannot be used:"
    return [head, *(f"  {text}" for _, text in ordered)]


def _unwritable(folder: Path) -> list[str]:
    """What keeps run folders from being made in a folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if _can_write(there):
        return []
    reason = "cannot be written to" if there.is_dir() else "is not a folder"
    return [f"output.dir = {str(folder)!r}: {there} {reason}; name a folder that can be written to"]


def _can_write(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


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
    report = f"report     sfed report {folder}"
    if previous_run.has_report(folder):
        report = f"report     {folder / REPORT_FILE}"
    elif config.output.report:
        report = ""  # it is written now
    return [
        f"complete, nothing to do: {folder} has all {config.federated.num_rounds} rounds",
        f"adapters   {folder / 'adapters'}  (PeftModel.from_pretrained loads each folder)",
        report,
        "train longer with a larger federated.num_rounds; begin anew with output.resume=never",
    ]
