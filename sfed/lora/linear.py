"""The adapted linear layer: the factors of C clients stacked, one pass for all of them.

Shape suffixes: C clients, M rows of one client (its sequences' tokens), R LoRA rank, I in, O out.

    h = W0 x + gamma * B_c A_c x      for the rows of client c         (LoRA, arXiv 2106.09685)

Clients of different LoRA ranks have each its own gamma and zeros in the last rows of A and the last
columns of B. The gradients of these zeros are 0: each is a product with the other factor's zeros.

Layers that read the same x (q, k, v; gate, up) are computed together: their A are one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from sfed.kernels.interface import Dropout, DropoutMask
from sfed.kernels.plain.dropout import dropout
from sfed.lora.factors import Factors
from sfed.lora.frozen.fp8 import outputs_of
from sfed.lora.ops import recipe_of
from sfed.utils.rng import mixed


@dataclass
class PassContext:
    """What all adapted layers of a model need to know of the pass that is under way."""

    token_keys: torch.Tensor | None = None
    """(C * rows, tokens) int64 on the device: what a token's dropout masks follow from; None = no
    dropout."""
    dropout: Dropout = dropout
    """What drops."""
    probe: Probe | None = None
    """Where the adapters' outputs are measured; None = nowhere."""
    dtype: torch.dtype = torch.float32
    """The model's dtype, to which factors are cast for a pass."""


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

    The layer does not own its factors: ``Siblings.bind`` points it at rows of the flat buffers.
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
        self.context = context
        self.factors: Factors | None = None
        self.siblings = Siblings((self,))
        self.weight_reads = 0
        """How often the model has read the weight; one that reads it in the place of a call gets
        no adapter."""
        self._layer_word = mixed(layer_index + 1)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for models that look at its dtype."""
        self.weight_reads += 1
        weight = self.base_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W0 x + gamma B A x, with x of shape (C * B, T, I) or (C * B * T, I)."""
        (y,) = project(x, (self,))
        return y

    def dropout_of(self, x: torch.Tensor) -> Drop | None:
        """Inverted dropout; masks are a function of the token's key, the layer and the number.

        So a client's masks do not depend on who shares the pass, on how far its examples are
        padded or on how they lie in rows; and a recomputation has the same ones. Without keys
        nothing is dropped.

        Args:
            x: (C * B, T, I) or (C * B * T, I). Of another shape, in which a layer does not tell
                tokens apart, a client's mask depends on the shape too.
        """
        keys = self.context.token_keys
        if keys is None:
            return None
        mask = DropoutMask(self._keys_of(x, keys), self.dropout, self._layer_word)
        return partial(self.context.dropout, mask)

    def _keys_of(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The key of each vector of x: (V,) int64."""
        count = x.shape[:-1].numel()
        if count == keys.numel():
            return keys.view(-1)
        assert self.factors is not None
        clients = len(self.factors.rows.values_CN)
        first = keys.view(clients, -1)[:, :1]
        return (first + torch.arange(count // clients, device=x.device)).view(-1)


class Siblings:
    """Adapted layers of one module that read the same input, and their factors."""

    def __init__(self, layers: tuple[StackedLoraLinear, ...]) -> None:
        self.layers = layers
        self.factors: Factors | None = None
        for layer in layers:
            layer.siblings = self

    def bind(self, factors: Factors) -> None:
        """Use these factors from now on; in the order of the layers."""
        self.factors = factors
        for place, layer in enumerate(self.layers):
            layer.factors = factors.only(place)


def project(x: torch.Tensor, layers: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
    """Return W0 x + gamma B A x of layers that read the same x; W0 x of those without adapters.

    Args:
        x: (C * B, T, I) or (C * B * T, I).
        layers: linear layers, adapted or not.
    """
    frozen = [
        layer.base_layer if isinstance(layer, StackedLoraLinear) else layer for layer in layers
    ]
    outputs = dict(zip(layers, outputs_of(frozen, x), strict=True))
    for adapted in _computed_together(layers):
        first = adapted[0]
        factors = first.factors if len(adapted) == 1 else first.siblings.factors
        if factors is not None:
            term = LoraTerm(factors, first.lora_scaling, first.dropout_of(x))
            if x.requires_grad and term.drop is None:
                term.later = _InputGradient()
                x.register_hook(term.later)  # type: ignore[no-untyped-call]
            added = add_lora(tuple(outputs[layer] for layer in adapted), x, term)
            outputs.update(zip(adapted, added, strict=True))
    for layer in layers:
        _measure(layer, x)
    return tuple(outputs.values())


def _computed_together(layers: Sequence[nn.Module]) -> list[tuple[StackedLoraLinear, ...]]:
    """All siblings at once, or one by one where some are missing or each has dropout masks."""
    adapted = tuple(layer for layer in layers if isinstance(layer, StackedLoraLinear))
    has_masks = bool(adapted) and adapted[0].context.token_keys is not None
    if adapted and adapted == adapted[0].siblings.layers and not has_masks:
        return [adapted]
    return [(layer,) for layer in adapted]


def _measure(layer: nn.Module, x: torch.Tensor) -> None:
    """Show the adapter's output to the probe, where there is one."""
    if isinstance(layer, StackedLoraLinear) and layer.factors and layer.context.probe:
        a_CRI, (b_COR,) = layer.factors.in_dtype(x.dtype)
        xa_CMR = torch.bmm(x.reshape(len(a_CRI), -1, x.shape[-1]), a_CRI.transpose(1, 2))
        gammas_C11 = layer.factors.rows.gammas_C11
        gamma = layer.lora_scaling if gammas_C11 is None else gammas_C11
        output_CMO = torch.bmm(xa_CMR, b_COR.transpose(1, 2)) * gamma
        layer.context.probe.measure(output_CMO.reshape(*x.shape[:-1], -1))


class _InputGradient:
    """Adds gamma * H A to what the frozen layers say the gradient of x is.

    A hook of x, called when they all have said it. The sum is memory of their own making that
    nobody else holds, so it is added to in place: no tensor as large as x more, no kernel more.
    """

    def __init__(self) -> None:
        self.added: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def __call__(self, grad: torch.Tensor) -> torch.Tensor | None:
        if self.added is None:
            return None
        (h_CMR, a_CRI, lora_scaling), self.added = self.added, None
        grad_CMI = _by_client(grad, a_CRI).baddbmm_(h_CMR, a_CRI, alpha=lora_scaling)
        return grad_CMI.view(grad.shape)


Drop = Callable[..., tuple[torch.Tensor, ...]]
"""Drops the same numbers of tensors of one shape; see ``kernels.interface.Dropout``."""


@dataclass
class LoraTerm:
    """The term gamma * B A x of layers that read the same x."""

    factors: Factors
    lora_scaling: float
    """Gamma, where the clients do not have each their own."""
    drop: Drop | None = None
    """Dropout of what A reads; None = nothing is dropped."""
    later: _InputGradient | None = None
    """Who adds the adapters' part to the gradient of x, which the frozen layers give one too; None
    = autograd."""


def add_lora(
    ys: tuple[torch.Tensor, ...], x: torch.Tensor, term: LoraTerm
) -> tuple[torch.Tensor, ...]:
    """Add gamma * B_c A_c x to the frozen layers' outputs, in place, and return them.

    Args:
        ys: outputs of the frozen layers, which nobody else reads.
        x: their input, of C * M rows.
        term: what is added.
    """
    a_CRI, b_COR = term.factors.in_dtype(x.dtype)
    added: tuple[torch.Tensor, ...] = _AddLora.apply(  # type: ignore[no-untyped-call]
        term, x, a_CRI, *b_COR, *ys
    )
    return added


class _AddLora(Function):
    """y_l + gamma * B_l A_l x of the layers l that read the same x.

    With G_l the gradient of y_l and H_l = G_l B_l, which is R wide, and H of all layers side by
    side; gamma is a factor of these products and costs nothing. Where each client has its own, A x
    and H are multiplied by it, in place:

        grad x = sum_l G_l W_l + gamma * H A          grad A_l = gamma * H_l^T x
        grad y_l = G_l                                grad B_l = gamma * G_l^T (A_l x)

    Where numbers of x are dropped, A reads what is left, and the same numbers of gamma * H A are.

    Gradients of factors are added where ``Factors`` says and not handed to autograd. Saves A x for
    the gradient of B, and for that of A x itself or what it is made of; no mask.
    """

    @staticmethod
    def forward(
        ctx: Any,
        term: LoraTerm,
        x: torch.Tensor,
        a_CRI: torch.Tensor,
        *b_and_y: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.factors, ctx.lora_scaling = term.factors, term.lora_scaling
        ctx.drop, ctx.later = term.drop, term.later
        gammas_C11, recipe = ctx.factors.rows.gammas_C11, recipe_of(x)
        ctx.make = None if recipe is None else recipe.make
        ctx.x_shape, num_layers = x.shape, len(b_and_y) // 2
        b_COR, ys = b_and_y[:num_layers], b_and_y[num_layers:]
        (x_read,) = (x,) if ctx.drop is None else ctx.drop(x)
        xa_CMR = torch.bmm(_by_client(x_read, a_CRI), a_CRI.transpose(1, 2))
        if gammas_C11 is not None:
            ctx.lora_scaling = 1.0
            xa_CMR.mul_(gammas_C11)  # in fp32, whatever the dtype of A x
        kept = (x,) if recipe is None else recipe.inputs
        ctx.save_for_backward(
            a_CRI,
            *b_COR,
            xa_CMR if ctx.factors.grad_b is not None else None,
            *(kept if ctx.factors.grad_a is not None else ()),
        )
        # A frozen layer keeps its input and weight and not its output: it may be written over.
        outputs = tuple(y.detach().contiguous() for y in ys)
        for y, b, part in zip(outputs, b_COR, xa_CMR.chunk(num_layers, dim=2), strict=True):
            rows = y.view(len(b), -1, y.shape[-1])
            rows.baddbmm_(part, b.transpose(1, 2), alpha=ctx.lora_scaling)
        # To autograd these are no views, so that a model may write over them in turn (Falcon).
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (a_CRI, *rest), num_layers = ctx.saved_tensors, len(grads)
        b_COR, xa_CMR, kept = rest[:num_layers], rest[num_layers], rest[num_layers + 1 :]
        ctx.factors.rows.collect()
        h_CMR = _back_through_b(ctx, [_by_client(grad, a_CRI) for grad in grads], b_COR, xa_CMR)
        grad_x = _back_through_a(ctx, h_CMR, a_CRI, kept)
        return None, grad_x, None, *(None for _ in b_COR), *grads


def _back_through_b(
    ctx: Any,
    grads_CMO: list[torch.Tensor],
    b_COR: list[torch.Tensor],
    xa_CMR: torch.Tensor | None,
) -> torch.Tensor:
    """Add the gradients of B where A x was kept for them; return H, in its memory."""
    grad_b, gammas_C11 = ctx.factors.grad_b, ctx.factors.rows.gammas_C11
    h_CMR = xa_CMR
    if h_CMR is None:
        clients, rows, _ = grads_CMO[0].shape
        h_CMR = b_COR[0].new_empty(clients, rows, sum(b.shape[2] for b in b_COR))
    for layer, part in enumerate(h_CMR.chunk(len(b_COR), dim=2)):
        if grad_b is not None:
            transposed = grads_CMO[layer].transpose(1, 2)
            _add_product(grad_b[layer], transposed, part, ctx.lora_scaling)
        torch.bmm(grads_CMO[layer], b_COR[layer], out=part)  # over A x, which nobody needs any more
    return h_CMR if gammas_C11 is None else h_CMR.mul_(gammas_C11)


def _back_through_a(
    ctx: Any, h_CMR: torch.Tensor, a_CRI: torch.Tensor, kept: list[torch.Tensor]
) -> torch.Tensor | None:
    """Add the gradient of A; return that of x, None where ``later`` adds it or nobody asks."""
    grad_a, x, grad_x = ctx.factors.grad_a, None, None
    if grad_a is not None:
        x = _by_client(kept[0] if ctx.make is None else ctx.make(*kept), a_CRI)
    if ctx.later is not None:
        ctx.later.added = (h_CMR, a_CRI, ctx.lora_scaling)
    elif ctx.needs_input_grad[1]:
        grad_x = torch.bmm(h_CMR, a_CRI).mul_(ctx.lora_scaling)
    if ctx.drop is not None:
        x, grad_x = _dropped(ctx.drop, x, grad_x)
    if x is not None:
        _add_product(grad_a, h_CMR.transpose(1, 2), x, ctx.lora_scaling)
    return None if grad_x is None else grad_x.view(ctx.x_shape)


def _dropped(drop: Drop, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Drop the same numbers of those that are there."""
    present = [tensor for tensor in tensors if tensor is not None]
    dropped = iter(drop(*present) if present else ())
    return tuple(None if tensor is None else next(dropped) for tensor in tensors)


def _by_client(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(C * M rows in any shape, width) as (C, M, width)."""
    return rows.reshape(len(factor), -1, rows.shape[-1])


def _add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float
) -> None:
    """Add factor * left right to the total, in place and in one kernel where dtypes agree."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=factor)
    else:
        total.add_(torch.bmm(left, right), alpha=factor)
