"""Tests of the parts of a held-out set: each has a name and scores of its own."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfed.config import load as config_load
from sfed.data.sources import part_names
from sfed.federated import session
from sfed.federated.evaluate import Measured, score_of_part
from tests.support import runs, tiny


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/test.jsonl"], [""]),
        (["dev.jsonl", "hard_dev.jsonl"], ["dev", "hard_dev"]),
        (["validation_matched.jsonl", "x/validation_mismatched.json"], ["matched", "mismatched"]),
        (["easy/test.jsonl", "hard/test.jsonl"], ["easy_test", "hard_test"]),
        (["easy/test.jsonl", "hard/test.jsonl", "dev.jsonl"], ["easy_test", "hard_test", "dev"]),
        (["test.jsonl", "hard/test.jsonl"], ["test", "hard_test"]),
        (["a/x/test.jsonl", "b/x/test.jsonl"], ["a_x_test", "b_x_test"]),
        (
            ["a/test.jsonl", "b/test.jsonl", "a_test.jsonl"],
            ["a_test_jsonl", "b_test", "a_test_jsonl_2"],
        ),
        (["d/test.json", "d/test.jsonl"], ["d_test_json", "d_test_jsonl"]),
        (["../test.jsonl", "./test.jsonl"], ["test_jsonl", "test_jsonl_2"]),
        (["a/validation_test.jsonl", "b/test.jsonl"], ["a_test", "b_test"]),
        (["validation_.jsonl", "b.jsonl"], ["validation_", "b"]),
        (["unweighted.jsonl", "b.jsonl"], ["unweighted_jsonl", "b"]),
        (["d/by_examples.jsonl", "b.jsonl"], ["d_by_examples", "b"]),
        (["x.jsonl", "x_unweighted.jsonl"], ["x", "x_unweighted_jsonl"]),
        (["y.jsonl", "x_unweighted.jsonl"], ["y", "x_unweighted"]),
        (["new\nline.jsonl", "esc\x1b[2J.jsonl"], ["new_line", "esc_[2J"]),
        (["a\n.jsonl", "a\t.jsonl"], ["a__jsonl", "a__jsonl_2"]),
        (["my tést.jsonl", "\udcff.jsonl"], ["my tést", "_"]),
    ],
)
def test_every_part_has_a_name_of_its_own(files, names):
    assert part_names(files) == names


steps = st.sampled_from(["a", "b", "a_b", "x", "unweighted", "a_unweighted", "by_examples", ".."])
paths = st.builds(
    lambda folders, stem, suffix: "/".join([*folders, stem + suffix]),
    st.lists(steps, max_size=3),
    steps.filter(lambda name: name != ".."),
    st.sampled_from([".json", ".jsonl", "_jsonl.jsonl", "_2.jsonl"]),
)


@given(st.lists(paths, min_size=2, max_size=6))
def test_no_number_of_one_part_is_written_under_the_name_of_another(files):
    names = part_names(files)
    means = ("", "_unweighted", "_by_examples")
    keys = [f"accuracy{part}{mean}" for part in ("", *(f"_{n}" for n in names)) for mean in means]
    assert len(set(keys)) == len(keys)
    assert all(names)


def measured(parts, correct):
    """One client with two examples of each part, of which some are right."""
    rows = [
        [1.0 if place < count else 0.0, 1.0, float(number)]
        for number, count in enumerate(correct)
        for place in range(2)
    ]
    return Measured(np.zeros((1, 5)), np.asarray([rows]), parts, {})


@pytest.mark.parametrize(
    "parts",
    [
        ("dev", "hard_dev", "very_hard_dev"),
        ("accuracy", "x_accuracy", "exact_match_accuracy"),
        ("f1", "exact_match", "match"),
        ("", "a", "b"),
        (" ", "_", "__"),
    ],
)
@pytest.mark.parametrize("name", ["accuracy", "exact_match"])
def test_the_score_of_a_part_is_that_of_its_rows(parts, name):
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        ordered = tuple(parts[i] for i in order)
        found = measured(ordered, (2, 1, 0))
        assert found.score(name) == 0.5
        for part, expected in zip(ordered, (1.0, 0.5, 0.0), strict=True):
            if part:
                assert found.score(score_of_part(name, part), 0) == expected


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (("dev.jsonl", "hard_dev.jsonl"), {"dev": 2, "hard_dev": 4}),
        (("easy/test.jsonl", "hard/test.jsonl"), {"easy_test": 2, "hard_test": 4}),
    ],
)
def test_a_run_scores_every_part_apart(tiny_folder, tmp_path, monkeypatch, files, parts):
    for path, count in zip(files, parts.values(), strict=True):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        rows = [{"question": f"{path} {i}?", "answer": f"#### {i}"} for i in range(count)]
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    monkeypatch.setattr("sfed.data.scores.matches", lambda text, target: target == 1.0)
    own = tiny.settings(
        tmp_path,
        model={"name": str(tiny_folder / "model")},
        data={"task": "gsm8k", "eval_files": [str(tmp_path / path) for path in files]},
        federated={"num_clients": 2, "num_rounds": 1},
        train={"local_steps": 1},
        evaluation={"generate": True, "max_new_tokens": 2},
    )
    session.run_session(config_load.validate(own))
    last = runs.rounds(tmp_path / "runs" / "run")[-1]
    assert last["eval/exact_match"] == pytest.approx(2 / 6)
    for part, count in parts.items():
        assert last[f"eval/exact_match_{part}"] == pytest.approx(1 / count)
        assert last[f"eval/global_exact_match_{part}"] == pytest.approx(1 / count)
