"""Tests of what a split goes by: values of a column keep their types, and no value is invented."""

import itertools
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from sfed.config import load as config_load
from sfed.data import partition, splits, tokenize
from sfed.data.assignment.labels import Chosen, labels_of
from sfed.distributed import world as distributed
from sfed.utils.errors import UserError
from tests.support import tiny
from tests.support.deadlines import RUN_SECONDS

KIND = ["by_key", "dirichlet"]


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder / "model")


@pytest.fixture
def world():
    started = distributed.start(RUN_SECONDS)
    yield started
    distributed.stop(started)


def save(folder, name, values):
    rows = [{"prompt": f"{i}:", "completion": " x", "site": v} for i, v in enumerate(values)]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labels(folder, tokenizer, train, held_out=None, kind="by_key"):
    config = config_load.validate(
        {
            "data": {"task": "jsonl", "train_files": save(folder, "train.jsonl", train)},
            "partition": {"kind": kind, "key": "site"},
        }
    )

    def chosen(split, values):
        path = save(folder, f"{split}.jsonl", values)
        table = tokenize.tokenise(config, tokenizer, split, (path,))
        return Chosen(table, np.arange(len(table)))

    return labels_of(
        config, chosen("train", train), None if held_out is None else chosen("eval", held_out)
    )


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        (["b", "a"], ["a", "c", "b"], [0, -1, 1]),
        (["", "b"], ["b", "zzz", "", "zzz"], [1, -1, 0, -1]),
        ([10, 2, 9], [2.0, 10, 9.0, 2.5, 3], [1, 0, 2, -1, -1]),
        ([1.0, 2.5], [1, 2.5, 2], [0, 1, -1]),
        ([True, False], [False, True, 1, 0], [0, 1, -1, -1]),
        ([None, "b"], ["b", None, ""], [1, 0, -1]),
        ([[1, 2], {"a": 1}], [[1.0, 2], {"a": 1}, [2, 1]], [0, 1, -1]),
        ([10**30, 10**30 + 1], [10**30 + 1, 10**30], [1, 0]),
    ],
)
def test_held_out_rows_follow_equal_values_and_no_others(
    tmp_path, tokenizer, train, held_out, expected
):
    found = labels(tmp_path, tokenizer, train, held_out)
    assert found.names == sorted(map(str, train)), "another order would be another split"
    assert [found.names[label] for label in found.of_train] == list(map(str, train))
    assert found.of_eval.tolist() == expected
    nobodys = expected.count(-1)
    said = [note for note in found.notes if "belong to no client" in note]
    assert [note.split()[:3] for note in said] == [[str(nobodys), "of", str(len(expected))]][
        :nobodys
    ]


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize(
    ("train", "held_out", "words"),
    [
        (["1", 1], None, '"1" and 1 are values of different types'),
        (["True", True, "b"], None, '"True" and true are values of different types'),
        ([None, "None"], None, '"None" and null are values of different types'),
        (["[1]", [1]], None, '"[1]" and [1] are values of different types'),
        ([1, 1.0], None, "1 and 1.0 are one value that is written in two ways"),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], None, "written in two ways"),
        (["na\u00efve", "nai\u0308ve", "b"], None, r"'na\xefve' and 'nai\u0308ve' are the same"),
        (["na\u00efve", "b"], ["nai\u0308ve"], r"'na\xefve' and 'nai\u0308ve' are the same"),
        (["a", "b"], ["1", 1], '"1" and 1 are values of different types'),
        (["1", "2"], [1, 2], 'the training data hold "1" and the held-out data 1'),
        ([True, False], ["True"], 'the training data hold true and the held-out data "True"'),
    ],
)
def test_values_that_would_be_taken_for_others_are_refused_by_name(
    tmp_path, tokenizer, kind, train, held_out, words
):
    with pytest.raises(UserError) as caught:
        labels(tmp_path, tokenizer, train, held_out, kind)
    assert str(caught.value).startswith("partition.key=site: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("value", ["", "  ", None, float("nan")])
def test_rows_without_a_value_are_counted(tmp_path, tokenizer, value):
    found = labels(tmp_path, tokenizer, [value, "b", value], ["b", value])
    (of_train, of_eval) = found.notes
    assert of_train.startswith("2 training rows have no value of partition.key=site (")
    assert of_eval.startswith("1 held-out rows have no value of partition.key=site (")
    assert not labels(tmp_path, tokenizer, ["a", "b", 0, False], ["b"]).notes


def test_a_form_of_a_key_is_that_of_equal_values_only():
    equal = [1, 1.0], [{"a": 1, "b": [2.0]}, {"b": [2], "a": 1.0}], [0, -0.0], [1e300, int(1e300)]
    for one, other in equal:
        assert partition.form_of_key(one) == partition.form_of_key(other)
    apart = [1, "1", True, None, "None", "", [1], ["1"], [True], {"1": 1}, 1.5, "true", 2**53 + 1]
    assert len({partition.form_of_key(value) for value in [*apart, float(2**53)]}) == 1 + len(apart)


@pytest.mark.parametrize("kind", KIND)
def test_a_run_gives_rows_of_an_unknown_value_to_nobody_and_says_so(
    tmp_path, tokenizer, world, kind
):
    held = ["b", "zzz", "zzz", "", "new"]
    config = tiny.config(
        tmp_path,
        data={
            "train_files": save(tmp_path, "train.jsonl", ["", "b"] * 8),
            "eval_files": save(tmp_path, "held.jsonl", held),
        },
        partition={"kind": kind, "key": "site"},
        federated={"num_clients": 2},
    )
    found = splits.load(config, tokenizer, world, 2, False)
    evaluated = [[held[i] for i in part["eval"]] for part in found.summary["clients"]]
    assert sorted(itertools.chain(*evaluated)) == ["", "b"]
    if kind == "by_key":
        assert evaluated == [[""], ["b"]]
    note = next(note for note in found.notes if "belong to no client" in note)
    assert note.startswith("3 of 5 held-out rows ") and note.endswith("('new', 'zzz')")
