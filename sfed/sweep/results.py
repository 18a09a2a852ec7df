"""What the cells of a sweep came to: which are complete, ``sweep.csv``, the tables.

Needs no torch.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.table import Table

from sfed.config.diff import comparable, differences, flatten
from sfed.config.schema import Config
from sfed.methods import method as methods
from sfed.observability import metrics
from sfed.observability.metrics import deviation
from sfed.storage.card_facts import PRIVACY, privacy_numbers
from sfed.storage.run_record import (
    CONFIG_FILE,
    ForeignFileError,
    expected_adapters,
    held_out,
    look,
    number,
    read_config,
    read_rounds,
    was_evaluated,
)
from sfed.sweep.cell_names import label_of
from sfed.sweep.grid import Cell, Grid
from sfed.utils.errors import ConfigError
from sfed.utils.files import replacing
from sfed.utils.redaction import masked

Status = Literal["complete", "failed", "not run"]
Row = Mapping[str, Any]
_LOSSES = ("personal_loss", "global_loss")
_AFTER_SCORES = ("grad_norm", "first_grad_norm", "output_rms", "seconds", "uploaded_bytes")


@dataclass(frozen=True)
class CellStatus:
    """How far a cell's run folder has come."""

    complete: bool = False
    problem: str | None = None
    """Why the folder may not be gone on with; None where it may."""
    events: Sequence[Mapping[str, Any]] = ()
    """The events of its rounds."""
    note: str | None = None
    """What was passed over while reading them; None where nothing was."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says beside the configuration."""

    @property
    def rounds(self) -> int:
        """Finished rounds."""
        return max((event["round"] for event in self.events), default=0)


def stand(cell: Cell, num_processes: int) -> CellStatus:
    """Look at a cell's run folder."""
    try:
        return _stand(cell, num_processes)
    except OSError as error:
        return CellStatus(
            problem=f"the run folder {cell.folder} cannot be read ({error.strerror}: "
            f"{error.filename}); mend that and start again"
        )


def _stand(cell: Cell, num_processes: int) -> CellStatus:
    path, now = cell.folder / CONFIG_FILE, cell.config
    if not path.is_file():
        return CellStatus()
    num_clients = cell.num_clients(num_processes)
    try:
        saved = read_config(cell.folder)
        there = None if saved is None else saved.parse()
    except (ForeignFileError, ConfigError) as error:
        return CellStatus(problem=f"{path} is not that of a run ({error}); move the folder away")
    if saved is None or there is None:
        return CellStatus(problem=f"{path} is empty; move the folder away")
    num_there = saved.num_clients or there.federated.num_clients or 1
    changed = differences(_settings(there, num_there), _settings(now, num_clients))
    found = read_rounds(cell.folder)
    standing = CellStatus(events=found.events, note=found.note, resolved=saved.resolved)
    if standing.rounds > now.federated.num_rounds:
        planned = now.federated.num_rounds
        changed.append(f"federated.num_rounds: {standing.rounds} rounds done there, {planned} now")
    if changed and now.output.resume == "never":
        return CellStatus()  # the session moves the folder aside
    if changed:
        rows = "\n  ".join(changed)
        return CellStatus(
            problem=f"the run in {cell.folder} was made with other settings:\n  {rows}\n"
            "set them back, or choose another name for the sweep, or set output.resume=never to "
            "begin such runs anew"
        )
    complete = standing.rounds == now.federated.num_rounds and _is_exported(cell, num_clients)
    return replace(standing, complete=complete)


def _settings(config: Config, num_clients: int) -> dict[str, Any]:
    """The settings that a cell's figures depend on: the run's, and how it was evaluated."""
    evaluation = {k: v for k, v in flatten(config).items() if k.startswith("evaluation.")}
    return comparable(config, num_clients) | evaluation


def _is_exported(cell: Cell, num_clients: int) -> bool:
    names = [*expected_adapters(cell.folder, num_clients)]
    wants_global = "global" in cell.config.evaluation.adapters
    if wants_global and methods.resolve(cell.config).has_global_adapter:
        names.append("global")
    files = ("adapter_config.json", "adapter_model.safetensors")
    folder = cell.folder / "adapters"
    return all((folder / name / file).is_file() for name in names for file in files)


def row(grid: Grid, cell: Cell, status: Status, standing: CellStatus) -> Row:
    """A cell's row of ``sweep.csv``. Only a complete cell has figures, those of its last round."""
    found: dict[str, Any] = {"cell": cell.name, "status": status}
    found |= {key: cell.value(key) for key in grid.keys}
    found |= {"gamma": _rounded(look(standing.resolved, "gamma")), "rounds": standing.rounds}
    return found | (_figures(standing) if status == "complete" else {})


def _figures(standing: CellStatus) -> dict[str, Any]:
    events = standing.events
    by_round = {event["round"]: event for event in events}
    evaluated = [
        event
        for event in events
        if was_evaluated(event) or event.get(metrics.EVAL_LOSS) is not None
    ]
    last, end = by_round[standing.rounds], evaluated[-1] if evaluated else {}
    first = by_round.get(1, {})
    scores = standing.resolved.get("scores")
    names = ["loss", *(map(str, scores) if isinstance(scores, list | dict) else ())]
    return {
        **{
            f"{kind}_{name}": held_out(end, kind, name)
            for name in names
            for kind in ("personal", "global")
        },
        "perplexity": number(end, metrics.EVAL_PERPLEXITY),
        "grad_norm": number(last, metrics.GRAD_NORM),
        "first_grad_norm": number(first, metrics.FIRST_GRAD_NORM),
        "output_rms": number(end, metrics.OUTPUT_RMS),
        "seconds": _rounded(sum(number(event, metrics.ROUND_SECONDS) or 0 for event in events)),
        "uploaded_bytes": sum(event.get(metrics.UPLOADED_BYTES) or 0 for event in events),
        **privacy_numbers(standing.resolved, last),
    }


def _rounded(value: Any) -> Any:
    """A computed number, or a list of them, without what rounding left: 2.0000000000000004 is 2."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def write_csv(grid: Grid, rows: Iterable[Row]) -> None:
    """Write ``sweep.csv`` anew; a reader sees the old one or the new one."""
    rows = list(rows)
    columns = ["cell", "status", *grid.keys, "gamma", "rounds", *_LOSSES, "perplexity"]
    columns += [*_scores(rows), *_AFTER_SCORES]
    columns += [name for name in PRIVACY if any(name in one for one in rows)]
    grid.folder.mkdir(parents=True, exist_ok=True)
    with (
        replacing(grid.folder / "sweep.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in one.items()} for one in rows)


def _plain(value: Any) -> Any:
    value = masked(value)
    return json.dumps(value) if isinstance(value, list | dict) else value


def _scores(rows: Sequence[Row]) -> list[str]:
    """The columns of scores that some row has, beside the losses."""
    found = dict.fromkeys(
        key for one in rows for key in one if key.startswith(("personal_", "global_"))
    )
    return [key for key in found if key not in _LOSSES]


def table(grid: Grid, rows: Sequence[Row]) -> Table:
    """Every cell: what varies, and its main figures."""
    figures = _shown(rows)
    made = _table(
        "held-out data after the last round, not the best one",
        [*(_heading(key, grid.keys) for key in grid.keys), "status"],
        ["gamma", *map(_words, figures), "seconds"],
    )
    for one in rows:
        seconds = one.get("seconds")
        made.add_row(
            *(_show(one[key]) for key in grid.keys),
            one["status"],
            _show(one["gamma"]),
            *(_figure(one.get(name)) for name in figures),
            "" if seconds is None else f"{seconds:.1f}",
        )
    return made


def seeds_table(grid: Grid, rows: Sequence[Row]) -> Table | None:
    """Mean and deviation over the seeds of cells equal but for the seed; None where none vary."""
    if "seed" not in grid.keys:
        return None
    others = [key for key in grid.keys if key != "seed"]
    groups: dict[str, list[Row]] = {}
    for one in rows:
        if one["status"] == "complete":
            groups.setdefault(json.dumps([one[key] for key in others]), []).append(one)
    if not groups:
        return None
    figures = _shown(rows)
    made = _table(
        "the same: mean ± standard deviation (n - 1) over the seeds",
        [_heading(key, grid.keys) for key in others],
        ["seeds", *map(_words, figures)],
    )
    for members in groups.values():
        shown = (_spread([one.get(name) for one in members]) for name in figures)
        made.add_row(*(_show(members[0][key]) for key in others), str(len(members)), *shown)
    return made


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table without rows; on a narrow terminal its cells are folded, never cut."""
    made = Table(title=title, title_justify="left")
    for name in texts:
        made.add_column(name, overflow="fold")
    for name in numbers:
        made.add_column(name, justify="right", overflow="fold")
    return made


def _shown(rows: Sequence[Row]) -> list[str]:
    """The main figures, those that some cell has."""
    names = [*_LOSSES, "perplexity", *_scores(rows)]
    return [name for name in names if any(one.get(name) is not None for one in rows)]


def _spread(values: Sequence[float | None]) -> str:
    """Mean and deviation; none over a part of the seeds, which would be those that went well."""
    known = [value for value in values if value is not None]
    if known and len(known) < len(values):
        return f"no value in {len(values) - len(known)} of {len(values)}"
    if len(known) < 2:
        return _figure(known[0]) if known else ""
    return f"{statistics.fmean(known):.4f} ± {deviation(known):.4f}"


def _heading(key: str, keys: Sequence[str]) -> str:
    return label_of(key, keys) or "method"


def _words(name: str) -> str:
    """A heading: personal, global, perplexity, personal accuracy."""
    return name.removesuffix("_loss").replace("_", " ")


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_show, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
