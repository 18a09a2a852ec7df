"""Attention of documents that share a row, without a mask.

transformers keeps documents apart by a mask of rows x tokens x tokens, which it makes of the
positions; and it waits for the device, to see whether one is needed. Here the function that
computes attention is told where each document begins:

    o_i = sum_j softmax_j(scale q_i . k_j) v_j    over j <= i in i's document, i - j < window

On CUDA one kernel computes all documents, ``torch.nn.attention.varlen``. On a CPU each document is
an attention of its own. Everything else, padded rows and generation too, is transformers' sdpa.

Shape suffixes: B rows, T tokens of a row, H heads, K heads of keys and values, D width of a head,
S = B T tokens of all rows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention import varlen
except ImportError:  # torch 2.9
    varlen = None  # type: ignore[assignment]

NAME = "sdpa_of_documents"
"""What transformers knows the function as."""

# Their attention is the formula above and nothing else: no cap, no sink, no bias of positions; and
# what a pass is told reaches it. Each is compared with padded rows by a test.
_FAMILIES = frozenset(
    {
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "GemmaForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Olmo2ForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")
# Of the kernel: flash attention of Ampere and later GPUs.
_CAPABILITY = (8, 0)
_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST_HEAD, _HEADS_IN_STEPS_OF = 256, 8
_OF_VARLEN = {"cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size", "enable_gqa"}


def install(model: PreTrainedModel, device: torch.device) -> None:
    """Let packed rows of the model go without a mask, where ``why_masked`` says nothing."""
    if why_masked(model, device) is None:
        model.set_attn_implementation(NAME)


def is_installed(model: PreTrainedModel) -> bool:
    """Whether packed rows of the model need no mask."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def why_masked(model: PreTrainedModel, device: torch.device) -> str | None:
    """Say why packed rows of a model need a mask; None where they do not.

    Args:
        model: in the dtype that it computes in.
        device: where it will compute; it need not be there yet, nor exist.
    """
    text, kind = model.config.get_text_config(), type(model)
    if text._attn_implementation not in ("sdpa", NAME):
        return f"model.attention is {text._attn_implementation}"
    if kind.__name__ not in _FAMILIES or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not among the models that were tried without one"
    if getattr(text, "use_bidirectional_attention", None):
        return "its attention looks ahead"
    if device.type == "cuda":
        return _why_no_kernel(model, device)
    return None if device.type == "cpu" else f"{device.type} has no kernel for it"


def _why_no_kernel(model: PreTrainedModel, device: torch.device) -> str | None:
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if model.dtype not in _DTYPES:
        return f"the kernel without one does not compute {str(model.dtype).removeprefix('torch.')}"
    if width > _WIDEST_HEAD or width % _HEADS_IN_STEPS_OF:
        return f"the kernel without one does not compute heads of width {width}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "this GPU has no kernel without one"
    return None if _has_varlen() else f"torch {torch.__version__} has no kernel without one"


def _has_varlen() -> bool:
    """Whether this torch computes attention of documents on CUDA, as it is called here."""
    if varlen is None:
        return False
    return inspect.signature(varlen.varlen_attn).parameters.keys() >= _OF_VARLEN


def told(starts: torch.Tensor, lengths: tuple[int, ...]) -> dict[str, Any]:
    """What a model with ``install`` is called with for a pass without a mask, beside positions.

    transformers hands a mask of four dimensions on to every layer as it is, and makes none. So the
    first places of the documents take the place of the mask.

    Args:
        starts: (documents + 1,) int32 first places of the documents in the flattened rows, and
            the end; on the model's device.
        lengths: tokens of each.
    """
    return {"attention_mask": starts[None, None, None], "document_lengths": lengths}


def told_of_rows(device: torch.device) -> dict[str, Any]:
    """The same for rows that are a document each, padded at the right.

    transformers would ask the device whether the positions are those of packed rows, and wait.
    """
    return told(torch.empty(0, dtype=torch.int32, device=device), ())


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention, as transformers calls it: of documents where ``told`` names them, else sdpa.

    Args:
        module: the attention layer.
        query: (B, H, T, D).
        key: (B, K, T, D).
        value: (B, K, T, D).
        attention_mask: (1, 1, 1, documents + 1) int32 first places, none where a row is a document;
            or a mask for sdpa.
        settings: scaling, sliding_window, document_lengths, and what sdpa takes.

    Returns:
        (B, T, H, D), and no weights.

    Raises:
        ValueError: where the layer asks for something else than the formula of this file, or the
            lengths of the documents did not come with their first places.
    """
    lengths = settings.pop("document_lengths", None)
    is_told = attention_mask is not None and attention_mask.dtype == torch.int32
    if lengths is None and not is_told:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return output, None
    _check(module, lengths, settings)
    assert attention_mask is not None
    if not lengths:
        band = _band(query.shape[2], settings.get("sliding_window") or query.shape[2], query.device)
        mask = None if band is None else band[None, None]
        output, _ = sdpa_attention_forward(module, query, key, value, mask, **settings)
        return output, None
    qkv = [one.transpose(1, 2).flatten(0, 1) for one in (query, key, value)]
    window = settings.get("sliding_window") or max(lengths)
    compute = _by_kernel if query.is_cuda else _one_by_one
    output = compute(qkv, attention_mask.flatten(), lengths, window, settings.get("scaling"))
    return output.view(len(query), -1, *output.shape[1:]), None


def _check(module: torch.nn.Module, lengths: Any, settings: dict[str, Any]) -> None:
    asked = [name for name in _UNKNOWN if settings.get(name) is not None]
    asked += ["dropout"] if settings.get("dropout") else []
    is_causal = settings.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked += [] if is_causal else ["attention to later tokens"]
    asked += ["no document_lengths"] if lengths is None else []
    if asked:
        raise ValueError(
            f"{type(module).__name__} asks attention of packed rows for {', '.join(asked)}, which "
            "it does not know; set model.attention=sdpa or data.packing=false"
        )


def _by_kernel(
    qkv: list[torch.Tensor],
    starts: torch.Tensor,
    lengths: tuple[int, ...],
    window: int,
    scaling: float | None,
) -> torch.Tensor:
    """(S, H, D) of (S, H, D), (S, K, D), (S, K, D): all documents in one kernel."""
    assert varlen is not None, "why_masked said so"
    (q, k, v), longest = qkv, max(lengths)
    back = -1 if window >= longest else window - 1  # tokens before one's own
    output: torch.Tensor = varlen.varlen_attn(
        q, k, v, starts, starts, longest, longest,
        scale=scaling, window_size=(back, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # type: ignore[assignment]  # fmt: skip
    return output


def _one_by_one(
    qkv: list[torch.Tensor],
    _starts: torch.Tensor,
    lengths: tuple[int, ...],
    window: int,
    scaling: float | None,
) -> torch.Tensor:
    """The same, a document after another."""
    shares_keys, outputs = qkv[0].shape[1] != qkv[1].shape[1], []
    for parts in zip(*(torch.split(one, [*lengths]) for one in qkv), strict=True):
        q, k, v = (one.transpose(0, 1)[None] for one in parts)
        band = _band(q.shape[2], window, q.device)
        output = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=shares_keys
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Which tokens of a document see which, (length, length) bool; None = all before their own."""
    if length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


AttentionInterface.register(NAME, attend)
# A pass without documents gets the masks that sdpa gets.
AttentionMaskInterface.register(NAME, sdpa_mask)
