"""Shapes of hub models that shipped configurations name: planning then needs no network."""

from __future__ import annotations

from transformers import LlamaConfig, PreTrainedConfig, RobertaConfig

from sfed.config import Config
from sfed.mockups import SHAPES
from sfed.shape import fitted, read_model_config

_LLAMA = {
    "meta-llama/Llama-2-7b-hf": SHAPES["llama2-7b"],
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
