"""Shapes of known models, ours and those of the hub: planning then needs no network."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, RobertaConfig

from sfed.config.schema import Config
from sfed.models.hf_config import fitted, read_model_config

SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "tinyllama": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-30m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "stories": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
}


_LLAMA = {
    "meta-llama/Llama-2-7b-hf": SHAPES["llama2-7b"],
    "meta-llama/Llama-2-70b-hf": {
        **SHAPES["llama2-7b"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "meta-llama/Meta-Llama-3-8B": {
        **SHAPES["llama2-7b"],
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}
_ROBERTA = {
    "FacebookAI/roberta-large": {
        "vocab_size": 50265,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    },
}


def shape_of(config: Config) -> PreTrainedConfig:
    """The shape of ``model.name``: of the bench, known here, in a folder, or on the hub.

    Raises:
        UserError: where it is not to be found.
    """
    name = config.model.name
    if known := SHAPES.get(name) or _LLAMA.get(name):
        return fitted(config, LlamaConfig(**known))
    if known := _ROBERTA.get(name):
        return fitted(config, RobertaConfig(**known))
    return read_model_config(config, name)
