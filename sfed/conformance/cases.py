"""Worked inputs of an aggregation: layers that are not square, unequal weights, names out of order.

Shapes: r LoRA rank, in and out of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

State = Mapping[str, torch.Tensor]
"""One client's factors: LAYER.lora_A.weight (r, in), LAYER.lora_B.weight (out, r), fp32."""

A, B = "lora_A.weight", "lora_B.weight"
_RANK = 2
# In alphabetical order 10 comes before 2; the square layer is one on which a transposed matrix
# has the right shape.
_SHAPES = {"layers.2.up": (3, 5), "layers.10.down": (5, 4), "layers.2.square": (4, 4)}
_SEED = 20260308


@dataclass(frozen=True)
class Case:
    """What the server is given in one round."""

    name: str
    """In words."""
    states: tuple[State, ...]
    """Of each client."""
    weights: tuple[float, ...]
    """p_i of each client, with the sum 1."""
    scaling: float
    """The factor s of B A."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(name.removesuffix(f".{A}") for name in self.states[0] if name.endswith(A))

    def with_weights(self, weights: Sequence[float]) -> Case:
        """The same clients with other weights."""
        return replace(self, weights=tuple(weights))

    def of_clients(self, chosen: Sequence[int]) -> Case:
        """Some of the clients, in this order; weights are divided by their sum."""
        total = sum(self.weights[i] for i in chosen)
        return replace(
            self,
            states=tuple(self.states[i] for i in chosen),
            weights=tuple(self.weights[i] / total for i in chosen),
        )


def product(state: State, layer: str) -> torch.Tensor:
    """B A of a layer: (out, in)."""
    return state[f"{layer}.{B}"] @ state[f"{layer}.{A}"]


def all_cases() -> list[Case]:
    """The inputs that every function is tried on."""
    clients = [_state(number) for number in range(3)]
    other_order = tuple(dict(reversed(list(state.items()))) for state in clients[1:])
    third = (1 / 3, 1 / 3, 1 / 3)
    unequal = (0.1, 0.2, 0.7)
    return [
        Case("three clients, equal weights", tuple(clients), third, 1.0),
        Case("three clients, weights 0.1, 0.2, 0.7", tuple(clients), unequal, 1.0),
        Case("scaling 2.5", tuple(clients), unequal, 2.5),
        Case("names in another order", (clients[0], *other_order), unequal, 2.5),
        Case("two clients", tuple(clients[:2]), (0.4, 0.6), 2.5),
        Case("one client", tuple(clients[:1]), (1.0,), 2.5),
        Case("three clients that are equal", (clients[0],) * 3, unequal, 2.5),
    ]


def _state(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_SEED + number)
    state: dict[str, torch.Tensor] = {}
    for layer, (in_features, out_features) in _SHAPES.items():
        state[f"{layer}.{A}"] = torch.randn(_RANK, in_features, generator=generator)
        state[f"{layer}.{B}"] = torch.randn(out_features, _RANK, generator=generator)
    return state
