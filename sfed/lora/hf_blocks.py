"""Lean forms of known blocks of transformers, in fewer operations.

Layers that read the same input are computed together, and the steps between them are those of
``ops``. Modules of other models stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sfed.kernels.choice import PLAIN, Kernels
from sfed.lora.linear import project
from sfed.lora.ops import rms_norm, rotate, swiglu

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def patch_blocks(model: nn.Module, kernels: Kernels = PLAIN) -> None:
    """Give the model's attentions, MLPs and RMSNorms their lean forms, in place.

    Args:
        model: a model of transformers.
        kernels: that compute the steps between the matrix products.
    """
    for module in model.modules():
        kind = _kind(module)
        if kind == "Attention":
            module.forward = _AttentionForward(module, kernels)
        elif kind == "MLP" and _is_silu(module.act_fn):
            module.forward = _MlpForward(module, kernels)
        elif kind == "RMSNorm":
            module.forward = _NormForward(module)


@contextmanager
def without_patched_blocks(model: nn.Module) -> Iterator[None]:
    """Use the modules' own forward methods within the block."""
    lean = [
        (module, module.__dict__.pop("forward"))
        for module in model.modules()
        if isinstance(module.__dict__.get("forward"), _LEAN)
    ]
    try:
        yield
    finally:
        for module, forward in lean:
            module.forward = forward


def _kind(module: nn.Module) -> str | None:
    """Attention, MLP or RMSNorm where transformers' own class of a known family; otherwise None."""
    package, name = type(module).__module__, type(module).__name__
    for family in _FAMILIES:
        lower = family.lower()
        if package == f"transformers.models.{lower}.modeling_{lower}" and name.startswith(family):
            return name.removeprefix(family)
    return None


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


class _AttentionForward:
    """o(attention(rotate(q(x)), rotate(k(x)), v(x))).

    Mask, cache and the attention's implementation are transformers' own.
    """

    def __init__(self, module: Any, kernels: Kernels) -> None:
        self._module, self._kernels = module, kernels
        own = sys.modules[type(module).__module__]
        self._eager = own.eager_attention_forward
        self._settings: dict[str, Any] = {"scaling": module.scaling}
        if type(module).__name__ == "MistralAttention":
            self._settings["sliding_window"] = module.config.sliding_window
        elif hasattr(module, "sliding_window"):
            self._settings["sliding_window"] = module.sliding_window

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module, shape = self._module, hidden_states.shape[:-1]
        projected = project(hidden_states, (module.q_proj, module.k_proj, module.v_proj))
        q, k, v = (one.view(*shape, -1, module.head_dim) for one in projected)
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        q, k = rotate(q, k, *position_embeddings, self._kernels)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, self._eager
        )
        dropout = module.attention_dropout if module.training else 0.0
        output, weights = attend(
            module, q, k, v, attention_mask, dropout=dropout, **self._settings, **kwargs
        )
        return module.o_proj(output.reshape(*shape, -1).contiguous()), weights


class _MlpForward:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, module: Any, kernels: Kernels) -> None:
        self._module, self._kernels = module, kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self._module
        gate, up = project(x, (module.gate_proj, module.up_proj))
        output: torch.Tensor = module.down_proj(swiglu(gate, up, self._kernels))
        return output


class _NormForward:
    """weight * x / rms(x)."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._eps = torch.tensor(module.variance_epsilon, device="cpu")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._module.weight, self._eps)


_LEAN = (_AttentionForward, _MlpForward, _NormForward)
