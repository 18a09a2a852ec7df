"""What each method makes of the clients' factors in one round, dense and one layer at a time.

    W x + s B A x        s the scaling, p_i the weights of the clients, with the sum 1

Written for this comparison alone: nothing of the trainer is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from sfed.conformance.cases import A, B, Case, State, product


@dataclass(frozen=True)
class Outcome:
    """What an aggregation leaves behind."""

    states: tuple[State, ...]
    """The factors with which each client begins the next round."""
    base: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Layer -> change of the frozen weight, (out, in); layers that are not named do not change."""


@dataclass(frozen=True)
class Definition:
    """A method, and what of its outcome is fixed by its definition."""

    name: str
    rule: str
    """The formula."""
    source: str
    apply: Callable[[Case], Outcome]
    private: tuple[str, ...] = ()
    """Factors that stay each client's own."""
    fixes_factors: bool = True
    """Whether each factor is fixed; else only the weight that comes out, s B A and the change of
    the frozen weight added up: an SVD leaves signs and rotations open."""

    def observed(self, case: Case, outcome: Outcome) -> dict[str, torch.Tensor]:
        """What of an outcome is compared: name -> tensor."""
        found: dict[str, torch.Tensor] = {}
        for client, state in enumerate(outcome.states):
            for layer in case.layers:
                effective = case.scaling * product(state, layer) + _change(case, outcome, layer)
                found[f"client {client}, {layer}, weight"] = effective
                if self.fixes_factors:
                    found[f"client {client}, {layer}, A"] = state[f"{layer}.{A}"]
                    found[f"client {client}, {layer}, B"] = state[f"{layer}.{B}"]
        return found


def _change(case: Case, outcome: Outcome, layer: str) -> torch.Tensor:
    none = torch.zeros_like(product(case.states[0], layer))
    return outcome.base.get(layer, none)


def mean(case: Case, name: str) -> torch.Tensor:
    """sum_i p_i x_i of one factor of one layer."""
    total = sum(p * state[name].double() for p, state in _pairs(case))
    assert isinstance(total, torch.Tensor)
    return total.float()


def mean_product(case: Case, layer: str) -> torch.Tensor:
    """sum_i p_i B_i A_i of a layer: (out, in)."""
    total = sum(p * product(state, layer).double() for p, state in _pairs(case))
    assert isinstance(total, torch.Tensor)
    return total.float()


def _pairs(case: Case) -> Iterator[tuple[float, State]]:
    return zip(case.weights, case.states, strict=True)


def means_of(case: Case, factors: tuple[str, ...]) -> Outcome:
    """The named factors become their mean, the others stay each client's own."""
    common = {
        f"{layer}.{factor}": mean(case, f"{layer}.{factor}")
        for layer in case.layers
        for factor in factors
    }
    return Outcome(tuple({**state, **common} for state in case.states))


def _fedsa(case: Case) -> Outcome:
    return means_of(case, (A,))


def _ffa(case: Case) -> Outcome:
    return means_of(case, (B,))


def _fedit(case: Case) -> Outcome:
    return means_of(case, (A, B))


def _fedex(case: Case) -> Outcome:
    averaged = means_of(case, (A, B))
    base = {
        layer: case.scaling * (mean_product(case, layer) - product(averaged.states[0], layer))
        for layer in case.layers
    }
    return Outcome(averaged.states, base)


def _flora(case: Case) -> Outcome:
    """B = 0 stands for the fresh adapters: their A is free."""
    base = {layer: case.scaling * mean_product(case, layer) for layer in case.layers}
    fresh = {
        name: torch.zeros_like(values) if name.endswith(B) else values
        for name, values in case.states[0].items()
    }
    return Outcome(tuple(fresh for _ in case.states), base)


def _flexlora(case: Case) -> Outcome:
    common: dict[str, torch.Tensor] = {}
    for layer in case.layers:
        lora_rank = len(case.states[0][f"{layer}.{A}"])
        left, values, right = torch.linalg.svd(mean_product(case, layer), full_matrices=False)
        common[f"{layer}.{A}"] = right[:lora_rank]
        common[f"{layer}.{B}"] = left[:, :lora_rank] * values[:lora_rank]
    return Outcome(tuple(common for _ in case.states))


DEFINITIONS: dict[str, Definition] = {
    one.name: one
    for one in (
        Definition("fedsa", "A = sum p_i A_i; B stays", "2410.01463", _fedsa, private=(B,)),
        Definition("ffa", "B = sum p_i B_i; A stays", "2403.12313", _ffa, private=(A,)),
        Definition("fedit", "A = sum p_i A_i, B = sum p_i B_i", "2305.05644", _fedit),
        Definition("fedex", "as fedit, and W += s (sum p_i B_i A_i - B A)", "2410.09432", _fedex),
        Definition(
            "flora",
            "W += s sum p_i B_i A_i; fresh adapters",
            "2409.05976",
            _flora,
            fixes_factors=False,
        ),
        Definition(
            "flexlora",
            "B A = the best product of rank r for sum p_i B_i A_i",
            "2402.11505",
            _flexlora,
            fixes_factors=False,
        ),
    )
}
"""The methods by name. The aggregation of sfed and of fedsa-rslora is that of fedsa."""
