"""The suite for functions of others: right ones pass, and each class of bug is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sfed.conformance import __main__ as conformance
from sfed.conformance.bugs import BUGS
from sfed.conformance.definitions import DEFINITIONS
from sfed.conformance.verdict import examine
from sfed.utils.errors import UserError

A, B = ".lora_A.weight", ".lora_B.weight"
State = dict[str, torch.Tensor]


def summed(states: list[State], weights: list[float], name: str) -> torch.Tensor:
    return sum(w * s[name] for w, s in zip(weights, states, strict=True))


def means(*suffixes: str):
    """A function that gives all clients the mean of some factors."""

    def aggregate(states: list[State], weights: list[float]) -> State:
        return {n: summed(states, weights, n) for n in states[0] if n.endswith(suffixes)}

    return aggregate


def layers(states: list[State]) -> list[str]:
    return [name.removesuffix(A) for name in states[0] if name.endswith(A)]


def delta(states: list[State], weights: list[float], layer: str) -> torch.Tensor:
    products = [state[layer + B] @ state[layer + A] for state in states]
    return sum(w * p for w, p in zip(weights, products, strict=True))


def fedex(states, weights, scaling, times=1.0, turn=False, uniform=()):
    equal = [1 / len(states)] * len(states)
    common = {
        n: summed(states, equal if n.endswith(tuple(uniform)) else weights, n) for n in states[0]
    }
    right = {n: summed(states, weights, n) for n in states[0]}
    change = {}
    for layer in layers(states):
        residual = delta(states, weights, layer) - right[layer + B] @ right[layer + A]
        square = residual.shape[0] == residual.shape[1]
        change[layer] = times * scaling * (residual.T if turn and square else residual)
    return common, change


def fresh(states: list[State]) -> State:
    return {n: torch.zeros_like(v) if n.endswith(B) else v for n, v in states[0].items()}


def flora(states, weights, scaling):
    return fresh(states), {n: scaling * delta(states, weights, n) for n in layers(states)}


def flora_without_scaling(states, weights):
    return fresh(states), {n: delta(states, weights, n) for n in layers(states)}


def flora_of_means(states, weights, scaling):
    right = {n: summed(states, weights, n) for n in states[0]}
    return fresh(states), {n: scaling * right[n + B] @ right[n + A] for n in layers(states)}


def flexlora(states, weights, scaling, split=lambda s, _scaling: s, transpose=False):
    common = {}
    for layer in layers(states):
        rank = len(states[0][layer + A])
        u, s, vh = torch.linalg.svd(delta(states, weights, layer), full_matrices=False)
        rows = vh.T if transpose and vh.shape[0] == vh.shape[1] else vh
        # Another basis of the same product: signs are free.
        common[layer + A] = -rows[:rank]
        common[layer + B] = -u[:, :rank] * split(s, scaling)[:rank]
    return common


RIGHT = {
    "fedsa": means(A),
    "ffa": means(B),
    "fedit": means(A, B),
    "fedex": fedex,
    "flora": flora,
    "flexlora": flexlora,
}


@pytest.mark.parametrize("method", DEFINITIONS)
def test_a_right_function_passes(method: str) -> None:
    verdict = examine(RIGHT[method], DEFINITIONS[method])
    assert verdict.conforms, verdict


@pytest.mark.parametrize("method", DEFINITIONS)
@pytest.mark.parametrize("other", RIGHT)
def test_a_right_function_of_another_method_does_not_pass(method: str, other: str) -> None:
    """FedEx and FLoRA make the same weight out of other parts: FLoRA's factors are not fixed."""
    same = {method, other} == {"fedex", "flora"} and method == "flora"
    assert examine(RIGHT[other], DEFINITIONS[method]).conforms == (method == other or same)


def uniformly(function):
    def aggregate(states, weights, scaling):
        return call(function, states, [1 / len(states)] * len(states), scaling)

    return aggregate


def call(function, states, weights, scaling):
    return function(*(states, weights, scaling)[: function.__code__.co_argcount])


def of_some(function, choose):
    """The function, given some of the clients only."""

    def aggregate(states, weights, scaling):
        chosen = choose(list(range(len(states))))
        total = sum(weights[i] for i in chosen)
        some = [states[i] for i in chosen]
        return call(function, some, [weights[i] / total for i in chosen], scaling)

    return aggregate


def first_times_weight(states, weights):
    return {n: weights[0] * v for n, v in states[0].items()}


def b_of_the_one_before(states, weights):
    common = means(A)(states, weights)
    return [
        {**common, **{n: v for n, v in states[i - 1].items() if n.endswith(B)}}
        for i in range(len(states))
    ]


def last_b(states, weights):
    return {**means(A)(states, weights), **{n: v for n, v in states[-1].items() if n.endswith(B)}}


def factors_mixed_by(suffix):
    def aggregate(states, weights):
        equal = [1 / len(states)] * len(states)
        return {n: summed(states, equal if n.endswith(suffix) else weights, n) for n in states[0]}

    return aggregate


WRONG: list[tuple[str, str, Any]] = [
    ("weights ignored", "fedsa", uniformly(means(A))),
    ("weights ignored", "flexlora", uniformly(lambda s, w: flexlora(s, w, 1.0))),
    ("sum for mean", "fedit", lambda s, w: means(A, B)(s, [1.0] * len(s))),
    ("sum for mean", "flora", lambda s, w, c: flora(s, [1.0] * len(s), c)),
    ("first client only", "fedit", lambda s: dict(s[0])),
    ("first client times its weight", "fedit", first_times_weight),
    ("last client wins", "fedit", lambda s: dict(s[-1])),
    ("first client dropped", "fedsa", of_some(means(A), lambda i: i[1:] or i)),
    ("last client dropped", "fedsa", of_some(means(A), lambda i: i[:-1] or i)),
    ("nothing is shared", "fedsa", lambda s: [dict(one) for one in s]),
    ("private factor averaged", "fedsa", means(A, B)),
    ("private factor averaged", "ffa", means(A, B)),
    ("private factor leaks", "fedsa", b_of_the_one_before),
    ("one private factor for all", "fedsa", last_b),
    ("weights on A only", "fedit", factors_mixed_by(B)),
    ("weights on B only", "fedit", factors_mixed_by(A)),
    ("weights on A only", "fedex", lambda s, w, c: fedex(s, w, c, uniform=[B])),
    ("scaling missing", "flora", flora_without_scaling),
    ("scaling missing", "fedex", lambda s, w: fedex(s, w, 1.0)),
    ("scaling twice", "fedex", lambda s, w, c: fedex(s, w, c * c)),
    ("no change of the frozen weight", "fedex", means(A, B)),
    ("change added twice", "fedex", lambda s, w, c: fedex(s, w, c, times=2.0)),
    ("change of the wrong sign", "fedex", lambda s, w, c: fedex(s, w, c, times=-1.0)),
    ("transposed change", "fedex", lambda s, w, c: fedex(s, w, c, turn=True)),
    ("product of the means", "flora", flora_of_means),
    ("product of the means", "flexlora", means(A, B)),
    ("one square root lost", "flexlora", lambda s, w, c: flexlora(s, w, c, lambda x, _c: x.sqrt())),
    (
        "singular values lost",
        "flexlora",
        lambda s, w, c: flexlora(s, w, c, lambda x, _c: torch.ones_like(x)),
    ),
    (
        "scaling left in the product",
        "flexlora",
        lambda s, w, c: flexlora(s, w, c, lambda x, c: x * c),
    ),
    ("V for V^T", "flexlora", lambda s, w, c: flexlora(s, w, c, transpose=True)),
]


@pytest.mark.parametrize(
    ("bug", "method", "function"), WRONG, ids=[f"{bug}, {method}" for bug, method, _ in WRONG]
)
def test_a_bug_is_named_and_no_other(bug: str, method: str, function: Any) -> None:
    verdict = examine(function, DEFINITIONS[method])
    assert not verdict.conforms
    assert [found.name for found in verdict.bugs] == [bug]


def test_every_class_is_shown_on_a_function() -> None:
    assert {bug.name for bug in BUGS} == {bug for bug, _, _ in WRONG}


def test_what_no_class_explains_is_not_given_a_name() -> None:
    verdict = examine(
        lambda s, w: {n: 1.01 * v for n, v in means(A)(s, w).items()}, DEFINITIONS["fedsa"]
    )
    assert not verdict.conforms and verdict.bugs == ()
    assert all(0.005 < found.difference < 0.02 for found in verdict.findings)


# --- side effects --------------------------------------------------------------------------------


def in_place(states: list[State], weights: list[float]) -> State:
    result = means(A)(states, weights)
    states[0].update(result)
    return result


def one_common(states: list[State], weights: list[float]) -> list[State]:
    """The same tensor of what is common for all clients, which does no harm."""
    common = means(A)(states, weights)
    return [{**common, **_own(states, i)} for i in range(len(states))]


def _own(states: list[State], client: int) -> State:
    return {n: v for n, v in states[client].items() if n.endswith(B)}


def one_storage(states: list[State], weights: list[float]) -> list[State]:
    """Values are right when they are returned, and all clients write to the same B."""
    common = means(A)(states, weights)
    place = {n: v.clone() for n, v in states[0].items() if n.endswith(B)}
    return [{**common, **(place if i else dict(place))} for i in range(len(states))]


class Keeping:
    """Keeps what it has seen: its second result is another."""

    def __init__(self) -> None:
        self.seen: list[State] = []

    def __call__(self, states: list[State]) -> State:
        self.seen += states
        return {
            n: sum(s[n] for s in self.seen) / len(self.seen) for n in states[0] if n.endswith(A)
        }


def test_side_effects_are_named() -> None:
    assert "it changes what it was given" in examine(in_place, DEFINITIONS["fedsa"]).side_effects[0]
    assert examine(one_common, DEFINITIONS["fedsa"]).conforms
    effects = examine(one_storage, DEFINITIONS["fedsa"]).side_effects
    assert any("same memory" in effect for effect in effects)
    effects = examine(Keeping(), DEFINITIONS["fedsa"]).side_effects
    assert any("a second call" in effect for effect in effects)


def test_a_function_that_looks_at_the_place_of_a_client_is_seen() -> None:
    def aggregate(states: list[State], weights: list[float]) -> State:
        count = len(states)
        tilted = [2 * (i + 1) / (count * (count + 1)) for i in range(count)]
        return means(A)(states, tilted)

    effects = examine(aggregate, DEFINITIONS["fedsa"]).side_effects
    assert effects == ("the order of the clients changes the result",)


# --- what is no answer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda s: None, "returned NoneType"),
        (lambda s: [dict(s[0])], "a list with one for each of the 3"),
        (lambda s: {"x": s[0]["layers.2.up" + A]}, "returned 'x'; the names are layers.2.up"),
        (lambda s: {"layers.2.up" + A: torch.zeros(2, 2)}, "has shape (2, 2); expected (2, 3)"),
        (
            lambda s: ({}, {"layers.2.up": torch.zeros(3, 5)}),
            "has shape (3, 5); expected (out, in)",
        ),
        (lambda s: 1 / 0, "the function raised ZeroDivisionError"),
    ],
)
def test_what_is_no_result_is_one_plain_message(function: Any, part: str) -> None:
    with pytest.raises(UserError) as caught:
        examine(function, DEFINITIONS["fedsa"])
    message = str(caught.value)
    assert message.startswith("the case 'three clients, equal weights': ") and part in message


# --- the command ---------------------------------------------------------------------------------

FILE = """
def right(states, weights):
    return {n: sum(w * s[n] for w, s in zip(weights, states)) for n in states[0] if "lora_A" in n}

def uniform(states):
    return {n: sum(s[n] for s in states) / len(states) for n in states[0] if "lora_A" in n}

number = 3
"""


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "repo.py").write_text(FILE)
    conformance.main([f"{tmp_path}/repo.py:right", "--method", "fedsa"])
    assert "right is fedsa, as far as these cases show" in capsys.readouterr().out
    out = tmp_path / "found.json"
    words = [f"{tmp_path}/repo.py:uniform", "--method", "fedsa", "--json", str(out)]
    with pytest.raises(SystemExit) as end:
        conformance.main(words)
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "bug: weights ignored (every client counts the same, whatever its p_i)" in said
    assert "is not fedsa: A = sum p_i A_i; B stays" in said
    found = json.loads(out.read_text())
    assert found["bugs"] == ["weights ignored"] and not found["conforms"]
    for word, part in (("repo.py:number", "a int, not a function"), ("repo.py", "FILE.py:FUNC")):
        with pytest.raises(UserError, match=part):
            conformance.main([f"{tmp_path}/{word}", "--method", "fedsa"])
