"""Frozen linear layers whose products are computed in FP8, with torch's scaled products.

    h = Q(x) Q(W)^T + b        grad x = Q(grad) Q(W^T)^T

Q rounds to e4m3 (torch.float8_e4m3fn, largest value 448) with an fp32 scale per row:

    Q(x)[i, :] = scale_i * e4m3(x[i, :] / scale_i)        scale_i = max |x[i, :]| / 448

A row of x is a token, so no token changes the rounding of another one, nor a client that of another
client: a scale of the whole tensor would. W and W^T are quantised once, when the model is loaded; a
row of W is an output, a row of W^T an input. Their products accumulate in fp32 and are rounded to
the dtype of x. Adapters, biases, norms, embeddings and heads are not in FP8.

A plain product of two float8 tensors is not refused by torch and is wrong by large factors. So
codes are stored as bytes, and only ``_scaled_product`` reads them as float8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sfed.kernels.interface import Quantise, Quantised
from sfed.kernels.plain.quantise import CODES, quantise
from sfed.lora.frozen.quantized import (
    LEAST_SHARE,
    CodedLinear,
    linear_outside_codes,
    linear_within,
    share_of,
)
from sfed.utils.errors import UserError
from sfed.utils.text import counted, one_line

MULTIPLE = 16
"""Sizes of a product must be multiples of it in torch's kernels for GPUs."""
_KEY, _OFF = "backbone.compute = 'fp8'", "set backbone.compute=full"
_CAPABILITY = (8, 9)  # of Ada, the first GPUs with FP8 products
_DTYPES = (torch.float32, torch.bfloat16)
# Of the largest number of a product: two roundings to bf16.
_PROBE_TOLERANCE = 2.0**-7


class Fp8Linear(CodedLinear):
    """A frozen linear layer that stores the codes of W and of W^T: a byte a weight each."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: nn.Parameter | None,
        *,
        was_transposed: bool = False,
        rounding: Quantise = quantise,
    ) -> None:
        """Quantise a weight.

        Args:
            weight: (out, in); sizes are multiples of ``MULTIPLE``. On the meta device codes and
                scales are there too.
            bias: (out,).
            was_transposed: whether the model's own layer is a Conv1D.
            rounding: quantises inputs and gradients.
        """
        codes, scales = quantise(weight.detach())
        back, back_scales = quantise(weight.detach().t())
        sizes = (weight.shape[1], weight.shape[0])
        super().__init__(sizes, codes.view(torch.uint8), bias, was_transposed=was_transposed)
        self.transposed = nn.Parameter(back.view(torch.uint8), requires_grad=False)
        """(in, out) uint8: codes of W^T."""
        self.rounding = rounding
        self.register_buffer("row_scales", scales.view(1, -1), persistent=False)
        self.register_buffer("column_scales", back_scales.view(1, -1), persistent=False)

    @property
    def scales(self) -> tuple[torch.Tensor, ...]:
        """(1, out) of W and (1, in) of W^T, fp32."""
        return self.row_scales, self.column_scales  # type: ignore[return-value]

    def forward(self, x: torch.Tensor, quantised: Quantised | None = None) -> torch.Tensor:
        """Return Q(x) Q(W)^T + b, with x of shape (..., in), bf16 or fp32.

        Args:
            x: the input.
            quantised: codes and scales of x, where another layer has read it; see ``outputs_of``.
        """
        quantised = self.quantise(x) if quantised is None else quantised
        product: torch.Tensor = _Fp8Product.apply(self, x, quantised)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias

    def quantise(self, x: torch.Tensor) -> Quantised:
        """Quantise the rows of an input, or of a gradient, of any shape.

        Args:
            x: (..., width), bf16 or fp32.

        Returns:
            (M, width) codes and (M, 1) scales, M rows in all.
        """
        if x.dtype not in _DTYPES:
            raise TypeError(f"an FP8 layer takes bf16 and fp32, not {x.dtype}")
        return self.rounding(x.detach().reshape(-1, x.shape[-1]))


def outputs_of(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Call frozen layers that read the same x; for those in FP8 it is quantised once.

    Args:
        layers: of any kind.
        x: their input, (..., in).
    """
    in_fp8 = [layer for layer in layers if isinstance(layer, Fp8Linear)]
    quantised = in_fp8[0].quantise(x) if in_fp8 else None
    return [layer(x, quantised) if layer in in_fp8 else layer(x) for layer in layers]


class _Fp8Product(Function):
    """Saves the codes and scales of W^T, which the layer holds anyway."""

    @staticmethod
    def forward(ctx: Any, layer: Fp8Linear, x: torch.Tensor, quantised: Quantised) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(layer.transposed, layer.scales[1])
        return _product(quantised, (layer.weight, layer.scales[0]), x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), grad_x = grads, None
        if ctx.needs_input_grad[1]:
            grad_x = _product(ctx.layer.quantise(grad), ctx.saved_tensors, grad)
        return None, grad_x, None


def defined_product(rows: Quantised, columns: Quantised) -> torch.Tensor:
    """What a scaled product is by definition: that of the dequantised numbers, in fp32.

    Args:
        rows: codes (M, width) and scales (M, 1).
        columns: codes (N, width) and scales (N, 1).

    Returns:
        (M, N) fp32.
    """
    one, other = (codes.float() * scales for codes, scales in (rows, columns))
    return one @ other.t()


def _product(rows: Quantised, stored: Quantised, like: torch.Tensor) -> torch.Tensor:
    """Rows times the transpose of a stored matrix, in the dtype and shape of what was quantised.

    Args:
        rows: (M, width) codes and (M, 1) scales.
        stored: (N, width) uint8 codes and (1, N) scales.
        like: (..., width), M rows.
    """
    output = _scaled_product(*rows, *stored, like.dtype)
    return output.view(*like.shape[:-1], output.shape[-1])


def _scaled_product(
    codes: torch.Tensor,
    row_scales: torch.Tensor,
    stored: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch._scaled_mm(
        codes, stored.view(CODES).t(), scale_a=row_scales, scale_b=scales, out_dtype=dtype
    )


# --- which layers -------------------------------------------------------------------------------


def chosen_layers(model: PreTrainedModel) -> list[str]:
    """The layers that compute in FP8: linear ones within the transformer, of sizes that are fit.

    Raises:
        UserError: where the model has no list of layers, or most weights of its layers are in
            others.
    """
    within = linear_within(model, _KEY, _OFF)
    chosen = {
        name: sizes for name, sizes in within.items() if not any(size % MULTIPLE for size in sizes)
    }
    if (share := share_of(model, chosen)) < LEAST_SHARE:
        raise UserError(
            f"{_KEY}: only {100 * share:.0f} % of the weights in the layers of "
            f"{type(model).__name__} are those of linear layers with sizes that are multiples of "
            f"{MULTIPLE}, and no others can be computed in FP8; {_OFF}"
        )
    return list(chosen)


def convert(model: PreTrainedModel, rounding: Quantise = quantise) -> None:
    """Put ``Fp8Linear`` in the place of all chosen layers, one after the other.

    Args:
        model: frozen, on the device that computes, or on the meta device; changed in place.
        rounding: quantises inputs and gradients of the layers.

    Raises:
        UserError: where there is little to convert, or a weight is not finite.
    """
    for name in chosen_layers(model):
        module = model.get_submodule(name)
        is_conv = isinstance(module, Conv1D)
        weight = module.weight.t() if is_conv else module.weight
        layer = Fp8Linear(weight, module.bias, was_transposed=is_conv, rounding=rounding)
        model.set_submodule(name, layer)


def refuse_nonfinite(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        UserError: naming the layer.
    """
    for name, layer in fp8_layers(model):
        if not all(scales.isfinite().all() for scales in layer.scales):
            raise UserError(f"{_KEY}: weights of the layer {name} are not finite; {_OFF}")


def fp8_layers(model: nn.Module) -> list[tuple[str, Fp8Linear]]:
    """The layers that compute in FP8, by their names."""
    return [(name, one) for name, one in model.named_modules() if isinstance(one, Fp8Linear)]


def summary(model: PreTrainedModel) -> str | None:
    """Say which layers compute in FP8 and which stay as they are; None where none does."""
    layers = [layer for _, layer in fp8_layers(model)]
    if not layers:
        return None
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    dtype, left = str(model.dtype).removeprefix("torch."), len(linear_outside_codes(model))
    sizes = f"with sizes that are no multiples of {MULTIPLE}"
    others = f"; {dtype} for {counted(left, 'linear layer')} {sizes}" if left else ""
    return (
        f"compute: FP8 products (e4m3, a scale per row) for the {weights:,} weights of "
        f"{counted(len(layers), 'linear layer')}, in training and evaluation{others}"
    )


# --- which devices ------------------------------------------------------------------------------


def refuse_device(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device that lacks these products.

    A small product is computed on it and compared with its definition.

    Args:
        device: that computes.
        dtype: of the model.

    Raises:
        UserError: saying what is missing.
    """
    reason = None
    if device.type == "cuda":
        is_amd = torch.version.hip is not None
        name, capability = (
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
        )
        reason = lack_of_gpu(name, None if is_amd else capability, dtype)
    if reason := reason or _lack_of_products(device, dtype):
        raise UserError(f"{_KEY}: {reason}; {_OFF}")


def lack_of_gpu(name: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> str | None:
    """Why a GPU cannot compute FP8 products as defined here; None where it can.

    Args:
        name: of the GPU.
        capability: of CUDA; None = it is no GPU of NVIDIA.
        dtype: of the model.
    """
    least = ".".join(map(str, _CAPABILITY))
    if capability is None:
        return f"{name} is no GPU of NVIDIA, and this is not tried on others"
    if capability < _CAPABILITY:
        has = ".".join(map(str, capability))
        return f"{name} has compute capability {has}, and FP8 products need {least}"
    if dtype != torch.bfloat16:
        return "torch's scaled products on GPUs give bf16, and model.dtype is fp32; set it to bf16"
    return None


def _lack_of_products(device: torch.device, dtype: torch.dtype) -> str | None:
    """What a small product says."""
    numbers = torch.linspace(-2.0, 3.0, 5 * 32, device=device).view(5, 32)
    weight = torch.linspace(1.0, -4.0, 16 * 32, device=device).view(16, 32)
    rows, columns = quantise(numbers.to(dtype)), quantise(weight)
    try:
        found = _scaled_product(
            *rows, columns[0].view(torch.uint8), columns[1].view(1, -1), dtype
        ).float()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"torch {torch.__version__} has no such product on {device}: {one_line(error, 200)}"
    expected = defined_product(rows, columns)
    apart = float((found - expected).abs().max() / expected.abs().max())
    if apart <= _PROBE_TOLERANCE:
        return None
    return f"torch {torch.__version__} gives wrong products on {device}, {apart:.2g} apart"
