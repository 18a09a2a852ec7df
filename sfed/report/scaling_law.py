"""The law: how gradients and adapter outputs grow with N and r, beside what theory says.

With gamma = alpha * N^p * r^q and B = 0 at the start, log-log slopes are

==================== ================== =================== =========
quantity             in N, mean of      in N, shared A      in r
                     independent A's
==================== ================== =================== =========
first gradient norm  p - 1/2            p                   q + 1/2
output^2, SGD        4p - 2             4p                  4q + 2
output^2, Adam       2p - 1             2p                  2q + 2
==================== ================== =================== =========

The mean of N independent A's is smaller than one of them by sqrt(N). Under SGD a step of B grows
with gamma |A|, so that the output holds gamma and |A| twice; a step of Adam has the same size
whatever the gradient. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfed.methods.method import METHODS
from sfed.observability import metrics
from sfed.report.grouping import BY_CLIENTS, BY_RANK, Axis, Group, Sweep, sweeps
from sfed.storage.run_record import RunRecord, look, number

FIRST_GRADIENT, OUTPUT = "first gradient norm", "output squared"
_LARGEST_EXPONENT = 700

Pair = tuple[float, float]
"""(N, r), and exponents of N and r."""


@dataclass(frozen=True)
class Theory:
    """What a method is, as far as the law asks."""

    exponents: Pair | None
    """gamma = alpha * N**exponents[0] * r**exponents[1]."""
    start: str
    """How A starts: mean (of independent draws, before the first step), shared or apart."""
    optimizer: str
    clipped: bool
    """Whether gradients were longer than the norm they are clipped to."""


@dataclass(frozen=True)
class Fit:
    """A log-log slope: its mean over the fits at each fixed value of the other variable."""

    slope: float
    lowest: float
    highest: float
    fits: int


@dataclass(frozen=True)
class ScalingFit:
    """One quantity of one method: measured, fitted and predicted."""

    label: str
    theory: Theory
    quantity: str
    after_round: int
    values: Mapping[Pair, float]
    """The quantity at each (N, r), the geometric mean over the seeds."""

    def fit(self, axis: Axis) -> Fit | None:
        """Least squares along N or r; None where fewer than two values are known."""
        slopes = [
            slope(points)
            for fixed in sorted({pair[axis.other.position] for pair in self.values})
            if len(points := self.along(axis, fixed)) > 1
        ]
        if not slopes:
            return None
        return Fit(statistics.fmean(slopes), min(slopes), max(slopes), len(slopes))

    def along(self, axis: Axis, fixed: float) -> list[tuple[float, float]]:
        """Points (N or r, value) where the other variable has a value."""
        return [
            (pair[axis.position], value)
            for pair, value in sorted(self.values.items())
            if pair[axis.other.position] == fixed
        ]

    def predicted(self, axis: Axis) -> float | None:
        """The slope that theory gives, where it gives one."""
        return predict(self.quantity, self.theory, axis)


def fullest(laws: Sequence[ScalingFit], axis: Axis) -> float | None:
    """The value of the other variable with most points along this one; the largest of equals."""
    fixed = {pair[axis.other.position] for law in laws for pair in law.values}
    sizes = {value: sum(len(law.along(axis, value)) for law in laws) for value in fixed}
    return max(sizes, key=lambda value: (sizes[value], value), default=None)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of log y over log x; needs two different x."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    return statistics.linear_regression(xs, ys).slope


def predict(quantity: str, theory: Theory, axis: Axis) -> float | None:
    """Return the slope of the table above; None where theory has none.

    It has none in N where independent A's are not averaged before the first step, and none for
    the output under SGD where steps were clipped.
    """
    if theory.exponents is None or (axis is BY_CLIENTS and theory.start == "apart"):
        return None
    exponent = theory.exponents[axis.position]
    # gamma |A x| of one row of A, and how the rows of A add up
    size = exponent - 0.5 if axis is BY_CLIENTS and theory.start == "mean" else exponent
    rows = 0.5 if axis is BY_RANK else 0.0
    if quantity == FIRST_GRADIENT:
        return size + rows
    if theory.optimizer == "sgd":
        return None if theory.clipped else 4 * (size + rows)
    return 2 * (size + 2 * rows) if theory.optimizer == "adamw" else None


def theory_of(stories: Sequence[RunRecord]) -> Theory:
    """What the law asks of runs that differ in N, r and seed only."""
    story = stories[0]
    given = look(story.config, "resolved.scaling_exponents")
    usable = isinstance(given, list) and len(given) == 2
    pair = [number({"x": x}, "x") for x in given] if usable else [None]
    exponents = (pair[0], pair[1]) if pair[0] is not None and pair[1] is not None else None
    independent = look(story.config, "resolved.independent_init")
    start = "shared" if independent is False else "mean" if _averages_a(story) else "apart"
    optimizer = str(look(story.config, "train.optimizer"))
    return Theory(exponents, start, optimizer, clipped=any(map(_was_clipped, stories)))


def _averages_a(story: RunRecord) -> bool:
    method = METHODS.get(story.method)
    averaged = look(story.config, "federated.averaged")
    if method is not None and isinstance(averaged, list):
        method = dataclasses.replace(method, averaged=(tuple(averaged),))
    return method is not None and method.has_global_adapter


def _was_clipped(story: RunRecord) -> bool:
    bound = number(story.config, "train.max_grad_norm")
    norms = [
        number(event, key) or 0.0
        for event in story.rounds
        for key in (metrics.FIRST_GRAD_NORM, metrics.GRAD_NORM)
    ]
    return bound is not None and max(norms, default=0.0) > bound


def laws(stories: Sequence[RunRecord]) -> list[ScalingFit]:
    """All that can be fitted: methods whose runs have two values of N at one r, or of r at one N.

    The output is that of the last evaluated round that all of a method's runs have.
    """
    found = []
    drawn = [story for story in stories if not story.started_from]  # the law is of a drawn A
    for sweep in sweeps(drawn):
        members = [story for cell in sweep.cells.values() for story in cell.stories]
        theory = theory_of(members)
        rounds = [known for story in members if (known := _rounds_with_output(story))]
        common = set.intersection(*rounds) if rounds else set()
        wanted = [(FIRST_GRADIENT, metrics.FIRST_GRAD_NORM, 1, 1)]
        wanted += [(OUTPUT, metrics.OUTPUT_RMS, max(common), 2)] if common else []
        for quantity, key, after_round, power in wanted:
            values = _values(sweep, key, after_round, power)
            law = ScalingFit(sweep.label, theory, quantity, after_round, values)
            if law.fit(BY_CLIENTS) or law.fit(BY_RANK):
                found.append(law)
    return found


def _rounds_with_output(story: RunRecord) -> set[int]:
    return {
        event["round"] for event in story.rounds if (number(event, metrics.OUTPUT_RMS) or 0.0) > 0
    }


def _values(sweep: Sweep, key: str, after_round: int, power: int) -> dict[Pair, float]:
    means = {pair: _mean_log(cell, key, after_round) for pair, cell in sorted(sweep.cells.items())}
    return {
        pair: math.exp(power * mean)
        for pair, mean in means.items()
        if mean is not None and abs(power * mean) < _LARGEST_EXPONENT
    }


def _mean_log(cell: Group, key: str, after_round: int) -> float | None:
    logs = [
        math.log(value)
        for story in cell.stories
        for event in story.rounds
        if event["round"] == after_round and (value := number(event, key) or 0.0) > 0
    ]
    return statistics.fmean(logs) if logs else None
