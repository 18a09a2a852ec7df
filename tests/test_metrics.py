"""Tests of the metrics file and of the means in it."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.metrics import MetricsFile, mean, perplexity, read_events

numbers = st.floats(min_value=-1e6, max_value=1e6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, rounds, finished=None):
    file = MetricsFile(path, finished)
    for number in rounds:
        file.write("round", round=number)
    file.close()


def rounds(path):
    return [event["round"] for event in read_events(path)]


def test_every_event_can_be_read_as_soon_as_it_is_written(path):
    file = MetricsFile(path, None)
    assert path.read_text() == ""
    for number in range(1, 4):
        file.write("round", round=number, loss=0.5)
        assert path.read_text().count("\n") == number
        assert rounds(path) == list(range(1, number + 1))
    file.close()


def test_a_line_is_one_json_object_with_its_event_and_values(path):
    file = MetricsFile(path, None)
    file.write("start", name="é\n", clients=[{"client": 0}])
    file.write_event({"event": "round", "round": 1})
    file.close()
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == {"event": "start", "name": "é\n", "clients": [{"client": 0}]}
    assert json.loads(second) == {"event": "round", "round": 1}


def test_a_new_run_begins_an_empty_file(path):
    write(path, [1, 2, 3])
    write(path, [1])
    assert rounds(path) == [1]


@pytest.mark.parametrize("finished", [0, 2, 3, 9])
def test_resuming_drops_the_rounds_of_the_lost_attempt(path, finished):
    write(path, [0, 1, 2, 3])
    write(path, [finished + 1], finished)
    assert rounds(path) == [*range(min(finished, 3) + 1), finished + 1]


def test_resuming_keeps_events_that_belong_to_no_round(path):
    file = MetricsFile(path, None)
    file.write("start", world_size=2)
    file.write("round", round=1)
    file.close()
    MetricsFile(path, 0).close()
    assert [event["event"] for event in read_events(path)] == ["start"]


def test_resuming_without_an_earlier_file_begins_one(path):
    write(path, [4], finished=3)
    assert rounds(path) == [4]


@pytest.mark.parametrize("half", ['{"event": "rou', '{"event": "round", "round": 2}', "\u00e9"])
def test_a_last_line_that_was_half_written_is_not_read_and_not_kept(path, half):
    write(path, [1])
    with path.open("a", encoding="utf-8") as file:
        file.write(half)
    assert rounds(path) == [1]
    write(path, [2], finished=1)
    assert path.read_text() == '{"event": "round", "round": 1}\n{"event": "round", "round": 2}\n'


def test_nothing_is_read_from_a_file_that_is_not_there(path):
    assert rounds(path) == []


def test_opening_leaves_no_other_file_behind(path):
    write(path, [1])
    write(path, [2], finished=1)
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_know_becomes_null(path, number):
    file = MetricsFile(path, None)
    file.write("round", round=1, loss=number, clients=[{"loss": number, "pair": (number, 1.5)}])
    file.close()
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    event = next(read_events(path))
    assert event["loss"] is None
    assert event["clients"] == [{"loss": None, "pair": [None, 1.5]}]


@given(st.lists(numbers, min_size=1))
def test_the_mean_is_the_sum_over_the_count(values):
    assert mean(values) == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-6)


@given(st.lists(st.tuples(numbers, st.integers(0, 20)), min_size=1))
def test_a_weight_counts_a_value_as_often_as_it_says(pairs):
    values, weights = zip(*pairs, strict=True)
    repeated = [value for value, weight in pairs for _ in range(weight)]
    found = mean(list(values), [float(weight) for weight in weights])
    if not repeated:
        assert found is None
    else:
        assert found == pytest.approx(math.fsum(repeated) / len(repeated), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(("values", "weights"), [([], None), ([], []), ([1.0, 2.0], [0.0, 0.0])])
def test_the_mean_of_nothing_is_none(values, weights):
    assert mean(values, weights) is None


def test_a_mean_with_a_weight_too_few_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        mean([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (0.0, 1.0),
        (math.log(20), 20.0),
        (None, None),
        (1e4, None),
        (math.inf, None),
        (math.nan, None),
    ],
)
def test_perplexity_is_the_exponential_of_the_loss(loss, expected):
    assert perplexity(loss) == pytest.approx(expected)
