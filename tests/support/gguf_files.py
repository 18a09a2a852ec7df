"""A LLaMA and a LoRA adapter as GGUF files for llama.cpp, written with the package gguf.

llama.cpp rotates pairs of neighbours where transformers rotates halves, so the rows of q and k are
put in another order; those of an adapter's B with them. It scales an adapter by alpha / r.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def in_order_of_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k with the halves of each head in turns."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _heads(settings: dict[str, Any], name: str) -> int:
    """Heads whose rows are put in another order; 0 for other layers."""
    of = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    return settings[of[name]] if name in of else 0


def _place(layer: str) -> tuple[str, str]:
    """Block and name of a layer, such as blk.0 and attn_q."""
    _, _, number, *rest = layer.split(".")
    return f"blk.{number}", NAMES[".".join(rest)]


def write_model(folder: Path, file: Path) -> None:
    """Write a LLaMA of transformers with tied embeddings, in fp32 and without a vocabulary."""
    import gguf

    settings = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_dimension_count(settings["hidden_size"] // settings["num_attention_heads"])
    writer.add_rope_freq_base(settings["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in load_file(folder / "model.safetensors").items():
        weight = tensor.float().numpy()
        outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
        layer = name.removesuffix(".weight")
        if layer in outer:
            writer.add_tensor(f"{outer[layer]}.weight", weight)
            continue
        block, short = _place(layer)
        if heads := _heads(settings, short):
            weight = in_order_of_llama_cpp(weight, heads)
        writer.add_tensor(f"{block}.{short}.weight", np.ascontiguousarray(weight))
    _finish(writer)


def write_adapter(folder: Path, base: Path, file: Path) -> None:
    """Write a PEFT adapter of such a model, as llama.cpp's convert_lora_to_gguf.py does."""
    import gguf

    settings = json.loads((base / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer, _, factor = (
            name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        )
        (block, short), weight = _place(layer), tensor.numpy()
        if factor == "B" and (heads := _heads(settings, short)):
            weight = in_order_of_llama_cpp(weight, heads)
        end = f"weight.lora_{factor.lower()}"
        writer.add_tensor(f"{block}.{short}.{end}", np.ascontiguousarray(weight))
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
