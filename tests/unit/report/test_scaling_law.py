"""The law in the report: slopes of made-up runs of known growth, and what theory predicts."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from sfed.observability import metrics
from sfed.report import __main__ as report
from sfed.report import comparison_figures, comparison_tables, plotting, scaling_law
from sfed.report.grouping import BY_CLIENTS, BY_RANK
from sfed.report.scaling_law import FIRST_GRADIENT, OUTPUT, Theory
from sfed.storage import run_record
from tests.support.run_folders import write_events, write_run

RSLORA, SFED, LORA = (0.0, -0.5), (0.5, -0.5), (0.0, -1.0)


def grid(
    folder: Path, clients=(2, 4, 8), ranks=(4, 16, 64), **options
) -> list[run_record.RunRecord]:
    """Runs over N and r; every option of ``write_run`` holds for all of them."""
    method = options.get("method", "sfed")
    found = []
    for num_clients, rank in itertools.product(clients, ranks):
        path = folder / f"{method}-{num_clients}-{rank}-{options.get('seed', 0)}"
        found.append(write_run(path, num_clients=num_clients, rank=rank, **options))
    return [run_record.open_run(path) for path in found]


def by_quantity(runs: list[run_record.RunRecord]) -> dict[str, scaling_law.ScalingFit]:
    return {one.quantity: one for one in scaling_law.laws(runs)}


def change(story: run_record.RunRecord, key: str, factor: float | None) -> run_record.RunRecord:
    """Multiply a number in all rounds; None takes it away."""
    path = story.folder / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        event[key] = None if factor is None or event[key] is None else event[key] * factor
    write_events(story.folder, events)
    return run_record.open_run(story.folder)


@pytest.mark.parametrize("n", [-0.5, 0.0, 0.75])
@pytest.mark.parametrize("r", [-2.0, 0.0, 0.5])
def test_slopes_are_found_again(tmp_path: Path, n: float, r: float) -> None:
    growth = {"gradient": (n, r), "output": (2 * n + 1, r - 1)}
    found = by_quantity(grid(tmp_path, growth=growth))
    for quantity, slopes in ((FIRST_GRADIENT, (n, r)), (OUTPUT, (2 * n + 1, r - 1))):
        for axis, slope in zip((BY_CLIENTS, BY_RANK), slopes, strict=True):
            fit = found[quantity].fit(axis)
            assert fit.slope == pytest.approx(slope, abs=1e-9)
            assert fit.lowest == pytest.approx(slope, abs=1e-9)
            assert fit.highest == pytest.approx(slope, abs=1e-9)
            assert fit.fits == 3
    assert (found[FIRST_GRADIENT].after_round, found[OUTPUT].after_round) == (1, 3)


def test_the_mean_and_the_range_are_over_the_fixed_values(tmp_path: Path) -> None:
    runs = grid(tmp_path, clients=(1, 4), ranks=(4, 16))
    # at N = 4 the larger r doubles the gradient: slope ln 2 / ln 4 there, 0 at N = 1
    runs = [
        change(one, metrics.FIRST_GRAD_NORM, 2.0) if one.folder.name == "sfed-4-16-0" else one
        for one in runs
    ]
    for axis in (BY_CLIENTS, BY_RANK):
        fit = by_quantity(runs)[FIRST_GRADIENT].fit(axis)
        assert (fit.lowest, fit.slope, fit.highest) == pytest.approx((0.0, 0.25, 0.5), abs=1e-9)


def test_least_squares_by_hand() -> None:
    # ln y over ln x at x = 1, e, e^2: 0, 1, 4; slope = (0 * -1 + 4 * 1) / 2
    e = 2.718281828459045
    assert scaling_law.slope([(1.0, 1.0), (e, e), (e**2, e**4)]) == pytest.approx(2.0)


def test_seeds_are_averaged_as_logarithms(tmp_path: Path) -> None:
    first = grid(tmp_path, clients=(4,), ranks=(4, 16), seed=0)
    second = grid(tmp_path, clients=(4,), ranks=(4, 16), seed=1)
    second[1] = change(
        second[1], metrics.FIRST_GRAD_NORM, 16.0
    )  # geometric mean: 4 times at r = 16
    found = by_quantity([*first, *second])[FIRST_GRADIENT]
    assert found.fit(BY_RANK).slope == pytest.approx(1.0)
    assert found.fit(BY_CLIENTS) is None, "one N only"


@pytest.mark.parametrize(
    ("exponents", "start", "gradient", "sgd", "adam"),
    [
        (SFED, "mean", (0.0, 0.0), (0.0, 0.0), (0.0, 1.0)),
        (SFED, "shared", (0.5, 0.0), (2.0, 0.0), (1.0, 1.0)),
        (RSLORA, "mean", (-0.5, 0.0), (-2.0, 0.0), (-1.0, 1.0)),
        (RSLORA, "shared", (0.0, 0.0), (0.0, 0.0), (0.0, 1.0)),
        (LORA, "mean", (-0.5, -0.5), (-2.0, -2.0), (-1.0, 0.0)),
        (LORA, "shared", (0.0, -0.5), (0.0, -2.0), (0.0, 0.0)),
    ],
)
def test_theory(exponents, start: str, gradient, sgd, adam) -> None:
    """First lines: DESIGN section 2's table of measured slopes in N."""

    def predicted(quantity: str, optimizer: str) -> tuple:
        theory = Theory(exponents, start, optimizer, clipped=False)
        return tuple(scaling_law.predict(quantity, theory, axis) for axis in (BY_CLIENTS, BY_RANK))

    assert predicted(FIRST_GRADIENT, "sgd") == predicted(FIRST_GRADIENT, "adamw") == gradient
    assert predicted(OUTPUT, "sgd") == sgd
    assert predicted(OUTPUT, "adamw") == adam


def test_no_prediction_where_theory_has_none() -> None:
    apart = Theory(SFED, "apart", "sgd", clipped=False)
    assert scaling_law.predict(FIRST_GRADIENT, apart, BY_CLIENTS) is None
    assert scaling_law.predict(FIRST_GRADIENT, apart, BY_RANK) == 0.0
    clipped = Theory(SFED, "mean", "sgd", clipped=True)
    assert scaling_law.predict(OUTPUT, clipped, BY_RANK) is None
    assert scaling_law.predict(FIRST_GRADIENT, clipped, BY_RANK) == 0.0, (
        "it is the norm before clipping"
    )
    assert scaling_law.predict(OUTPUT, Theory(SFED, "mean", "adamw", clipped=True), BY_RANK) == 1.0
    assert scaling_law.predict(OUTPUT, Theory(SFED, "mean", "lion", clipped=False), BY_RANK) is None
    assert scaling_law.predict(OUTPUT, Theory(None, "mean", "sgd", clipped=False), BY_RANK) is None


def test_what_a_run_is_for_theory(tmp_path: Path) -> None:
    def theory(name: str, **options) -> Theory:
        return scaling_law.theory_of([run_record.open_run(write_run(tmp_path / name, **options))])

    assert theory("a") == Theory(SFED, "mean", "sgd", clipped=False)
    assert theory("b", method="fedsa", optimizer="adamw") == Theory(LORA, "shared", "adamw", False)
    alone = {"resolved.independent_init": True}
    assert theory("c", method="local", settings=alone).start == "apart"
    assert theory("d", settings={"federated.averaged": ["B"]}).start == "apart"
    assert theory("e", method="fedsa", settings=alone).start == "mean"
    assert theory("f", settings={"train.max_grad_norm": 1.0}).clipped, "the first norm is 1.5"
    assert not theory("g", settings={"train.max_grad_norm": 2.0}).clipped
    for i, broken in enumerate((None, [1.0], ["x", 1.0], "x")):
        settings = {"resolved.scaling_exponents": broken}
        assert theory(f"h{i}", settings=settings).exponents is None


def test_methods_and_optimizers_are_kept_apart(tmp_path: Path) -> None:
    runs = [
        *grid(tmp_path / "a", ranks=(4, 16), clients=(4,)),
        *grid(tmp_path / "b", ranks=(4, 16), clients=(4,), optimizer="adamw"),
        *grid(tmp_path / "c", ranks=(4, 16), clients=(4,), method="fedsa"),
        *grid(tmp_path / "d", ranks=(4,), clients=(4,), method="fedsa-rslora"),
    ]
    found = [one for one in scaling_law.laws(runs) if one.quantity == FIRST_GRADIENT]
    labels = ["sfed, sgd", "sfed, adamw", "fedsa, sgd"]
    assert [one.label for one in found] == labels, "a single run has no slope"


def test_numbers_that_are_missing_or_not_positive_are_left_out(tmp_path: Path) -> None:
    runs = grid(tmp_path, clients=(4,), ranks=(4, 16, 64))
    zero = [change(runs[0], metrics.FIRST_GRAD_NORM, 0.0), *runs[1:]]
    assert sorted(by_quantity(zero)[FIRST_GRADIENT].values) == [(4.0, 16.0), (4.0, 64.0)]
    older = [change(one, metrics.OUTPUT_RMS, None) for one in zero]
    assert list(by_quantity(older)) == [FIRST_GRADIENT]
    none = [change(one, metrics.FIRST_GRAD_NORM, None) for one in older]
    assert scaling_law.laws(none) == []
    huge = [change(one, metrics.OUTPUT_RMS, 1e300) for one in grid(tmp_path / "b", (4,), (4, 16))]
    assert list(by_quantity(huge)) == [FIRST_GRADIENT], "no overflow"


def test_a_run_that_lags_behind_sets_the_round_of_the_output(tmp_path: Path) -> None:
    ahead = grid(tmp_path, clients=(4,), ranks=(4, 16), rounds=5)
    behind = grid(tmp_path, clients=(4,), ranks=(64,), rounds=2, planned=5)
    young = grid(tmp_path, clients=(4,), ranks=(128,), rounds=0, planned=5)
    found = by_quantity([*ahead, *behind, *young])
    assert found[OUTPUT].after_round == 2
    assert found[OUTPUT].fit(BY_RANK).slope == pytest.approx(0.0, abs=1e-9)
    assert len(found[OUTPUT].values) == 3, "a run without any trained round waits"


def test_the_page_has_the_table_and_the_figures(tmp_path: Path, monkeypatch) -> None:
    drawn = comparison_figures.law_pictures(
        scaling_law.laws(grid(tmp_path / "drawn", (2, 4), (4, 16)))
    )
    assert [picture.name for picture in drawn] == ["law-first-gradient", "law-output"]
    assert all(len(picture.png) > 5000 for picture in drawn)
    monkeypatch.setattr(plotting, "_png", lambda *_: b"\x89PNG")  # drawing takes most of the time
    growth = {"gradient": (0.0, 0.0), "output": (0.0, 0.72)}
    grid(tmp_path / "sweep", (2, 4), (4, 16), rounds=2, optimizer="adamw", growth=growth)
    lora = {"gradient": (0.02, -0.5), "output": (0.0, -0.3)}
    grid(tmp_path / "sweep", (2, 4), (4, 16), rounds=2, optimizer="adamw", growth=lora,
         method="fedsa")  # fmt: skip
    report.main([str(tmp_path / "sweep")])
    html = (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))
    assert "The law: growth with N and r" in words
    assert "fedsa alpha r -1 shared adamw first gradient norm 1 +0.02 +0.02, +0.02 0.00" in words
    assert "sfed alpha N 0.5 r -0.5 mean of N adamw first gradient norm 1 0.00" in words
    assert "output squared 2 0.00 0.00, 0.00 0.00 +0.72 +0.72, +0.72 +1.00" in words
    names = {path.stem for path in (tmp_path / "sweep" / "figures").glob("law-*.png")}
    assert names == {"law-first-gradient", "law-output"}


def test_one_run_has_no_law(tmp_path: Path) -> None:
    runs = [run_record.open_run(write_run(tmp_path / f"s{seed}", seed=seed)) for seed in range(2)]
    assert scaling_law.laws(runs) == []
    assert comparison_figures.law_pictures([]) == []


def test_the_figure_is_drawn_where_most_points_are(tmp_path: Path) -> None:
    runs = [*grid(tmp_path, (2, 4), (4, 16, 64)), *grid(tmp_path, (8,), (16,))]
    found = scaling_law.laws(runs)
    assert scaling_law.fullest(found, BY_CLIENTS) == 16.0
    assert scaling_law.fullest(found, BY_RANK) == 4.0, "the larger of equals"
    rows = comparison_tables.law_rows(grid_with_one_n(tmp_path / "one"))
    assert {row.slopes[0].fitted for row in rows} == {"\N{EN DASH}"}, "one N has no slope"


def grid_with_one_n(folder: Path) -> list[scaling_law.ScalingFit]:
    return scaling_law.laws(grid(folder, (4,), (4, 16)))
