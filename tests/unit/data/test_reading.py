"""Tests of what is said of columns, of lengths and of truncation."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.config import load as config_load
from sfed.data.forms.reading import Reading, Truncated, column_line, length_lines

lengths = st.lists(st.integers(1, 400), min_size=1, max_size=300)


def make_config(**data):
    return config_load.validate(
        {"data": {"task": "text", "train_files": "x.jsonl", "max_tokens": 100, **data}}
    )


def reading_of(train=(), held_out=(), limit=100, gone=0):
    reading = Reading()
    for split, some in (("train", train), ("eval", held_out)):
        if some:
            reading.add(split, Counter(some), gone if split == "train" else 0)
    return reading


def said(reading, counts, truncated, **data):
    by_split = {"train": Truncated(counts, truncated), "eval": Truncated([4, 4], [0, 0])}
    return length_lines(make_config(**data), reading, by_split)


@given(lengths)
def test_the_quantiles_are_lengths_of_rows(some):
    (line,), _ = said(reading_of(some), [len(some)], [0], max_tokens=400)
    for share in (50, 90, 99):
        value = int(np.quantile(some, share / 100, method="inverted_cdf"))
        assert f"{share} % have at most {value:,}" in line
    assert line.endswith(f"the longest {max(some):,} tokens")


@pytest.mark.parametrize(("cut", "is_warned"), [(0, False), (1, False), (2, True)])
def test_a_warning_comes_above_one_percent(cut, is_warned):
    reading = reading_of([50] * (100 - cut) + [101] * cut)
    lines, warnings = said(reading, [100], [cut])
    assert ("truncates" in lines[0]) == (cut > 0)
    assert [("data.on_long" in text) for text in warnings] == [True] * is_warned


def test_a_client_of_which_much_is_truncated_is_named():
    reading = reading_of([50] * 990 + [101] * 6)
    lines, warnings = said(reading, [900, 90], [1, 5])
    assert "truncates 6 of 990 (most of client 1: 5 of 90)" in lines[0] and len(warnings) == 1


def test_rows_of_which_nothing_is_left_and_dropped_ones_are_counted():
    reading = reading_of([50] * 90 + [101] * 10, gone=10)
    lines, warnings = said(reading, [90], [0])
    assert "10 more are left out, as nothing of their answer is left" in lines[0]
    assert warnings
    lines, warnings = said(reading, [90], [0], on_long="drop")
    assert "10 are longer than data.max_tokens = 100 and are dropped" in lines[0]
    assert warnings


def test_without_a_held_out_table_its_examples_are_counted_all_the_same():
    by_split = {"train": Truncated([9, 9], [0, 0]), "eval": Truncated([1, 1], [0, 1])}
    lines, warnings = length_lines(make_config(), reading_of([50] * 20), by_split)
    assert len(lines) == 2 and "truncates 1 of 2 (most of client 1: 1 of 1)" in lines[1]
    assert len(warnings) == 1


@given(st.lists(lengths, min_size=1, max_size=3), lengths)
def test_what_processes_have_read_adds_up(trains, held_out):
    parts = [reading_of(some, held_out, gone=1) for some in trains]
    for number, part in enumerate(parts):
        part.used, part.others = {f"a{number}"}, {"b"}
    whole = Reading.of_json(json.loads(json.dumps([part.to_json() for part in parts])))
    assert whole.lengths["train"] == Counter(n for some in trains for n in some)
    assert whole.lengths["eval"].total() == len(trains) * len(held_out)
    assert whole.gone["train"] == len(trains) and whole.others == {"b"}
    assert whole.used == {f"a{number}" for number in range(len(trains))}


def test_columns_are_named_with_what_they_are_used_for():
    reading = Reading(used={"question", "answer"}, others={"id", "answer", "customer"})
    config = config_load.validate(
        {
            "data": {
                "task": "text",
                "train_files": "x.jsonl",
                "columns": {"prompt": "question", "completion": "answer"},
            },
            "partition": {"key": "customer"},
        }
    )
    assert column_line(config, reading) == (
        "columns: prompt from 'question', completion from 'answer'; ignored: id"
    )
    assert column_line(make_config(), Reading(used={"text"})) == "columns: text; ignored: none"
    assert column_line(make_config(), Reading()) == ""
