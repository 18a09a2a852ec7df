"""Scores: the number that an answer ends in, and the standard metrics of GLUE."""

from __future__ import annotations

import json
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from sfed.data.scores import SCORES, final_number, matches, score
from sfed.data.tasks import GLUE, TASKS

ANSWERS: list[tuple[str, str | None]] = [
    # Text, and the number that it ends in.
    ("#### 18", "18"),
    ("16 - 3 = 13\n#### 13", "13"),
    ("####5", "5"),
    ("####    5", "5"),
    ("####\t5", "5"),
    ("####\n5", "5"),
    ("####\n\n  5\n7", "5"),
    ("#### 0", "0"),
    ("#### 007", "7"),
    ("#### 1,234", "1234"),
    ("#### 1,234,567", "1234567"),
    ("#### 70,000.50", "70000.5"),
    ("#### 1, 2", "2"),
    ("#### -5", "-5"),
    ("#### - 5", "-5"),
    ("#### +5", "5"),
    ("#### \u22125", "-5"),
    ("#### $5", "5"),
    ("#### $ 5", "5"),
    ("#### -$5", "-5"),
    ("#### -$1,250.75", "-1250.75"),
    ("#### \u2212$5", "-5"),
    ("#### $-5", "-5"),
    ("#### €12", "12"),
    ("#### £3.20", "3.2"),
    ("#### 20%", "20"),
    ("#### 20 %", "20"),
    ("#### 12 apples", "12"),
    ("#### 12apples", "12"),
    ("#### 40 km/h", "40"),
    ("#### 5.", "5"),
    ("#### 5!", "5"),
    ("#### **5**", "5"),
    ("#### 1,234.", "1234"),
    ("#### 3.14", "3.14"),
    ("#### 5.0", "5"),
    ("#### .5", "0.5"),
    ("#### -.5", "-0.5"),
    ("#### $.75", "0.75"),
    ("#### 0.1", "0.1"),
    ("#### 1/2", "1/2"),
    ("#### 3 / 4", "3/4"),
    ("#### -1/3", "-1/3"),
    ("#### 10 - 3 = 7", "7"),
    ("#### 10-3=7", "7"),
    ("#### 3 - 10 = -7", "-7"),
    ("#### 2*3=$6", "6"),
    ("#### x = 5", "5"),
    ("#### The answer is 42.", "42"),
    ("#### 10-3", "3"),
    ("#### 5 - 3", "3"),
    ("#### 8\nQuestion: what else?\nAnswer: 9\n#### 10", "8"),
    ("#### 8\n#### 9", "8"),
    ("#### 8 and then 12\n15", "12"),
    ("so 1, 2, 3 and\n#### 4\r\nmore", "4"),
    ("5", None),
    ("The answer is 5.", None),
    ("### 5", None),
    ("", None),
    ("####", None),
    ("####\n", None),
    ("#### ", None),
    ("#### none", None),
    ("#### $", None),
    ("#### -", None),
    ("#### .", None),
    ("#### none\n5", None),
]


@pytest.mark.parametrize(("text", "number"), ANSWERS)
def test_the_final_number_of_an_answer(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(("text", "number"), ANSWERS)
def test_an_answer_matches_its_number_and_no_other(text: str, number: str | None) -> None:
    if number is None:
        assert not matches(text, 5.0)
        assert not matches(text, 0.0)
    else:
        value = float(Fraction(number))
        assert matches(text, value)
        assert not matches(text, value + 1)
        assert not matches(text, value - 1)
        assert not matches(text, value + 0.01)


@pytest.mark.parametrize("text", ["#### 5/0", "#### 1/0 = 5/00", "#### 9 / 0 cats"])
def test_a_division_by_zero_is_no_error(text: str) -> None:
    final_number(text)


@pytest.mark.parametrize(
    "number", ["1" * 400, "1" * 5000, "1/" + "9" * 5000, "0." + "1" * 5000, "-1" + ",111" * 200]
)
def test_digits_without_end_are_no_number(number: str) -> None:
    """A model that does not stop may write more of them than a float, or int(), can take."""
    assert final_number(f"#### {number}") is None
    assert not matches(f"#### {number}", 1.0)


def test_a_third_written_as_a_fraction_matches_the_nearest_float() -> None:
    assert matches("#### 1/3", 1 / 3)
    assert not matches("#### 0.33", 1 / 3)


def test_nothing_matches_a_row_without_a_number() -> None:
    assert not matches("#### 5", math.nan)


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_answer_of_gsm8k_gives_the_number_after_its_mark(shared_data, split, count) -> None:
    lines = (shared_data / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == count
    for answer in answers:
        expected = float(answer.split("#### ")[1].replace(",", ""))
        assert final_number(answer) == Fraction(expected), answer
        assert matches(answer, expected)


# --- scores of GLUE ------------------------------------------------------------------------------


def binary(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = (generator.random(count) < 0.3).astype(np.float64)
    predictions = np.where(generator.random(count) < 0.25, 1 - targets, targets)
    return predictions, targets


def values(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Values with ties, as those of STS-B have."""
    generator = np.random.default_rng(seed)
    targets = np.round(generator.uniform(0, 5, count) * 5) / 5
    return targets + generator.normal(size=count), targets


def counts(predictions: np.ndarray, targets: np.ndarray) -> tuple[float, float, float, float]:
    """True positives, true negatives, false positives, false negatives of class 1."""
    pairs = [(p, t) for p, t in zip(predictions, targets, strict=True)]
    return tuple(float(pairs.count(pair)) for pair in [(1, 1), (0, 0), (1, 0), (0, 1)])


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_is_the_share_of_equal_pairs(seed: int) -> None:
    predictions, targets = binary(seed)
    expected = sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)
    assert score("accuracy", predictions, targets) == pytest.approx(expected)
    assert score("exact_match", predictions, targets) == pytest.approx(expected)
    assert expected == sklearn.metrics.accuracy_score(targets, predictions)


def test_accuracy_counts_three_classes() -> None:
    assert score("accuracy", np.array([0.0, 1, 2, 2]), np.array([0.0, 2, 2, 1])) == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_f1_is_that_of_class_1(seed: int) -> None:
    predictions, targets = binary(seed)
    tp, _, fp, fn = counts(predictions, targets)
    assert score("f1", predictions, targets) == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_macro_f1_is_the_mean_f1_of_the_classes_that_occur() -> None:
    targets, predictions = np.array([0.0, 0, 0, 1, 1, 2]), np.array([0.0, 0, 1, 1, 1, 4])
    by_class = [4 / 5, 4 / 5, 0.0, 0.0]  # of 0, 1, 2 and 4; nobody has 3
    assert score("macro_f1", predictions, targets) == pytest.approx(np.mean(by_class))
    assert score("macro_f1", targets, targets) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_matthews_is_the_formula(seed: int) -> None:
    predictions, targets = binary(seed)
    tp, tn, fp, fn = counts(predictions, targets)
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score("matthews", predictions, targets) == pytest.approx((tp * tn - fp * fn) / below)
    assert score("matthews", targets, targets) == pytest.approx(1.0)
    assert score("matthews", 1 - targets, targets) == pytest.approx(-1.0)


@pytest.mark.parametrize("seed", range(4))
def test_pearson_is_the_cosine_of_what_is_centred(seed: int) -> None:
    predictions, targets = values(seed)
    p, t = predictions - predictions.mean(), targets - targets.mean()
    expected = p @ t / math.sqrt((p @ p) * (t @ t))
    assert score("pearson", predictions, targets) == pytest.approx(expected)
    assert score("pearson", 3 * predictions - 7, targets) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_pearson_of_the_ranks(seed: int) -> None:
    predictions, targets = values(seed)
    assert len(np.unique(targets)) < len(targets), "there should be ties"
    ranks = [scipy.stats.rankdata(v) for v in (predictions, targets)]
    expected = score("pearson", *ranks)
    assert score("spearman", predictions, targets) == pytest.approx(expected)
    assert score("spearman", np.exp(predictions), targets) == pytest.approx(expected)


ONES, ZEROS, MIXED = np.ones(4), np.zeros(4), np.array([0.0, 1, 0, 1])


@pytest.mark.parametrize(
    ("name", "predictions", "targets"),
    [
        *((name, np.zeros(0), np.zeros(0)) for name in SCORES),
        *((name, ONES, MIXED) for name in ("pearson", "spearman")),
        *((name, MIXED, ONES) for name in ("pearson", "spearman")),
        *((name, ONES[:1], ONES[:1]) for name in ("pearson", "spearman", "matthews")),
        *((name, MIXED * np.nan, MIXED) for name in ("pearson", "spearman")),
        ("matthews", MIXED, ONES),
        ("matthews", ONES, ONES),
        ("f1", ZEROS, ZEROS),
    ],
)
def test_a_score_that_is_undefined_is_none_and_says_nothing_else(name, predictions, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(name, predictions, targets) is None


@pytest.mark.parametrize(
    ("name", "predictions", "targets", "expected"),
    [
        ("matthews", ONES, MIXED, 0.0),  # it says nothing, and that is defined
        ("f1", ZEROS, MIXED, 0.0),
        ("f1", MIXED, ZEROS, 0.0),
        ("accuracy", ONES[:1], ONES[:1], 1.0),
    ],
)
def test_a_score_of_poor_predictions_is_defined(name, predictions, targets, expected) -> None:
    assert score(name, predictions, targets) == expected


def test_every_task_has_the_standard_scores_of_glue() -> None:
    assert {name: task.scores for name, task in GLUE.items()} == {
        "cola": ("matthews", "accuracy"),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
    }
    assert all(set(task.scores) <= SCORES.keys() for task in TASKS.values())
    assert TASKS["gsm8k"].scores == ("exact_match",)
