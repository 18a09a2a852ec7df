"""The learning rate over the rounds of a run, and what becomes of it where their number changes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.clients.schedule import Course, course_of, learning_rate
from sfed.config.sections.train import TrainSection


def section(**values):
    return TrainSection(**values)


def rate(progress, num_rounds=10, **values):
    return learning_rate(section(**values), 1.0, num_rounds, progress)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("constant", {0: 1, 2.5: 1, 5: 1, 10: 1}),
        ("linear", {0: 1, 2.5: 0.75, 5: 0.5, 10: 0}),
        ("cosine", {0: 1, 2.5: (1 + math.sqrt(0.5)) / 2, 5: 0.5, 10: 0}),
    ],
)
def test_the_schedule_runs_over_the_whole_run(schedule, points):
    for progress, expected in points.items():
        assert rate(progress, schedule=schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)]
)
def test_a_warm_up_rises_linearly_and_the_schedule_takes_what_is_left(schedule, middle):
    values = {"schedule": schedule, "warmup_rounds": 2.0}
    assert [rate(progress, **values) for progress in (0, 0.5, 1, 2)] == [0, 0.25, 0.5, 1]
    assert rate(6, **values) == pytest.approx(middle)
    assert rate(10, **values) == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-12)


def test_the_rate_is_a_multiple_of_the_configured_one():
    settings = section(lr=3e-4, schedule="linear")
    assert learning_rate(settings, settings.lr, 4, 1.0) == pytest.approx(3e-4 * 0.75)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 100),
    st.floats(0, 120),
    st.floats(0, 1),
)
def test_the_rate_never_leaves_its_range_and_never_rises_after_the_warm_up(
    schedule, num_rounds, warmup_rounds, fraction
):
    values = {"schedule": schedule, "warmup_rounds": warmup_rounds, "num_rounds": num_rounds}
    course = [rate(num_rounds * (fraction + i) / 11, **values) for i in range(11)]
    assert all(0 <= one <= 1 for one in course)
    after = [rate(min(warmup_rounds + i, num_rounds), **values) for i in range(5)]
    if warmup_rounds <= num_rounds:
        assert after == sorted(after, reverse=True)
        assert after[0] == 1 or warmup_rounds == num_rounds


# --- another number of rounds ---------------------------------------------------------------------


def test_finished_rounds_keep_the_number_they_began_with():
    course = course_of(None, 4).resumed(4, 8).resumed(6, 10)
    assert course.parts == ((0, 4), (4, 8), (6, 10))
    assert [course.num_rounds(i) for i in range(10)] == [4] * 4 + [8] * 2 + [10] * 4


def test_a_part_in_which_no_round_began_leaves_no_trace():
    course = course_of([[0, 4]], 1).resumed(4, 8).resumed(4, 6)
    assert course == Course(((0, 4), (4, 6)))
    assert course.resumed(4, 4) == Course(((0, 4),))
    assert course_of(None, 4).resumed(0, 8) == Course(((0, 8),))


def test_the_same_number_again_is_no_new_part():
    course = course_of(None, 4).resumed(4, 8)
    assert course.resumed(6, 8) == course


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), max_size=6))
def test_a_round_keeps_its_number_whatever_follows(starts):
    course, begun = course_of(None, 7), 0
    for further, total in starts:
        before = [course.num_rounds(i) for i in range(begun + further)]
        begun += further
        course = course.resumed(begun, total)
        assert [course.num_rounds(i) for i in range(begun)] == before
        assert course.num_rounds(begun) == course.num_rounds(begun + 9) == total


def test_the_change_is_told_with_both_numbers_and_the_rate():
    course = course_of(None, 4).resumed(4, 8)
    line = course.line(section(lr=1e-3, schedule="linear"))
    assert line == (
        "learning rate: linear over 8 rounds from round 5 on, which begins with 0.0005; "
        "rounds 1 to 4 over 4"
    )
    assert course.line(section(schedule="constant")) is None
    assert course_of(None, 4).line(section(schedule="cosine")) is None
