"""What a sweep says of its cells, without training any."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from rich.table import Table

from sfed.sweep import results
from sfed.sweep.grid import Cell, Grid
from sfed.sweep.results import CellStatus, Row

GRID = cast("Grid", SimpleNamespace(keys=("federated.method", "seed")))


def event(number: int, loss: float | None) -> dict[str, Any]:
    found = {"event": "round", "round": number, "eval/clients": 2, "eval/loss": loss}
    return found | {
        "eval/perplexity": loss,
        "eval/personal_loss_unweighted": loss,
        "eval/global_loss_unweighted": loss and loss + 1,
    }


def row(seed: int, losses: list[float | None]) -> Row:
    cell = SimpleNamespace(name=f"seed{seed}", value={"federated.method": "sfed", "seed": seed}.get)
    standing = CellStatus(complete=True, events=[event(i, x) for i, x in enumerate(losses)])
    return results.row(GRID, cast("Cell", cell), "complete", standing)


def cells(made: Table | None) -> list[list[str]]:
    assert made is not None
    columns = [[str(cell) for cell in column.cells] for column in made.columns]
    return [list(one) for one in zip(*columns, strict=True)]


def test_a_last_round_without_a_finite_loss_is_not_replaced_by_the_one_before() -> None:
    found = row(0, [2.0, 1.0, None])
    assert found["rounds"] == 2
    names = ("personal_loss", "global_loss", "perplexity")
    assert [found[name] for name in names] == [None, None, None]


def test_a_round_that_was_not_evaluated_is_passed_over() -> None:
    """As ``evaluation.every_rounds`` may have been another one in an older version."""
    found = row(0, [2.0, 1.0])
    last = {"event": "round", "round": 2, "eval/clients": None, "eval/loss": None}
    standing = CellStatus(complete=True, events=[event(0, 2.0), event(1, 1.0), last])
    cell = SimpleNamespace(name="seed0", value={"federated.method": "sfed", "seed": 0}.get)
    again = results.row(GRID, cast("Cell", cell), "complete", standing)
    assert again["personal_loss"] == found["personal_loss"] == 1.0


def test_seeds_have_a_mean_where_all_have_a_value() -> None:
    rows = [row(0, [2.0, 1.0]), row(1, [2.0, 1.5])]
    assert cells(results.seeds_table(GRID, rows)) == [
        ["sfed", "2", "1.2500 ± 0.3536", "2.2500 ± 0.3536", "1.2500 ± 0.3536"]
    ]


def test_seeds_have_no_mean_over_those_that_went_well() -> None:
    rows = [row(0, [2.0, 1.0]), row(1, [2.0, 1.5]), row(2, [2.0, None])]
    missing = "no value in 1 of 3"
    assert cells(results.seeds_table(GRID, rows)) == [["sfed", "3", missing, missing, missing]]
