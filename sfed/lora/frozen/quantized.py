"""Frozen linear layers whose weights are stored as codes of 4 or 8 bits (bitsandbytes).

Such a layer computes with its dequantised weight W, in the dtype of the model:

    h = W x + b        grad x = grad W

    nf4     W = value of a 4-bit code * largest |weight| of its 64    (QLoRA, arXiv 2305.14314)
    int8    W = 8-bit code * largest |weight| of its row / 127    (arXiv 2208.07339, threshold 0)

W is made once for the forward and once for the backward pass of a layer and is not kept. Inputs
are never quantised. The codes are parameters, which ZeRO-3 shards; the scales are not, and stay
whole on each process.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sfed.lora.frozen.linear import product
from sfed.lora.targets import num_weights, transformer_layers
from sfed.utils.errors import UserError

Scheme = Literal["nf4", "int8"]
NF4_BLOCK = 64
"""Weights that share a scale."""
_INT8_LARGEST = 127
# bitsandbytes makes fp16 numbers of weights before it quantises them to int8.
_LARGEST_FP16 = torch.finfo(torch.float16).max
LEAST_SHARE = 0.5
"""Below this share of a layer's weights, quantisation would not do what it is asked for."""


class Dequantiser(Protocol):
    """Makes the weight of a layer from its codes."""

    @property
    def scales(self) -> torch.Tensor:
        """All scales, fp32."""

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the (out, in) weight in the dtype of the model."""

    def to(self, device: torch.device) -> None:
        """Move the scales."""


class CodedLinear(nn.Linear, ABC):
    """A frozen linear layer that stores codes and scales in the place of its weight."""

    def __init__(
        self,
        sizes: tuple[int, int],
        codes: torch.Tensor,
        bias: nn.Parameter | None,
        *,
        was_transposed: bool = False,
    ) -> None:
        """Take over what a layer stores.

        Args:
            sizes: in and out.
            codes: integers of any shape.
            bias: (out,).
            was_transposed: whether the model's own layer is a Conv1D.
        """
        super().__init__(*sizes, bias=False, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("bias", bias)
        self.was_transposed = was_transposed

    @property
    @abstractmethod
    def scales(self) -> tuple[torch.Tensor, ...]:
        """All scales, fp32."""

    @property
    def num_codes(self) -> int:
        """Numbers of all parameters that hold codes."""
        return sum(weight.numel() for weight in self.parameters() if not weight.is_floating_point())


class QuantisedLinear(CodedLinear):
    """A layer of nf4 or int8 codes."""

    def __init__(
        self,
        sizes: tuple[int, int],
        codes: torch.Tensor,
        bias: nn.Parameter | None,
        dequantise: Dequantiser,
        *,
        was_transposed: bool = False,
    ) -> None:
        """Take over what a layer stores.

        Args:
            sizes: in and out.
            codes: nf4: (in * out / 2, 1) uint8; int8: (out, in) int8.
            bias: (out,).
            dequantise: makes the weight from the codes.
            was_transposed: whether the model's own layer is a Conv1D.
        """
        super().__init__(sizes, codes, bias, was_transposed=was_transposed)
        self.dequantise = dequantise

    @property
    def scales(self) -> tuple[torch.Tensor, ...]:
        """All scales, fp32."""
        return (self.dequantise.scales,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W x + b, with x of shape (..., in) in the dtype of the model."""
        return product(x, self.weight, self.bias, self.dequantise)


class _Nf4:
    """The dequantiser of bitsandbytes, with its state of a weight."""

    def __init__(self, state: Any) -> None:
        self._state = state

    @property
    def scales(self) -> torch.Tensor:
        scales: torch.Tensor = self._state.absmax
        return scales

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = dequantize_4bit(codes, self._state)
        return weight

    def to(self, device: torch.device) -> None:
        self._state.to(device)


@dataclass
class _Int8:
    """code * scale of its row, in fp32 and then rounded to the dtype."""

    scales: torch.Tensor
    """(out, 1) fp32."""
    dtype: torch.dtype

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(self.dtype).mul_(self.scales)  # a code is exact in every dtype

    def to(self, device: torch.device) -> None:
        self.scales = self.scales.to(device)


@dataclass
class _StandIn:
    """Zeros of the weight's size: for models that are counted and not computed."""

    shape: tuple[int, int]
    dtype: torch.dtype
    scales: torch.Tensor

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=codes.device)

    def to(self, device: torch.device) -> None:
        self.scales = self.scales.to(device)


# --- which layers -------------------------------------------------------------------------------


def _linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Names of all layers of the model that can be quantised, with in and out."""
    found = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            found[name] = (module.in_features, module.out_features)
        elif type(module) is Conv1D:
            found[name] = (module.nx, module.nf)
    return found


def _within_layers(model: PreTrainedModel) -> set[nn.Module]:
    """All modules of the layers that the transformer repeats."""
    return {module for layer in transformer_layers(model) for module in layer.modules()}


def chosen_layers(model: PreTrainedModel, scheme: Scheme) -> dict[str, tuple[int, int]]:
    """The layers whose weights are quantised, with in and out: linear ones within the transformer.

    Embeddings, the output head, classification heads and poolers are outside of it.

    Raises:
        UserError: where the model has no list of layers, or most weights of its layers are not
            those of linear layers.
    """
    key = f"model.quantization = {scheme!r}"
    chosen = linear_within(model, key, "set model.quantization=none")
    if (share := share_of(model, chosen)) < LEAST_SHARE:
        raise UserError(
            f"{key}: only {100 * share:.0f} % of the weights in the layers of "
            f"{type(model).__name__} are those of linear layers (most are in "
            f"{_largest_other(_within_layers(model), chosen, model)}), and no others are "
            "quantised; set model.quantization=none, and backbone.sharding=zero3 where memory is "
            "short"
        )
    return chosen


def linear_within(model: PreTrainedModel, key: str, remedy: str) -> dict[str, tuple[int, int]]:
    """Names of the linear layers within the transformer, with in and out.

    Args:
        model: before it is changed.
        key: and its value, for the error.
        remedy: likewise.

    Raises:
        UserError: where the model has no list of layers.
    """
    inside = _within_layers(model)
    if not inside:
        raise UserError(
            f"{key}: {type(model).__name__} has no list of as many layers as its configuration "
            f"tells, so it is not known which weights to quantise; {remedy}"
        )
    return {
        name: sizes
        for name, sizes in _linear_layers(model).items()
        if model.get_submodule(name) in inside
    }


def share_of(model: PreTrainedModel, chosen: Mapping[str, tuple[int, int]]) -> float:
    """The share that layers have of all weights within the transformer."""
    total = sum(map(num_weights, transformer_layers(model)))
    return sum(math.prod(sizes) for sizes in chosen.values()) / max(1, total)


def linear_outside_codes(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers within the transformer that store no codes."""
    inside = _within_layers(model)
    return [name for name in _linear_layers(model) if model.get_submodule(name) in inside]


def _largest_other(inside: set[nn.Module], chosen: Any, model: nn.Module) -> str:
    """The kind of module within the layers that holds most of the weights that stay."""
    taken = {model.get_submodule(name) for name in chosen}
    sizes: Counter[str] = Counter()
    for module in inside - taken:
        own = module.parameters(recurse=False)
        sizes[type(module).__name__] += sum(weight.numel() for weight in own)
    return sizes.most_common(1)[0][0]


# --- loading ------------------------------------------------------------------------------------


def loading_settings(
    model: PreTrainedModel, scheme: Scheme, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """What ``from_pretrained`` is told, so that it quantises each weight as it reads it.

    Args:
        model: the model on the meta device, before it is changed.
        scheme: of the codes.
        dtype: of the model.
    """
    chosen = chosen_layers(model, scheme)
    others = [f"^{re.escape(name)}$" for name in _linear_layers(model) if name not in chosen]
    if scheme == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=others
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others,
    )


def take_over(model: PreTrainedModel, device: torch.device) -> None:
    """Put ``QuantisedLinear`` in the place of bitsandbytes' layers, which share their memory.

    Theirs of int8 quantise inputs on a GPU, keep a second reference to the codes, and warn on each
    call.

    Args:
        model: as it was loaded; changed in place.
        device: where passes are computed; the scales are moved there.

    Raises:
        UserError: where a weight is not finite or too large for int8, or was not quantised.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            dequantise: Dequantiser = _Nf4(module.weight.quant_state)
        elif isinstance(module, Linear8bitLt):
            scales = module.weight.SCB.float().view(-1, 1) / _INT8_LARGEST
            dequantise = _Int8(scales, model.dtype)
        else:
            continue
        if not dequantise.scales.isfinite().all():
            raise UserError(
                f"model.quantization: weights of the layer {name} are not finite, or larger than "
                f"the {_LARGEST_FP16:g} that int8 allows; set model.quantization=none"
            )
        dequantise.to(device)
        layer = QuantisedLinear(
            (module.in_features, module.out_features),
            module.weight.data,
            module.bias,
            dequantise,
            was_transposed=issubclass(module.source_cls, Conv1D),
        )
        model.set_submodule(name, layer)
    model.hf_quantizer.remove_quantization_config(model)
    if left := linear_outside_codes(model):
        raise UserError(
            f"model.quantization: transformers keeps {left[0]} of {type(model).__name__} in a "
            "dtype of its own and does not quantise it; set model.quantization=none"
        )


# --- counting -----------------------------------------------------------------------------------


def put_stand_ins(model: PreTrainedModel, scheme: Scheme, dtype: torch.dtype) -> None:
    """Let a model that is only counted store what a quantised one stores, in place."""
    for name, (width, height) in chosen_layers(model, scheme).items():
        module = model.get_submodule(name)
        device = module.weight.device
        if scheme == "int8":
            codes = torch.zeros((height, width), dtype=torch.int8, device=device)
            num_scales = height
        else:
            codes = torch.zeros((-(-width * height // 2), 1), dtype=torch.uint8, device=device)
            num_scales = -(-width * height // NF4_BLOCK)
        scales = torch.zeros(num_scales, device="meta")
        stand_in = _StandIn((height, width), dtype, scales)
        layer = QuantisedLinear((width, height), codes, module.bias, stand_in)
        model.set_submodule(name, layer)


def summary(model: PreTrainedModel, scheme: str) -> str | None:
    """Say which weights are stored as codes; None where none is.

    Args:
        model: the backbone.
        scheme: nf4 or int8, or none.
    """
    layers = [layer for _, layer in quantised_layers(model)]
    if not layers or scheme == "none":
        return None
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"quantization: {scheme} codes for the {weights:,} weights of {len(layers)} linear layers, "
        f"{dtype} for all others"
    )


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, CodedLinear]]:
    """The layers that store codes, by their names."""
    for name, module in model.named_modules():
        if isinstance(module, CodedLinear):
            yield name, module


def total_weights(model: nn.Module) -> int:
    """Weights of a model that is not sharded, however they are stored; shared ones count once."""
    packed = sum(
        math.prod((layer.in_features, layer.out_features)) - layer.num_codes
        for _, layer in quantised_layers(model)
    )
    return packed + sum(weight.numel() for weight in model.parameters())


@dataclass(frozen=True)
class Stored:
    """What frozen weights take."""

    numbers: int
    """Weights in the dtype of the model."""
    code_bytes: int
    scale_bytes: int
    """Of quantised weights; every process holds all scales."""

    @staticmethod
    def of(module: nn.Module) -> Stored:
        """Count a module that is not sharded."""
        weights = list(module.parameters())
        return Stored(
            sum(weight.numel() for weight in weights if weight.is_floating_point()),
            sum(weight.nbytes for weight in weights if not weight.is_floating_point()),
            sum(one.nbytes for _, layer in quantised_layers(module) for one in layer.scales),
        )

    def sharded_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of what ZeRO-3 shards."""
        return self.numbers * dtype.itemsize + self.code_bytes

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all of it in this dtype."""
        return self.sharded_bytes(dtype) + self.scale_bytes
