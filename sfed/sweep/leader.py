"""Process 0 of a sweep decides what runs next; the other processes follow it."""

from __future__ import annotations

import time
from typing import Any

from sfed.observability.console import Console
from sfed.sweep import results, run_process
from sfed.sweep.grid import Cell, Grid
from sfed.sweep.results import CellStatus, Row, Status
from sfed.sweep.workers import Workers
from sfed.utils.errors import UserError
from sfed.utils.text import duration, one_line

LONGEST_REASON = 300


def follow(party: Workers, found: Grid) -> int:
    """Follow process 0 until it says that the sweep is over."""
    while (order := party.hear(f"order-{party.count(f'orders/{party.rank}')}"))["run"] is not None:
        party.run(order["number"], found.cells[order["run"]].config)
    party.tell(f"gone/{party.rank}")
    return int(order["code"])


def lead(party: Workers, found: Grid) -> int:
    """Decide and speak."""
    leader = _Leader(party, found)
    code = 1
    try:
        code = leader.lead()
    finally:
        leader.order(run=None, code=code)
        for rank in range(1, party.size):  # process 0 may be the one that serves the store
            party.hear(f"gone/{rank}", speaker=rank)
    return code


class _Leader:
    """Process 0 of a sweep: it alone looks at the run folders, so that all do the same."""

    def __init__(self, party: Workers, found: Grid) -> None:
        self._party, self._grid = party, found
        self._console = Console(is_main=True)
        self._orders = 0
        self._reasons: dict[str, str] = {}
        self._seconds: list[float] = []
        self._rows: dict[str, Row] = {}

    def order(self, **values: Any) -> None:
        """Tell all processes what to do next."""
        self._orders += 1
        self._party.tell(f"order-{self._orders}", {"number": self._orders, **values})

    def lead(self) -> int:
        """Run what is not complete; returns the exit code."""
        self._look_at_all()
        count = f"{self._count('complete')} of {len(self._grid.cells)} complete"
        self._say(f"sweep {self._grid.folder}: {count}")
        for index in range(len(self._grid.cells)):
            if self._party.is_asked_to_stop():
                break
            self._do(index)
        self._close()
        return 1 if self._reasons else 0

    def _look_at_all(self) -> None:
        for cell in self._grid.cells:
            standing = results.stand(cell, self._party.size)
            if standing.note:
                self._console.warn(standing.note)
            self._note(cell, "complete" if standing.complete else "not run", standing)
        try:
            results.write_csv(self._grid, self._rows.values())
        except OSError as error:
            raise UserError(
                f"output.dir: {self._grid.folder} cannot be written ({error.strerror})"
            ) from None

    def _do(self, index: int) -> None:
        """Skip, refuse or run one cell."""
        cell = self._grid.cells[index]
        title = f"cell {index + 1}/{len(self._grid.cells)}  {cell.name}"
        standing = results.stand(cell, self._party.size)
        if standing.complete:
            self._say(f"{title}  complete already")
            self._note(cell, "complete", standing)
            return
        if standing.problem:
            self._say(f"{title}  failed: {standing.problem}")
            self._fail(cell, standing, standing.problem)
        else:
            self._say(f"\n{title}{self._eta()}{self._who_waits(cell)}")
            self._run(index)
        self._write()

    def _eta(self) -> str:
        left = self._count("not run")
        if not self._seconds:
            return ""
        return f"  ETA {duration(left * sum(self._seconds) / len(self._seconds))}"

    def _who_waits(self, cell: Cell) -> str:
        num_clients, size = cell.num_clients(self._party.size), self._party.size
        if num_clients >= size:
            return ""
        return (
            f"\nfederated.num_clients = {num_clients}: {num_clients} of the {size} processes take "
            "part, the others wait"
        )

    def _run(self, index: int) -> None:
        cell, started = self._grid.cells[index], time.monotonic()
        self.order(run=index)
        ends = self._party.run(self._orders, cell.config)
        standing, reason = results.stand(cell, self._party.size), run_process.main_reason(ends)
        if standing.complete and reason is None:
            self._seconds.append(time.monotonic() - started)
            self._note(cell, "complete", standing)
        elif self._party.is_asked_to_stop():
            self._note(cell, "not run", standing)
        else:
            self._fail(cell, standing, reason or "it ended before it was complete")
            self._say(f"cell {cell.name} failed, {self._reasons[cell.name]}")

    def _fail(self, cell: Cell, standing: CellStatus, reason: str) -> None:
        self._reasons[cell.name] = one_line(reason, LONGEST_REASON)
        self._note(cell, "failed", standing)

    def _note(self, cell: Cell, status: Status, standing: CellStatus) -> None:
        self._rows[cell.name] = results.row(self._grid, cell, status, standing)

    def _count(self, status: Status) -> int:
        return sum(row["status"] == status for row in self._rows.values())

    def _write(self) -> None:
        try:
            results.write_csv(self._grid, self._rows.values())
        except OSError as error:  # it is written again after the next cell
            self._console.warn(f"{self._grid.folder / 'sweep.csv'}: {error.strerror}")

    def _say(self, text: str) -> None:
        self._console.say(text)

    def _close(self) -> None:
        """The tables, what failed, and where everything is."""
        rows = list(self._rows.values())
        self._say("")
        for table in (results.table(self._grid, rows), results.seeds_table(self._grid, rows)):
            if table is not None:
                self._console.print_table(table)
        counts = [f"{self._count('complete')} of {len(rows)} complete"]
        counts += [f"{n} {s}" for s in ("failed", "not run") if (n := self._count(s))]
        self._say(", ".join(counts))
        for name, reason in self._reasons.items():
            self._say(f"  failed  {name}  {reason}")
        if self._count("not run"):
            self._say("stopped as asked; the same command resumes the sweep")
        self._say(f"figures    {self._grid.folder / 'sweep.csv'}")
        self._say(f"report     python -m sfed.report {self._grid.folder}")
