"""A model and the adapters on it in numbers, without memory for either."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from sfed.config.clients import largest_rank
from sfed.config.schema import Config
from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.lora.frozen.quantized import Stored
from sfed.lora.head import Head
from sfed.methods.by_layer import layer_shapes
from sfed.models import heads, synthetic
from sfed.models.hf_config import MetaModel


@dataclass(frozen=True)
class ModelCounts:
    """A model and the adapters on it, in numbers."""

    num_weights: int
    stored: Stored
    """What the weights take."""
    matmul_weights: int
    """P_mm: of all matrix products of a pass, the vocabulary's head included."""
    a_numbers: int
    """Parameters of A of one client."""
    b_numbers: int
    head_numbers: int
    """Parameters of a classification head; 0 where there is none."""
    adapted_weights: int
    """Weights of the adapted layers."""
    targets: tuple[str, ...]
    """Names of the adapted layers, without the number of the transformer's layer."""

    @property
    def numbers(self) -> int:
        """Parameters of a client's row."""
        return self.a_numbers + self.b_numbers + self.head_numbers


def counts_of(config: Config, meta: MetaModel) -> ModelCounts:
    """Count weights and the parameters of the adapters, without memory for either.

    The adapters are attached to the meta model, so this is done once.

    Raises:
        UserError: where a target of the adapters does not exist.
    """
    num_weights, stored, model = meta.num_weights, meta.stored, meta.model
    matmul_weights = synthetic.matmul_weights(model)
    head_numbers = 0
    for name in heads.modules_of(config, model):  # as if they had been taken off
        head = model.get_submodule(name)
        head_numbers += sum(weight.numel() for weight in head.parameters())
        model.set_submodule(name, nn.Identity())
    attached = attach(config, model, None, config.lora.target_modules, largest_rank(config))
    columns = [attached.layout.columns(factor) for factor in ("A", "B")]
    a_numbers, b_numbers = (some.stop - some.start for some in columns)
    targets = {re.sub(r"^.*\.\d+\.", "", name) for name in attached.layers}
    adapted = sum(out * width for out, width in layer_shapes(attached.layout).values())
    return ModelCounts(
        num_weights,
        stored,
        matmul_weights,
        a_numbers,
        b_numbers,
        head_numbers,
        adapted,
        tuple(sorted(targets)),
    )


def attach(
    config: Config,
    model: PreTrainedModel,
    head: Head | None,
    targets: tuple[str, ...] | str,
    lora_rank: int,
) -> Adapters:
    """Put the trainer's layers into a model that is there to be counted only."""
    return adapters.attach(
        model, LoraSpec(lora_rank, 1.0, config.lora.dropout, targets, "trial"), head
    )
