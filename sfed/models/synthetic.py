"""Models of a given shape with random weights: enough to measure speed with.

P_mm = weights of all matrix products of a pass. A step on a frozen model costs 4 P_mm FLOPs a token
(forward 2, gradients of inputs 2, none of weights).
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sfed.config.load import validate
from sfed.models.hf_config import read_model_config
from sfed.models.shapes import SHAPES
from sfed.utils.errors import UserError

_STD = 0.02


def model_config(name: str, folder: Path | None, num_layers: int | None) -> PreTrainedConfig:
    """The shape of the model.

    Args:
        name: of a shape of ours.
        folder: of a config.json that is used instead.
        num_layers: so many of its layers; None = all.

    Raises:
        UserError: where the folder holds no configuration of a language model.
    """
    if folder is None:
        config: PreTrainedConfig = LlamaConfig(**SHAPES[name])
    else:
        place = str(folder.resolve())
        config = read_model_config(validate({"model": {"name": place}}), place)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise UserError(
                f"--model-config {folder}: {type(config).__name__} has no causal language model"
            )
    if num_layers is not None:
        config = with_layers(config, num_layers)
    return config


def with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Return the same shape with another number of layers."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):  # named one by one in newer architectures
        text.layer_types = [text.layer_types[i % len(text.layer_types)] for i in range(num_layers)]
    return changed


def build(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    *,
    blank: bool = False,
) -> PreTrainedModel:
    """Make a frozen model where it will be used, without a copy in fp32 or on the host.

    Args:
        config: its shape.
        dtype: of the weights.
        seed: of the random weights.
        device: of the weights.
        blank: leave all weights 0: enough for counting, and nearly free on a CPU.
    """
    with torch.device(device), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=None
        )
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False
    model.name_or_path = "bench"  # PEFT asks the model for it, and warns where they differ
    if blank:
        fill_with_zeros(model)
    else:
        _randomise(model, seed)
    return model.train()


def fill_with_zeros(model: nn.Module) -> None:
    """Put zeros in the place of all weights, which a CPU only stores when something is written."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            # zeros_like would write.
            zeros = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))


def _randomise(model: nn.Module, seed: int) -> None:
    """Fill matrices from a normal distribution of 0.02, as transformers does; vectors with 1."""
    for number, weight in enumerate(model.parameters()):
        generator = torch.Generator(weight.device).manual_seed(seed * 10_007 + number)
        if weight.dim() > 1:
            weight.normal_(0.0, _STD, generator=generator)
        else:
            weight.fill_(1.0)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the very same weights, which may be changed into something else."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def matmul_weights(model: PreTrainedModel) -> int:
    """P_mm: weights of all linear layers, the head's included."""
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in linear)
