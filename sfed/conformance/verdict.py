"""Runs a function on all cases, compares with the definition, and names the bug that it shows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sfed.conformance.bugs import Bug, bugs_of
from sfed.conformance.cases import Case, State, all_cases
from sfed.conformance.definitions import Definition, Outcome
from sfed.utils.errors import UserError
from sfed.utils.text import one_line

Aggregate = Callable[..., Any]
"""``aggregate(states)``, ``aggregate(states, weights)`` or ``aggregate(states, weights, scaling)``.

Gets the clients' factors, the weights p_i and s. Returns one mapping for all clients, or a list
with one for each; names that it leaves out stay each client's own. Where the frozen weights change,
it returns a pair of that and a mapping LAYER -> change of the weight (out, in).
"""
_TOLERANCE = 1e-4
"""Of the largest number of a tensor: fp32 sums in another order differ by 1e-6."""


@dataclass(frozen=True)
class Finding:
    """What one case showed."""

    case: str
    place: str
    """What differs: a client, a layer, and a factor or the weight; "" where nothing does."""
    difference: float
    """Relative to the largest number there."""


@dataclass(frozen=True)
class Verdict:
    """What was found of a function."""

    method: str
    findings: tuple[Finding, ...]
    """One for each case."""
    bugs: tuple[Bug, ...]
    """Classes that explain all of the findings."""
    side_effects: tuple[str, ...]
    """What it does beside its result, in words."""

    @property
    def conforms(self) -> bool:
        """Whether the function is the method."""
        return not self.side_effects and not any(found.place for found in self.findings)


def examine(aggregate: Aggregate, definition: Definition) -> Verdict:
    """Try a function on all cases.

    Args:
        aggregate: the function.
        definition: of the method that it shall be.

    Raises:
        UserError: where it fails, or returns something of another form.
    """
    cases = all_cases()
    outcomes = [_called(aggregate, case) for case in cases]
    pairs = list(zip(cases, outcomes, strict=True))
    findings = tuple(
        _compared(definition, case, outcome, definition.apply(case)) for case, outcome in pairs
    )
    found = []
    if any(finding.place for finding in findings):
        found = [bug for bug in bugs_of(definition.name) if _explains(bug, definition, pairs)]
    effects = tuple(_side_effects(aggregate, definition, cases))
    return Verdict(definition.name, findings, tuple(found), effects)


def _called(aggregate: Aggregate, case: Case) -> Outcome:
    """Call it with copies, as often as its signature takes of states, weights and scaling."""
    states = [{name: values.clone() for name, values in state.items()} for state in case.states]
    return _read(_call(aggregate, case, states), case)


def _call(aggregate: Aggregate, case: Case, states: Sequence[State]) -> Any:
    given = (list(states), list(case.weights), case.scaling)
    try:
        return aggregate(*given[: _num_arguments(aggregate)])
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"the case '{case.name}': the function raised {reason}") from error


def _num_arguments(aggregate: Aggregate) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(aggregate).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters):
        return 3
    return min(3, sum(one.kind in kinds for one in parameters))


def _read(result: Any, case: Case) -> Outcome:
    base: Any = {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        result, base = result
    states = [result] * len(case.states) if isinstance(result, Mapping) else result
    if (
        not isinstance(states, Sequence)
        or len(states) != len(case.states)
        or not all(isinstance(one, Mapping) for one in states)
    ):
        raise UserError(
            f"the case '{case.name}': the function returned {type(result).__name__}; it has to "
            f"return a mapping for all clients, or a list with one for each of the "
            f"{len(case.states)}, or a pair of that and the changes of the frozen weights"
        )
    whole = tuple(
        _checked(case, {**own, **new}, own) for own, new in zip(case.states, states, strict=True)
    )
    shapes = {layer: _shape_of(case, layer) for layer in case.layers}
    for layer, change in base.items():
        if layer not in shapes or tuple(change.shape) != shapes[layer]:
            raise UserError(
                f"the case '{case.name}': the change of {layer!r} has shape "
                f"{tuple(change.shape)}; expected (out, in) of one of {shapes}"
            )
    return Outcome(whole, {layer: change.float() for layer, change in base.items()})


def _shape_of(case: Case, layer: str) -> tuple[int, int]:
    state = case.states[0]
    return len(state[f"{layer}.lora_B.weight"]), state[f"{layer}.lora_A.weight"].shape[1]


def _checked(case: Case, state: State, own: State) -> dict[str, torch.Tensor]:
    for name, values in state.items():
        if name not in own:
            raise UserError(
                f"the case '{case.name}': the function returned {name!r}; the names are "
                f"{', '.join(own)}"
            )
        if values.shape != own[name].shape:
            raise UserError(
                f"the case '{case.name}': {name} has shape {tuple(values.shape)}; expected "
                f"{tuple(own[name].shape)}"
            )
    return {name: values.detach().float() for name, values in state.items()}


def _compared(definition: Definition, case: Case, one: Outcome, other: Outcome) -> Finding:
    """The largest difference between two outcomes of a case."""
    expected = definition.observed(case, other)
    differences = {
        name: _difference(values, expected[name])
        for name, values in definition.observed(case, one).items()
    }
    place = max(differences, key=differences.__getitem__)
    worst = differences[place]
    return Finding(case.name, place if worst > _TOLERANCE else "", worst)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if not bool(torch.isfinite(one).all()):
        return float("inf")
    scale = max(float(one.abs().max()), float(other.abs().max()), 1e-12)
    return float((one - other).abs().max()) / scale


def _explains(bug: Bug, definition: Definition, pairs: Sequence[tuple[Case, Outcome]]) -> bool:
    return all(
        not _compared(definition, case, outcome, bug.outcome(definition, case)).place
        for case, outcome in pairs
    )


def _side_effects(
    aggregate: Aggregate, definition: Definition, cases: Sequence[Case]
) -> Iterator[str]:
    """What goes wrong although each result is right."""
    case = cases[1]
    states = [{name: values.clone() for name, values in state.items()} for state in case.states]
    result = _call(aggregate, case, states)
    changed = [
        name
        for own, given in zip(case.states, states, strict=True)
        for name in own
        if name not in given or not torch.equal(own[name], given[name])
    ]
    if changed:
        yield f"it changes what it was given, such as {changed[0]}"
    if isinstance(result, list) and _shares_memory(result, definition):
        yield (
            "clients get the same memory for what is their own: a step of one in place changes "
            "another"
        )
    first, second = _called(aggregate, case), _called(aggregate, case)
    if _compared(definition, case, first, second).place:
        yield "a second call with the same arguments gives another result: it keeps something"
    order = tuple(reversed(range(len(case.states))))
    turned = _called(aggregate, case.of_clients(order))
    back = replace(turned, states=tuple(reversed(turned.states)))
    if _compared(definition, case, back, first).place:
        yield "the order of the clients changes the result"


def _shares_memory(states: Sequence[State], definition: Definition) -> bool:
    places = [
        values.data_ptr()
        for state in states
        for name, values in state.items()
        if name.endswith(definition.private or ("",))
    ]
    return bool(definition.private) and len(set(places)) < len(places)
