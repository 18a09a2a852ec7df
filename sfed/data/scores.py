"""Scores of held-out examples: the standard metrics of classification, and exact match of answers.

A score is a function of the predictions and targets of some examples, one number each. Higher is
better for every one. Needs no torch, and scikit-learn and SciPy only where a score is theirs.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

ANSWER_MARK = "####"
_MOST_DIGITS = 100
# A sign (also the typographic minus), a currency, digits with or without groups of three, decimals.
_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)\s?[$€£¥]?\s?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d*)(?P<part>\.\d+)?"
    r"(?:\s?/\s?(?P<below>\d+))?"
)


def final_number(text: str) -> Fraction | None:
    """Return the number that a worked answer ends in: the last one of the line after ``####``.

    Commas between thousands, signs, decimals, fractions, currencies and units are understood. What
    a model goes on to write in later lines does not count.

    Returns:
        The number, exactly; None where there is no ``####`` or no number after it, or one that
        goes on without end, as a model's may.
    """
    _, mark, rest = text.partition(ANSWER_MARK)
    if not mark:
        return None
    line = rest.strip().partition("\n")[0]
    found = [match for match in _NUMBER.finditer(line) if match["whole"] or match["part"]]
    if not found:
        return None
    last = found[-1]
    if len(last[0]) > _MOST_DIGITS:
        return None
    value = Fraction((last["whole"].replace(",", "") or "0") + (last["part"] or ""))
    if int(last["below"] or 1):
        value /= int(last["below"] or 1)
    # In "10-3" and "5 - 3" the sign is an operator: it follows what it takes from.
    before = line[: last.start()].rstrip()
    negative = last["sign"] in ("-", "\u2212") and not re.search(r"[\w)%]$", before)
    return -value if negative else value


def matches(text: str, target: float) -> bool:
    """Whether a written answer ends in this number."""
    number = final_number(text)
    return number is not None and math.isclose(float(number), target, rel_tol=1e-9, abs_tol=1e-9)


def _accuracy(predictions: Numbers, targets: Numbers) -> float:
    return float(np.mean(predictions == targets))


def _f1(predictions: Numbers, targets: Numbers) -> float:
    """F1 of class 1; undefined where neither holds it."""
    from sklearn.metrics import f1_score

    return float(f1_score(targets, predictions, zero_division=np.nan))


def _macro_f1(predictions: Numbers, targets: Numbers) -> float:
    """Mean F1 of the classes that targets or predictions hold, each counting the same."""
    from sklearn.metrics import f1_score

    return float(f1_score(targets, predictions, average="macro", zero_division=0.0))


def _matthews(predictions: Numbers, targets: Numbers) -> float:
    """Matthews' correlation; undefined where the targets are all of one class."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(targets)) < 2:
        return math.nan
    return float(matthews_corrcoef(targets, predictions))


def _pearson(predictions: Numbers, targets: Numbers) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, targets)


def _spearman(predictions: Numbers, targets: Numbers) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, targets)


def _correlation(of: Callable[..., object], predictions: Numbers, targets: Numbers) -> float:
    """A correlation; undefined for fewer than two examples and for constants."""
    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(targets) == 0:
        return math.nan
    return float(of(predictions, targets)[0])  # type: ignore[index]


SCORES: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": _accuracy,
    "exact_match": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def score(name: str, predictions: Numbers, targets: Numbers) -> float | None:
    """Return one score of some examples; None where it is undefined, as of no examples.

    Args:
        name: of ``SCORES``.
        predictions: (examples,) classes or values.
        targets: (examples,) likewise.
    """
    if not len(targets):
        return None
    with warnings.catch_warnings():  # an undefined score is None here, which says it
        warnings.simplefilter("ignore")
        value = SCORES[name](predictions, targets)
    return value if math.isfinite(value) else None
