"""Classification heads of several clients as one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """fp32 weights that every client's head starts from, by their names within the module; those
    of ``others`` by their names within the model."""
    others: Mapping[str, StackedHead] = field(default_factory=dict)
    """Modules between backbone and head that are trained with it, by their names in the model:
    those of which the checkpoint holds nothing, such as BERT's pooler."""
    replaces_another: bool = False
    """Whether the checkpoint has a head of other classes."""

    @property
    def modules(self) -> list[str]:
        """Names within the model of all modules that are trained."""
        return [self.name, *self.others]

    def module_names(self) -> list[str]:
        """Names within the model of the modules that these consist of."""
        parts = {self.name: self.layer, **self.others}
        return [f"{name}.{inner}" for name, part in parts.items() for inner in part.module_names()]

    def full_name(self, weight: str) -> str:
        """Name within the model of a weight of ``initial``."""
        is_others = any(weight.startswith(f"{name}.") for name in self.others)
        return weight if is_others else f"{self.name}.{weight}"

    def bind(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use these weights from now on: (C, *shape) fp32 by the names of ``initial``."""
        rest = dict(weights)
        for name, part in self.others.items():
            own = [weight for weight in rest if weight.startswith(f"{name}.")]
            part.bind({weight.removeprefix(f"{name}."): rest.pop(weight) for weight in own})
        self.layer.bind(rest)
