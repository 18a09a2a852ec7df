"""The adapted linear layer: the factors of C clients stacked, one pass for all of them.

Shape suffixes: C clients, B rows of one client, T tokens, R LoRA rank, I in, O out.

    h = W0 x + gamma * B_c A_c x      for the rows of client c         (LoRA, arXiv 2106.09685)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sfed import lean


@dataclass
class PassContext:
    """What all adapted layers of a model need to know of the pass that is under way."""

    dropout_seeds: tuple[int, ...] | None = None
    """One seed per client of the pass; None = no dropout."""
    probe: Probe | None = None
    """Where the adapters' outputs are measured; None = nowhere."""


@dataclass
class Probe:
    """Measures the adapters' outputs gamma * B A x of one pass, row by row."""

    is_counted: torch.Tensor
    """(rows, T) bool: the tokens that count."""
    sum_squares: torch.Tensor
    """(rows,) sum over tokens and layers of the mean square over a layer's outputs."""
    count: torch.Tensor
    """(rows,) tokens times layers."""

    @staticmethod
    def of(is_counted: torch.Tensor) -> Probe:
        """A probe that has seen nothing yet."""
        nothing = torch.zeros(len(is_counted), device=is_counted.device)
        return Probe(is_counted, nothing, nothing.clone())

    def measure(self, output: torch.Tensor) -> None:
        """Add one layer's output, (rows, T, O); layers that see no tokens are left out."""
        if output.shape[:-1] == self.is_counted.shape:
            squares = output.float().square().mean(dim=-1)
            self.sum_squares += squares.where(self.is_counted, 0.0).sum(dim=1)
            self.count += self.is_counted.sum(dim=1)


class StackedLoraLinear(nn.Module):
    """A frozen linear layer with the low-rank adapters of C clients.

    The rows of a batch are those of client 0, then client 1, and so on, equally many for each; the
    adapters are a batched matrix product over the client dimension. The factors are fp32 and
    computed in the dtype of the input, which is never cast up.

    The layer does not own its factors: ``bind`` points it at rows of the flat client buffers.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        lora_scaling: float,
        dropout: float,
        layer_index: int,
        context: PassContext,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_scaling = lora_scaling
        self.dropout = dropout
        self._layer_index = layer_index
        self._context = context
        # Plain tensors, not parameters: neither DeepSpeed nor `parameters()` shall see them.
        self.a_CRI: torch.Tensor | None = None
        self.b_COR: torch.Tensor | None = None

    def bind(self, a_CRI: torch.Tensor, b_COR: torch.Tensor) -> None:
        """Use these factors from now on."""
        self.a_CRI, self.b_COR = a_CRI, b_COR

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W0 x + gamma B A x, with x of shape (C * B, T, I) or (C * B * T, I)."""
        y: torch.Tensor = self.base_layer(x)
        if self.a_CRI is None or self.b_COR is None:
            return y
        num_clients, _, in_features = self.a_CRI.shape
        recipe, x_CMI = lean.recipe_of(x), x.reshape(num_clients, -1, in_features)
        if self._context.dropout_seeds is not None:
            recipe, x_CMI = None, self._drop(x_CMI, self._context.dropout_seeds)
        y_CMO = y.reshape(num_clients, -1, self.b_COR.shape[1])
        a_CRI, b_COR = self.a_CRI.to(x.dtype), self.b_COR.to(x.dtype)
        factors = (x_CMI, a_CRI, b_COR, self.lora_scaling)
        added_CMO = lean.add_lora(y_CMO, *factors, recipe)
        if self._context.probe is not None:
            output_CMO = lean.add_lora(torch.zeros_like(y_CMO), *factors, None)
            self._context.probe.measure(output_CMO.reshape(y.shape))
        return added_CMO.reshape(y.shape)

    def _drop(self, x_CMI: torch.Tensor, seeds: tuple[int, ...]) -> torch.Tensor:
        """Inverted dropout whose masks are a function of each client's seed and this layer only.

        So a client's masks do not depend on who shares the pass, and a recomputation under
        gradient checkpointing draws the same ones.
        """
        keep = torch.empty_like(x_CMI)
        generator = torch.Generator(device=x_CMI.device)
        for client, seed in enumerate(seeds):
            generator.manual_seed((seed + 0x9E3779B97F4A7C15 * (self._layer_index + 1)) % 2**63)
            keep[client].bernoulli_(1.0 - self.dropout, generator=generator)
        return x_CMI * keep / (1.0 - self.dropout)
