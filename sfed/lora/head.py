"""Classification heads of several clients as one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, vmap


class StackedHead(nn.Module):
    """A model's classification head with the weights of C clients: each client's own for its rows.

    Any module of linear layers and activations will do. It does not own its weights either.
    """

    def __init__(self, template: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: neither PEFT nor DeepSpeed shall see it.
        self._template = (template.eval(),)
        self.weights: Mapping[str, torch.Tensor] = {}

    def bind(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use these weights from now on: (C, *shape) fp32 by the template's own names."""
        self.weights = weights

    def module_names(self) -> list[str]:
        """Names of the modules that the head consists of, within it."""
        return [name for name, _ in self._template[0].named_modules() if name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the head's outputs for x of shape (C * B, ...): (C * B, ...)."""
        weights = {name: stacked.to(x.dtype) for name, stacked in self.weights.items()}
        num_clients = next(iter(weights.values())).shape[0]

        def of_one_client(one: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = functional_call(self._template[0], one, (x,))
            return output

        y: torch.Tensor = vmap(of_one_client)(weights, x.reshape(num_clients, -1, *x.shape[1:]))
        return y.flatten(0, 1)


@dataclass(frozen=True)
class Head:
    """A classification head that was taken off the backbone."""

    name: str
    """Name of the module within the model."""
    layer: StackedHead
    initial: Mapping[str, torch.Tensor]
    """fp32 weights that every client's head starts from, by their names within the module."""
