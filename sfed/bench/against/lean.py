"""The leanest loop that a good engineer writes by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sfed.bench.against.material import Material
from sfed.bench.against.rounds import OneByOne, average, padded_labels
from sfed.bench.steps import GAMMA
from sfed.data.batches import IGNORED_LABEL
from sfed.data.tokenize import Row


class Lean(OneByOne):
    """The leanest loop that a good engineer writes by hand.

    One frozen model whose linear layers add the factors of the client at work; the rows of a step
    padded to the longest; logits of the learned tokens only; torch's fused AdamW.
    """

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        job, model = material.job, material.model
        names = [piece.layer for piece in material.layout.pieces if piece.factor == "A"]
        self._layers = {name: LeanLinear(model.get_submodule(name)) for name in names}
        for name, layer in self._layers.items():
            model.set_submodule(name, layer)
        self._factors = [self._new_factors() for _ in range(job.num_clients)]
        train = job.config.train
        self._optimizers = [
            torch.optim.AdamW([*a, *b], lr=train.lr, weight_decay=train.weight_decay, fused=True)
            for a, b in self._factors
        ]

    def _new_factors(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        first = self.material.first_values
        a, b = ([nn.Parameter(first(name, f)) for name in self._layers] for f in "AB")
        return a, b

    def train(self, client: int, position: int) -> float:
        """Swap the client's factors in and make its steps."""
        job, device = self.material.job, self.material.world.device
        a, b = self._factors[client]
        for layer, *factors in zip(self._layers.values(), a, b, strict=True):
            layer.a, layer.b = factors
        optimizer, most = self._optimizers[client], job.config.train.max_grad_norm
        loss_sum, count = torch.zeros((), device=device), 0
        for step in range(job.steps):
            rows = self.material.batch(client, position + step * job.rows)
            ids, places, targets = (part.to(device) for part in _padded(rows))
            loss = self._loss(ids, places, targets)
            torch.autograd.backward(loss)
            if most is not None:
                nn.utils.clip_grad_norm_([*a, *b], most, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum, count = loss_sum + loss.detach() * len(targets), count + len(targets)
        return float(loss_sum) / count

    def _loss(self, ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        model = self.material.model
        hidden = model.base_model(input_ids=ids).last_hidden_state
        logits = model.get_output_embeddings()(hidden.flatten(0, 1)[places])
        return functional.cross_entropy(logits.float(), targets)

    def average(self) -> None:
        """Take the mean of all A."""
        average([a for a, _ in self._factors])

    def factor(self, client: int, layer: str, factor: str) -> torch.Tensor:
        """A client's factor of a layer."""
        of_factor = self._factors[client]["AB".index(factor)]
        return of_factor[list(self._layers).index(layer)].detach()


class LeanLinear(nn.Module):
    """A frozen linear layer and the factors of one client."""

    a: torch.Tensor
    b: torch.Tensor

    def __init__(self, frozen: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen

    def __setattr__(self, name: str, value: Any) -> None:
        """Let factors come and go without being registered as the module's own."""
        if name in "ab":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The frozen product and gamma B A x."""
        a, b = self.a.to(inputs.dtype), self.b.to(inputs.dtype)
        added = functional.linear(functional.linear(inputs, a), b)
        output: torch.Tensor = self.frozen(inputs)
        return output + GAMMA * added


def _padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as long as the longest: ids, the flat places that predict, what they predict."""
    ids, labels = padded_labels(rows)
    places = torch.nonzero(labels[:, 1:] != IGNORED_LABEL)
    return ids, places[:, 0] * ids.shape[1] + places[:, 1], labels[places[:, 0], places[:, 1] + 1]
