"""Tests of the metrics file and of the means in it."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.observability import metrics
from sfed.observability.metrics import MetricsFile, mean, perplexity, read_events, read_metrics

numbers = st.floats(min_value=-1e6, max_value=1e6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, rounds, finished=None):
    file = MetricsFile(path, finished)
    for number in rounds:
        file.write_event({"event": "round", "round": number})
    file.close()


def rounds(path):
    return [event["round"] for event in read_events(path)]


def test_every_event_can_be_read_as_soon_as_it_is_written(path):
    file = MetricsFile(path, None)
    assert path.read_text() == ""
    for number in range(1, 4):
        file.write_event({"event": "round", "round": number, "loss": 0.5})
        assert path.read_text().count("\n") == number
        assert rounds(path) == list(range(1, number + 1))
    file.close()


def test_a_line_is_one_json_object_with_its_event_and_values(path):
    file = MetricsFile(path, None)
    file.write_event({"event": "start", "name": "é\n", "clients": [{"client": 0}]})
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
    file.write_event({"event": "start", "world_size": 2})
    file.write_event({"event": "round", "round": 1})
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


ODD_LINES = [
    b"\xff",
    b"\xff\xfe{}",
    b"not JSON",
    b'{"event": "round", "rou',
    b"[]",
    b'[{"event": "round", "round": 2}]',
    b"17",
    b"null",
    b'"round"',
    b"",
    b"   ",
    b"{}",
    b'{"round": 2}',
    b'{"event": null, "round": 2}',
    b'{"event": 7, "round": 2}',
    b'{"event": "round"}',
    b'{"event": "round", "round": "2"}',
    b'{"event": "round", "round": 2.0}',
    b'{"event": "round", "round": true}',
    b'{"event": "round", "round": null}',
    b'{"event": "round", "round": -1}',
    b'{"event": "round", "round": [2]}',
    b'{"event": "round", "round": 1' + b"0" * 30 + b"}",
    b'{"event": "round", "round": 1' + b"0" * 5000 + b"}",
    b'{"event": "start", "round": "x"}',
    b"[" * 100_000,
    b'{"event": "round", "round": 2, "deep": ' + b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\x00" * 4096,
]


@pytest.mark.parametrize("odd", ODD_LINES, ids=lambda odd: repr(odd[:40]))
def test_a_line_that_is_no_event_is_passed_over_counted_and_kept(path, odd):
    write(path, [0, 1])
    with path.open("ab") as file:
        file.write(odd + b'\n{"event": "round", "round": 2}\n' + odd + b"\n")
    before = path.read_bytes()
    assert rounds(path) == [0, 1, 2]
    found = read_metrics(path)
    assert found.odd_lines == [3, 5]
    note = f"{path}: 2 lines are no events and are passed over (line 3, line 5)"
    assert found.note == note
    for number in (1, 2):
        file = MetricsFile(path, 1)
        file.close()
        assert rounds(path) == [0, 1]
        assert file.note == f"{note}; the file as it was is kept as metrics.jsonl.damaged-{number}"
        assert path.with_name(f"metrics.jsonl.damaged-{number}").read_bytes() == before
        path.write_bytes(before)


def test_rounds_without_figures_are_missed_where_a_run_goes_on(path):
    for written, finished, named in (
        ([], None, None),
        ([], -1, None),  # nothing is reported yet, as before the first evaluation
        ([0, 1, 2, 3], 2, None),
        ([0, 1], 2, "round 2"),
        ([], 1, "rounds 0, 1"),
        ([3], 20, "rounds 0, 1, 2, 4, 5, 6, 7, 8 and 12 more"),
    ):
        write(path, written)
        file = MetricsFile(path, finished)
        file.close()
        assert (file.gap is None) == (named is None)
        assert named is None or f"the figures of {named} are missing" in file.gap


def test_a_single_odd_line_and_very_many_are_named_in_a_line(path):
    path.write_bytes(b"odd\n")
    assert read_metrics(path).note == f"{path}: 1 line is no event and is passed over (line 1)"
    path.write_bytes(b"odd\n" * 1000)
    note = read_metrics(path).note
    assert "1000 lines are no events" in note and "line 8 and 992 more)" in note


def test_a_number_beyond_all_floats_is_read_as_infinite(path):
    path.write_bytes(b'{"event": "round", "round": 1, "train/loss": 1' + b"0" * 400 + b"}\n")
    (event,) = read_metrics(path).events
    assert event["train/loss"] == math.inf


def test_resuming_keeps_the_bytes_of_each_line(path):
    line = b'{"round":1,  "event":"round", "x":1.50, "text":"\\u00e9"}\r\n'
    path.write_bytes(line)
    write(path, [2], finished=1)
    assert path.read_bytes() == line + b'{"event": "round", "round": 2}\n'


def test_a_file_that_cannot_be_read_is_an_error_and_stays(path, tmp_path):
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="No such file"):
        MetricsFile(path, 1)
    assert path.is_symlink()
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        MetricsFile(path, None)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_is_read_from_a_file_that_is_not_there(path):
    assert rounds(path) == []


def test_opening_leaves_no_other_file_behind(path):
    write(path, [1])
    write(path, [2], finished=1)
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_know_becomes_null(path, number):
    file = MetricsFile(path, None)
    file.write_event(
        {
            "event": "round",
            "round": 1,
            "loss": number,
            "clients": [{"loss": number, "pair": (number, 1.5)}],
        }
    )
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


def of_processes(number: int, *seconds: tuple[float, float]) -> dict:
    processes = [{"busy_seconds": busy, "idle_seconds": idle} for busy, idle in seconds]
    return {"event": "round", "round": number, metrics.PROCESSES: processes}


def test_idle_shares_are_taken_over_all_rounds_on_as_many_processes():
    events = [
        {"event": "round", "round": 0, metrics.PROCESSES: []},
        of_processes(1, (1.0, 1.0)),  # before the run went on on two processes
        of_processes(2, (3.0, 1.0), (1.0, 3.0)),
        of_processes(3, (5.0, 1.0), (1.0, 5.0)),
    ]
    assert metrics.idle_shares(events) == pytest.approx([0.2, 0.8])
    assert metrics.idle_shares(events[:2]) == pytest.approx([0.5])


@pytest.mark.parametrize("odd", [None, [], "x", [1], [{"busy_seconds": 1.0}], {"a": 1}])
def test_idle_shares_of_events_that_do_not_say_them_are_none(odd):
    assert metrics.idle_shares([{metrics.PROCESSES: odd}, {}]) == []
