"""Scaling as tables: rounds of one job, or of several jobs beside each other. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from sfed.utils import json_text
from sfed.utils.errors import UserError
from sfed.utils.text import one_line

Json = Mapping[str, Any]
# What has to be the same for figures to be comparable; the same question on other machines is one.
_SAME = ("shape", "dtype", "num_clients", "rows", "tokens", "lora_rank", "target_modules")
_KINDS = {
    "weak": "weak scaling: as many clients on each process",
    "strong": "strong scaling: as many clients on all processes together",
}


_STARTS = {"first": "first start", "again": "again", "nothing to do": "nothing to do"}


# What a file may make of a table that takes it for results: a key that is not there, another type.
_OF_OTHER_CONTENT = (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError)


@contextmanager
def results_of(files: Sequence[Path]) -> Iterator[None]:
    """Within it, what is used are results that were read from files, of any content.

    Raises:
        UserError: where they lack something, or hold it in another form.
    """
    try:
        yield
    except UserError:
        raise
    except (*_OF_OTHER_CONTENT, ValueError) as error:
        names = ", ".join(map(str, files))
        raise UserError(
            f"--scaling-of {names}: no whole results of sfed.bench --scaling --json "
            f"({type(error).__name__}: {one_line(error)}); measure again"
        ) from None


def together(files: Sequence[Path]) -> dict[str, Any]:
    """Read the results of jobs and put them together, ordered by their number of processes.

    Raises:
        UserError: where a file holds no such results, or those of another configuration.
    """
    read = [(file, _read(file)) for file in files]
    with results_of(files):
        return _together(read)


def _together(read: Sequence[tuple[Path, Json]]) -> dict[str, Any]:
    first_file, first = read[0]
    for file, results in read[1:]:
        for key in _SAME:
            one, other = first["configuration"].get(key), results["configuration"].get(key)
            if one != other:
                raise UserError(
                    f"--scaling-of: {key} is {one!r} in {first_file} and {other!r} in {file}; give "
                    "results of one configuration"
                )
    jobs = [job for _, results in read for job in results["scaling"]]
    jobs.sort(key=lambda job: (job["processes"], job["nodes"]))
    return {**first, "machine": jobs[-1]["machine"] | {"processes": jobs[-1]["processes"]}} | {
        "scaling": jobs,
        "notes": sorted({note for _, results in read for note in results["notes"]}),
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        results = json_text.read(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UserError(f"--scaling-of {file}: cannot be read ({reason})") from None
    if not isinstance(results, dict) or not isinstance(results.get("scaling"), list):
        raise UserError(
            f"--scaling-of {file}: holds no results of sfed.bench --scaling --json; give such files"
        )
    return results


def tables(jobs: Sequence[Json]) -> list[Table]:
    """A table of each kind of scaling that was measured."""
    kinds = {row["kind"] for job in jobs for row in job["rounds"]}
    return [_table(kind, jobs) for kind in _KINDS if kind in kinds]


def _table(kind: str, jobs: Sequence[Json]) -> Table:
    steps = jobs[0]["steps_of_a_round"]
    table = Table(title=f"{_KINDS[kind]}; rounds of {steps} steps", title_justify="left")
    table.add_column("backbone")
    for column in ("processes", "nodes", "clients", "ms/round", "min..max", "tokens/s each"):
        table.add_column(column, justify="right")
    for column in ("efficiency", "waiting", "mean of A", "gathers, hooks"):
        table.add_column(column, justify="right")
    first: dict[str, float] = {}
    for storage, job, row in _rows(kind, jobs):
        rate = row["tokens_per_second_and_process"]["median"]
        ms = {key: f"{1e3 * row['seconds'][key]:,.0f}" for key in ("median", "min", "max")}
        table.add_row(
            storage,
            str(job["processes"]),
            str(job["nodes"]),
            str(row["clients"]),
            ms["median"],
            f"{ms['min']}..{ms['max']}",
            f"{rate:,.0f}",
            f"{100 * rate / first.setdefault(storage, rate):.0f} %",
            *(_percent(row[share]) for share in ("waiting_share", "mean_share", "gather_share")),
        )
    return table


def _rows(kind: str, jobs: Sequence[Json]) -> list[tuple[str, Json, Json]]:
    """Storage, job and its rounds, the storages in the order in which they were measured."""
    found = [(row["storage"], job, row) for job in jobs for row in job["rounds"]]
    names = list(dict.fromkeys(storage for storage, _, _ in found))
    rows = [one for one in found if one[2]["kind"] == kind]
    return sorted(rows, key=lambda one: names.index(one[0]))


def _percent(share: Json | None) -> str:
    if share is None:
        return ""
    return f"{100 * share['median']:.1f} %"


def clients_tables(points: Sequence[Json]) -> list[Table]:
    """Parts of runs against the number of clients: of the first start, and of later ones."""
    tables = []
    for start, title in _STARTS.items():
        found = [point["starts"][start] for point in points]
        table = Table(title=f"{title}: CPU seconds", title_justify="left")
        table.add_column("N")
        for point in points:
            table.add_column(f"{point['clients']:,}", justify="right")
        table.add_column("growth", justify="right")
        parts = dict.fromkeys(part for one in found for part in one["parts"])
        for part in parts:
            seconds = [one["parts"].get(part, 0.0) for one in found]
            table.add_row(part, *(f"{x:,.2f}" for x in seconds), _growth(points, seconds))
        table.add_section()
        whole = [one["cpu_seconds"] for one in found]
        table.add_row("all", *(f"{x:,.2f}" for x in whole), _growth(points, whole))
        peaks = [one["peak_bytes"] for one in found]
        shown = [f"{x / 2**20:,.0f} MiB" for x in peaks]
        table.add_row("peak memory", *shown, _growth(points, peaks))
        for key in ("checkpoint_files", "adapter_files"):
            table.add_row(key.replace("_", " "), *(f"{one[key]:,}" for one in found), "")
        tables.append(table)
    return tables


_LEAST_SECONDS = 0.2
"""Below it the growth of a part says nothing."""


def _growth(points: Sequence[Json], values: Sequence[float]) -> str:
    """The exponent p with which a value grows as N^p from the last but one N to the last."""
    if len(points) < 2 or values[-1] < _LEAST_SECONDS or values[-2] <= 0:
        return ""
    counts = [point["clients"] for point in points]
    return f"N^{math.log(values[-1] / values[-2]) / math.log(counts[-1] / counts[-2]):.2f}"


CLIENTS_EXPLANATIONS = (
    "One process, one thread, the demo's model: a round of one step of every client, or of "
    "those of --cohort, evaluated before and after, a checkpoint, the adapters. again: as after a "
    "kill while the adapters were written. CPU seconds, since they depend less on other work of "
    "the machine than the clock; the checkpoint is written by a thread beside the run.",
    "growth: from the last but one N to the last; N^1 is in proportion. A part is without those "
    "that are within it.",
)


EXPLANATIONS = (
    "medians. tokens/s each: of a process. efficiency: that beside the first row of the same "
    "backbone; 100 % is perfect. "
    "One job measures its own number of processes: write --json for each and show them together "
    "with --scaling-of FILE FILE ...",
    "waiting: for the slowest process at the end of the local steps, mean over processes. mean of "
    "A: the all_reduce with its sums. gathers, hooks: how much longer the local steps take on "
    "ZeRO-3's shards than on a replica in the same turn; processes that wait for each other within "
    "a step are in it. All are shares of the round.",
    "zero3 hpZ: each node holds a second copy of the shards, and gathers stay within the node; "
    "measured where several nodes have several processes each. A run uses it with "
    "backbone.deepspeed={zero_optimization: {zero_hpz_partition_size: PROCESSES OF A NODE}}.",
)
