"""Classes of bugs that public code of these methods has shown, each as the outcome that it gives.

A function whose outcomes are those of a bug on every case has that bug.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sfed.conformance.cases import A, B, Case, product
from sfed.conformance.definitions import (
    Definition,
    Outcome,
    mean_product,
    means_of,
)

WithBug = Callable[[Definition, Case], Outcome]


@dataclass(frozen=True)
class Bug:
    """One class."""

    name: str
    meaning: str
    outcome: WithBug
    methods: tuple[str, ...] = ()
    """The definitions that it is a bug of; () = all."""


def _uniform(definition: Definition, case: Case) -> Outcome:
    count = len(case.states)
    return definition.apply(case.with_weights([1 / count] * count))


def _own_kept(definition: Definition, case: Case, outcome: Outcome) -> Outcome:
    """What the method shares from another outcome; the rest stays each client's own."""
    shared, private = outcome.states[0], definition.private
    states = tuple(
        {name: own if name.endswith(private) else shared[name] for name, own in state.items()}
        for state in case.states
    )
    return Outcome(states, outcome.base)


def _of(*chosen: int) -> WithBug:
    """Only these clients count; negative numbers count from the last."""

    def outcome(definition: Definition, case: Case) -> Outcome:
        count = len(case.states)
        places = [i % count for i in chosen]
        return _own_kept(definition, case, definition.apply(case.of_clients(places)))

    return outcome


def _without(place: int) -> WithBug:
    def outcome(definition: Definition, case: Case) -> Outcome:
        count = len(case.states)
        left = [i for i in range(count) if i != place % count] or [0]
        return _own_kept(definition, case, definition.apply(case.of_clients(left)))

    return outcome


def _first_times_weight(definition: Definition, case: Case) -> Outcome:
    weights = [case.weights[0], *[0.0] * (len(case.states) - 1)]
    return definition.apply(case.with_weights(weights))


def _summed(definition: Definition, case: Case) -> Outcome:
    return definition.apply(case.with_weights([1.0] * len(case.states)))


def _nothing(_definition: Definition, case: Case) -> Outcome:
    return Outcome(case.states)


def _all_averaged(_definition: Definition, case: Case) -> Outcome:
    return means_of(case, (A, B))


def _leak(definition: Definition, case: Case) -> Outcome:
    """Each client's private factor is the one of the client before it."""
    right, private = definition.apply(case).states, definition.private
    return Outcome(
        tuple(
            {n: right[place - 1][n] if n.endswith(private) else v for n, v in state.items()}
            for place, state in enumerate(right)
        )
    )


def _last_private(definition: Definition, case: Case) -> Outcome:
    last = definition.apply(case).states[-1]
    return Outcome(tuple(last for _ in case.states))


def _weights_on(factor: str) -> WithBug:
    def outcome(definition: Definition, case: Case) -> Outcome:
        weighted, uniform = definition.apply(case), _uniform(definition, case)
        states = tuple(
            {n: v if n.endswith(factor) else plain[n] for n, v in state.items()}
            for state, plain in zip(weighted.states, uniform.states, strict=True)
        )
        return Outcome(states, weighted.base)

    return outcome


def _base_times(factor: Callable[[Case], float]) -> WithBug:
    def outcome(definition: Definition, case: Case) -> Outcome:
        right = definition.apply(case)
        changed = {layer: factor(case) * values for layer, values in right.base.items()}
        return replace(right, base=changed)

    return outcome


def _transposed(definition: Definition, case: Case) -> Outcome:
    """Where a transposed matrix has the right shape; elsewhere the code would fail."""
    right = definition.apply(case)
    changed = {
        layer: values.T if values.shape[0] == values.shape[1] else values
        for layer, values in right.base.items()
    }
    return replace(right, base=changed)


def _svd(split: Callable[[torch.Tensor, Case], torch.Tensor], *, wrong_v: bool = False) -> WithBug:
    """FlexLoRA with B = U f(S), and perhaps with rows of V in the place of those of V^T."""

    def outcome(_definition: Definition, case: Case) -> Outcome:
        common: dict[str, torch.Tensor] = {}
        for layer in case.layers:
            lora_rank = len(case.states[0][f"{layer}.{A}"])
            left, values, right = torch.linalg.svd(mean_product(case, layer), full_matrices=False)
            rows = right[:lora_rank]
            if wrong_v and right.shape[0] == right.shape[1]:
                rows = right.T[:lora_rank]
            common[f"{layer}.{A}"] = rows
            common[f"{layer}.{B}"] = left[:, :lora_rank] * split(values, case)[:lora_rank]
        return Outcome(tuple(common for _ in case.states))

    return outcome


def _products_mixed(_definition: Definition, case: Case) -> Outcome:
    """The change of the weight is made of the means, not of the clients' products."""
    averaged = means_of(case, (A, B)).states[0]
    base = {layer: case.scaling * product(averaged, layer) for layer in case.layers}
    fresh = {n: torch.zeros_like(v) if n.endswith(B) else v for n, v in case.states[0].items()}
    return Outcome(tuple(fresh for _ in case.states), base)


_PRIVATE, _FOLDING = ("fedsa", "ffa"), ("fedex", "flora")
BUGS: tuple[Bug, ...] = (
    Bug("weights ignored", "every client counts the same, whatever its p_i", _uniform),
    Bug("sum for mean", "the clients are added up and not averaged", _summed),
    Bug("first client only", "what the others sent is lost", _of(0)),
    Bug(
        "first client times its weight",
        "a dictionary of weighted values is made anew for each client, or only the first is added",
        _first_times_weight,
    ),
    Bug("last client wins", "each client overwrites the one before", _of(-1)),
    Bug("first client dropped", "the loop begins with the second", _without(0)),
    Bug("last client dropped", "the loop ends one early", _without(-1)),
    Bug("nothing is shared", "each client keeps what it had", _nothing),
    Bug(
        "private factor averaged",
        "what has to stay with its client is averaged too",
        _all_averaged,
        _PRIVATE,
    ),
    Bug(
        "private factor leaks", "a client begins where the client before it ended", _leak, _PRIVATE
    ),
    Bug(
        "one private factor for all",
        "all clients get that of the last one",
        _last_private,
        _PRIVATE,
    ),
    Bug("weights on A only", "B is averaged without weights", _weights_on(A), ("fedit", "fedex")),
    Bug("weights on B only", "A is averaged without weights", _weights_on(B), ("fedit", "fedex")),
    Bug(
        "scaling missing",
        "the change of the frozen weight lacks s",
        _base_times(lambda case: 1 / case.scaling),
        _FOLDING,
    ),
    Bug(
        "scaling twice",
        "the change of the frozen weight has s twice",
        _base_times(lambda case: case.scaling),
        _FOLDING,
    ),
    Bug(
        "no change of the frozen weight",
        "the residual or the product is never added",
        _base_times(lambda _case: 0.0),
        _FOLDING,
    ),
    Bug(
        "change added twice",
        "the residual or the product is counted twice",
        _base_times(lambda _case: 2.0),
        _FOLDING,
    ),
    Bug("change of the wrong sign", "it is subtracted", _base_times(lambda _case: -1.0), _FOLDING),
    Bug(
        "transposed change",
        "right for Conv1D, wrong for Linear; unseen unless a layer is square",
        _transposed,
        _FOLDING,
    ),
    Bug("product of the means", "(sum p B)(sum p A) is not sum p B A", _products_mixed, ("flora",)),
    Bug(
        "product of the means", "(sum p B)(sum p A) is not sum p B A", _all_averaged, ("flexlora",)
    ),
    Bug(
        "one square root lost",
        "B = U sqrt(S) with A = V^T",
        _svd(lambda s, _case: s.sqrt()),
        ("flexlora",),
    ),
    Bug(
        "singular values lost",
        "B = U with A = V^T",
        _svd(lambda s, _case: torch.ones_like(s)),
        ("flexlora",),
    ),
    Bug(
        "scaling left in the product",
        "s (sum p B A) is decomposed and s applied again",
        _svd(lambda s, case: s * case.scaling),
        ("flexlora",),
    ),
    Bug(
        "V for V^T",
        "torch.svd returns V, torch.linalg.svd V^T",
        _svd(lambda s, _case: s, wrong_v=True),
        ("flexlora",),
    ),
)
"""All classes."""


def bugs_of(method: str) -> list[Bug]:
    """The classes that a method can show."""
    return [bug for bug in BUGS if not bug.methods or method in bug.methods]
