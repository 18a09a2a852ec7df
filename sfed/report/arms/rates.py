"""The learning rate that suits an arm best, of the rates that were tried."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sfed.report.arms.blocks import Arm, Block
from sfed.report.arms.pairing import Measure

LOWEST, HIGHEST = "lowest of its grid", "highest of its grid"


@dataclass(frozen=True)
class Tuned:
    """An arm over the learning rates that it was run with."""

    condition: str
    name: str
    means: Mapping[float, float | None]
    """By rate: mean over clients and over the seeds; None where a seed is missing."""
    seeds: Sequence[int]
    """The seeds that the means are over."""
    best: Arm | None
    """The arm at its best rate, the lowest of equal ones; None where nothing is measured."""
    edge: str
    """LOWEST or HIGHEST where the best rate is at that end of the grid; else empty."""
    notes: Sequence[str]
    """Rates that could not be selected, and why, a line each."""


def tuned(found: Sequence[Block], measure: Measure) -> list[Tuned]:
    """Select the rate of each arm; nothing where no arm has several.

    Args:
        found: blocks that hold all rates of an arm.
        measure: what the selection goes by.
    """
    made = []
    for block in found:
        by_key: dict[str, dict[float, Arm]] = {}
        for arm in block.arms:
            if arm.rate is not None:  # of runs that were made twice the first
                by_key.setdefault(arm.key, {}).setdefault(arm.rate, arm)
        made += [_tune(block.condition, arms, measure) for arms in by_key.values()]
    return made if any(len(one.means) > 1 for one in made) else []


def _tune(condition: str, by_rate: Mapping[float, Arm], measure: Measure) -> Tuned:
    arms = [by_rate[rate] for rate in sorted(by_rate)]
    values = [_means_by_seed(arm, measure, arms) for arm in arms]
    seeds = max((sorted(by_seed) for by_seed in values), key=len)
    means: dict[float, float | None] = {}
    notes = []
    for rate, arm, by_seed in zip(sorted(by_rate), arms, values, strict=True):
        lacking = [seed for seed in seeds if seed not in by_seed]
        is_known = seeds and not lacking
        means[rate] = statistics.fmean(by_seed[seed] for seed in seeds) if is_known else None
        if lacking:
            named = ", ".join(map(str, lacking))
            notes.append(f"{arm.name}, lr = {rate:g}: not selected from, without seed {named}")
    known = {rate: mean for rate, mean in means.items() if mean is not None}
    sign = 1.0 if measure.lower_is_better else -1.0
    best = min(known, key=lambda rate: (sign * known[rate], rate), default=None)
    return Tuned(
        condition=condition,
        name=arms[0].name,
        means=means,
        seeds=seeds,
        best=None if best is None else by_rate[best],
        edge=_edge(best, list(means)),
        notes=notes,
    )


def _means_by_seed(arm: Arm, measure: Measure, arms: Sequence[Arm]) -> dict[int, float]:
    """The mean over clients of each run that lacks no client which another rate's run has."""
    found = {}
    for seed, story in arm.runs.items():
        values = measure.of(story)
        others = [measure.of(other.runs[seed]) for other in arms if seed in other.runs]
        if values and len(values) == max(map(len, others)):
            found[seed] = statistics.fmean(values.values())
    return found


def _edge(best: float | None, rates: Sequence[float]) -> str:
    """At which end of the grid the best rate is; a grid of one rate has none."""
    if best is None or len(rates) < 2:
        return ""
    return LOWEST if best == min(rates) else HIGHEST if best == max(rates) else ""


def at_best(found: Sequence[Tuned]) -> list[Block]:
    """Each arm at its own best rate, in blocks as before."""
    by_condition: dict[str, list[Arm]] = {}
    for one in found:
        if one.best is not None:
            text = f"{one.name}, lr = {one.best.rate:g}{' (edge)' if one.edge else ''}"
            by_condition.setdefault(one.condition, []).append(replace(one.best, label=text))
    return [Block(condition, arms) for condition, arms in by_condition.items()]
