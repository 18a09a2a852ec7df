"""What a person sees stays short, whatever the number of clients."""

from __future__ import annotations

import pytest
from rich.table import Table

from sfed.observability import metrics
from sfed.observability.console import Console


def event(losses: list[float]) -> dict:
    clients = [{"client": c, "examples": 5, "eval_loss": loss} for c, loss in enumerate(losses)]
    return {"round": 3, "clients": clients}


def shown(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> tuple[list[int], list[str]]:
    tables: list[Table] = []
    said: list[str] = []
    monkeypatch.setattr(Console, "print_table", lambda _self, table: tables.append(table))
    monkeypatch.setattr(Console, "say", lambda _self, text: said.append(text))
    Console(is_main=True).closing_table(event(losses), event(losses), {})
    [table] = tables
    return [int(str(cell)) for cell in table.columns[0].cells], said


def test_a_table_of_many_clients_holds_the_best_and_the_worst(monkeypatch):
    losses = [float((7 * c) % 1000) for c in range(1000)]
    rows, said = shown(monkeypatch, losses)
    in_order = sorted(range(1000), key=losses.__getitem__)
    assert rows == in_order[:8] + in_order[-8:]
    [line] = said
    assert "of 1,000" in line


def test_a_table_of_few_clients_holds_all_in_order(monkeypatch):
    rows, said = shown(monkeypatch, [float(c % 5) for c in range(32)])
    assert rows == list(range(32)) and not said


def test_a_table_of_a_sample_holds_the_sample_and_says_so(monkeypatch):
    tables: list[Table] = []
    monkeypatch.setattr(Console, "print_table", lambda _self, table: tables.append(table))
    after = event([float(c) for c in range(1000)])
    after[metrics.SAMPLE] = [3, 500]
    Console(is_main=True).closing_table(after, after, {})
    [table] = tables
    assert [str(cell) for cell in table.columns[0].cells] == ["3", "500"]
    assert "a sample of 2 of 1,000 clients" in str(table.title)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ([(1.0, 0.0), (0.4, 0.6)], ["30 % of the time on average, process 1 the longest: 60 %"]),
        ([(1.0, 0.0), (0.9, 0.1)], []),
        ([(0.1, 0.9)], []),
    ],
)
def test_long_waits_of_processes_are_said_at_the_end(monkeypatch, seconds, said):
    lines: list[str] = []
    monkeypatch.setattr(Console, "say", lambda _self, text: lines.append(text))
    processes = [{"busy_seconds": busy, "idle_seconds": idle} for busy, idle in seconds]
    Console(is_main=True).where_processes_waited([{metrics.PROCESSES: processes}])
    assert len(lines) == len(said) and all(part in lines[0] for part in said)
