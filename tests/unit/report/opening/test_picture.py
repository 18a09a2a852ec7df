"""The opening picture: every mark stands where its number is, for few clients and for many."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.report.opening import picture
from sfed.report.opening.outcome import BEFORE, GLOBAL, OWN
from sfed.report.opening.picture import MOST_ROWS, Opening, opening_of
from sfed.report.page import page, run_section
from sfed.storage.run_record import open_run
from tests.unit.report.opening.test_outcome import run_of


def opened(folder: Path, rounds: list, **facts) -> Opening:
    found = opening_of(open_run(run_of(folder, rounds, **facts)))
    assert found is not None
    return found


def many(num: int, score: float = 0.0) -> list:
    return [{"personal_loss": 1.0 + i + score, "global_loss": 2.0 + i} for i in range(num)]


def test_places_are_in_the_order_of_the_values(tmp_path: Path) -> None:
    start = [{"personal_loss": 4.0, "global_loss": 4.0}]
    end = [{"personal_loss": 1.0, "global_loss": 2.5}]
    found = opened(tmp_path / "run", [start, end])
    (row,) = found.rows
    places = dict(row.marks)
    assert places[OWN] < places[GLOBAL] < places[BEFORE]
    assert places[GLOBAL] == pytest.approx((places[OWN] + places[BEFORE]) / 2, abs=0.02)
    assert row.words == (
        "client 0: before training 4.0000, global adapter 2.5000, its own adapter 1.0000"
    )
    by_text = {float(tick.text): tick.place for tick in found.ticks}
    assert 0.0 in by_text and by_text[1.0] == pytest.approx(places[OWN])
    assert found.what == "held-out loss (nats/token), lower is better"


def test_many_clients_become_sorted_lines_and_a_table(tmp_path: Path) -> None:
    num = 4096
    shuffled = [one for i in (1, 0) for one in many(num)[i::2]]
    found = opened(tmp_path / "run", [many(num, 100.0), shuffled])
    assert not found.rows and [line.state for line in found.lines] == [BEFORE, GLOBAL, OWN]
    for line in found.lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.points.split()]
        assert len(points) <= 101 and points[0][0] == 0 and points[-1][0] == 100
        heights = [y for _, y in points]
        assert heights == sorted(heights, reverse=True), "losses rise from the best to the worst"
    assert found.quantiles is not None
    own = found.quantiles.rows[-1]
    assert own[0] == "its own adapter" and own[1:] == [
        "205.7500",
        "2048.5000",
        "3891.2500",
        "2048.5000",
    ]


def test_of_a_score_the_best_client_has_the_most(tmp_path: Path) -> None:
    rounds = [[{"personal_accuracy": k + i / 100} for i in range(50)] for k in (0, 1)]
    found = opened(tmp_path / "run", rounds, scores=["accuracy"])
    assert found.quantiles is not None and found.what == "accuracy, higher is better"
    assert [float(cell) for cell in found.quantiles.rows[-1][1:4]] == [1.4655, 1.245, 1.0245]


@pytest.mark.parametrize(
    ("num", "has_rows"), [(2, True), (MOST_ROWS, True), (MOST_ROWS + 1, False)]
)
def test_where_rows_end_and_lines_begin(tmp_path: Path, num: int, has_rows: bool) -> None:
    found = opened(tmp_path / "run", [many(num), many(num)])
    assert bool(found.rows) == has_rows != bool(found.lines)


VALUES = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


@given(st.lists(VALUES, min_size=1, max_size=6), st.booleans())
def test_every_place_is_on_the_picture(values: list[float], is_loss: bool) -> None:
    axis = picture._Axis.over(values, is_loss)
    for value in values:
        assert -1e-9 <= axis.share(value) <= 1 + 1e-9
    ticks = axis.ticks(0.0, 100.0)
    assert len(ticks) <= 8 and all(-1e-6 <= tick.place <= 100 + 1e-6 for tick in ticks)


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("st-mary", 13, "st-mary"),
        ("harbour-general", 13, "harbour-gener…"),
        ("医院医院医院", 5, "医…"),
    ],
)
def test_names_are_cut_to_their_room(text: str, most: int, shown: str) -> None:
    cut = picture._cut(text, most)
    assert cut == shown or (len(cut) <= most and cut.endswith("…") and text.startswith(cut[:-1]))


def test_the_bars_are_as_long_as_their_bytes(tmp_path: Path) -> None:
    rounds = [many(2), many(2)]
    found = opened(tmp_path / "run", rounds, own={"B": 2**18}, sent=2**20, evaluation=2**21)
    assert [(bar.style, bar.length) for bar in found.bars] == [
        ("sent", 50.0), ("extra", 100.0), ("stayed", 50.0),
    ]  # fmt: skip
    assert [bar.text for bar in found.bars] == [
        "2 MiB in 2 messages",
        "4 MiB",
        "2 MiB: B of 2 clients",
    ]
    old = opened(tmp_path / "old", rounds)
    assert [bar.style for bar in old.bars] == ["sent"], "an older version does not say the rest"


@pytest.mark.parametrize("num", [2, MOST_ROWS + 1])
def test_the_page_holds_it_as_svg_with_words_for_who_does_not_see(tmp_path: Path, num: int) -> None:
    evil = "<script>alert(1)</script>\"'"
    folder = run_of(tmp_path / "run", [many(num, 5.0), many(num)], own={evil: 4})
    html = page("t", runs=[run_section(open_run(folder), "run-1", [])], comparison=None, law=None)
    assert "<script" not in html
    first = html.index('<p class="lead">')
    assert first < html.index("<table"), "the page opens with it"
    svgs = html.split('<svg class="chart"')[1:]
    assert len(svgs) == 2 and all('role="img" aria-label="' in svg.split(">")[0] for svg in svgs)
    whole = html[html.index('<figure class="opening">') : html.index("</figure>") + 9]
    ET.fromstring(whole.replace("&nbsp;", " "))
