"""Tiny random models of the families that the documents list, each with its tokenizer and rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from tests.support import glue, tiny

CLIENTS = ("hill", "lake")
WINDOW = 8
"""Tokens of a sliding window: fewer than those of a row."""
_STD_OF_WEIGHTS, _STD_OF_OTHERS = 0.15, 0.05

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {
    **_SIZES,
    "intermediate_size": 72,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_ENCODER = {**_SIZES, "intermediate_size": 72, "max_position_embeddings": 130}
_HEADS = {"head_dim": 8}
_ROPE_OF_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 64,
}
_VISION = {**_SIZES, "intermediate_size": 72, "image_size": 16, "patch_size": 4}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_DEBERTA = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0,
}


@dataclass(frozen=True)
class Family:
    """A family, the model that stands for it, and which of its layers are adapted."""

    name: str
    kind: str
    """Class of transformers."""
    settings: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] | str = "all-linear"
    config: str = ""
    """Class of its configuration, where several belong to the model."""

    @property
    def is_classifier(self) -> bool:
        """Whether it stands for an encoder with a classification head."""
        return self.kind.endswith("ForSequenceClassification")

    def built(self, vocabulary: int, **tokens: int | None) -> PreTrainedModel:
        """The model with the weights that transformers draws."""
        kind = getattr(transformers, self.kind)
        config = getattr(transformers, self.config) if self.config else kind.config_class
        torch.manual_seed(0)
        settings = {"vocab_size": vocabulary, **tokens, **self.settings}
        if of_text := self.settings.get("text_config"):
            settings = {**settings, "text_config": {**of_text, "vocab_size": vocabulary, **tokens}}
        model: PreTrainedModel = kind(config(**settings)).eval()
        return model

    def made(self, vocabulary: int, **tokens: int | None) -> PreTrainedModel:
        """The model, with weights that are large enough to matter, norms and biases too."""
        model = self.built(vocabulary, **tokens)
        with torch.no_grad():
            for weight in model.parameters():
                drawn = torch.randn(weight.shape)
                if weight.dim() > 1:
                    weight.copy_(drawn * _STD_OF_WEIGHTS)
                else:
                    weight.add_(drawn * _STD_OF_OTHERS)
        return model


FAMILIES = [
    Family("LLaMA 2", "LlamaForCausalLM", _DECODER),
    Family(
        "LLaMA 3 (scaled rotary embedding)",
        "LlamaForCausalLM",
        {**_DECODER, "rope_parameters": _ROPE_OF_LLAMA3},
    ),
    Family(
        "Mistral (sliding window)", "MistralForCausalLM", {**_DECODER, "sliding_window": WINDOW}
    ),
    Family("Qwen 2", "Qwen2ForCausalLM", _DECODER),
    Family("Qwen 3", "Qwen3ForCausalLM", {**_DECODER, **_HEADS}),
    Family("Gemma 1", "GemmaForCausalLM", {**_DECODER, **_HEADS}),
    Family(
        "Gemma 2 (capped logits, sliding layers)",
        "Gemma2ForCausalLM",
        {**_DECODER, **_HEADS, **_SLIDING, "query_pre_attn_scalar": 8},
    ),
    Family(
        "Gemma 3 (sliding layers)",
        "Gemma3ForCausalLM",
        {**_DECODER, **_HEADS, **_SLIDING},
        config="Gemma3TextConfig",
    ),
    Family(
        "Gemma 3 for images and text (trained on text)",
        "Gemma3ForConditionalGeneration",
        {"text_config": {**_DECODER, **_HEADS, **_SLIDING}, "vision_config": _VISION}
        | {"mm_tokens_per_image": 4},
    ),
    Family("Phi 3, Phi 4", "Phi3ForCausalLM", {**_DECODER, "sliding_window": WINDOW}),
    Family("Phi 4 mini (longrope)", "Phi3ForCausalLM", {**_DECODER, "rope_parameters": _LONGROPE}),
    Family(
        "GPT-2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    ),
    Family(
        "GPT-NeoX",
        "GPTNeoXForCausalLM",
        {**_SIZES, "intermediate_size": 72, "max_position_embeddings": 128},
    ),
    Family(
        "OPT",
        "OPTForCausalLM",
        {**_SIZES, "ffn_dim": 72, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    ),
    Family("Falcon", "FalconForCausalLM", {**_SIZES, "max_position_embeddings": 128}),
    Family("OLMo 2", "Olmo2ForCausalLM", _DECODER),
    Family(
        "Granite",
        "GraniteForCausalLM",
        {
            **_DECODER,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
        },
    ),
    Family(
        "Mixtral",
        "MixtralForCausalLM",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        "Qwen 3 MoE",
        "Qwen3MoeForCausalLM",
        {**_DECODER, **_HEADS, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 24},
    ),
    Family("BERT", "BertForSequenceClassification", _ENCODER),
    Family("RoBERTa", "RobertaForSequenceClassification", {**_ENCODER, "type_vocab_size": 1}),
    Family(
        "DeBERTa-v2, DeBERTa-v3", "DebertaV2ForSequenceClassification", {**_ENCODER, **_DEBERTA}
    ),
    Family(
        "ModernBERT",
        "ModernBertForSequenceClassification",
        {**_ENCODER, "local_attention": WINDOW, "global_attn_every_n_layers": 2},
    ),
    Family(
        "DistilBERT",
        "DistilBertForSequenceClassification",
        {"dim": 32, "hidden_dim": 72, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 130},
    ),
]


FEW = ("LLaMA 3 (scaled rotary embedding)", "Gemma 2 (capped logits, sliding layers)", "Falcon")
FEW += ("Qwen 3 MoE", "DistilBERT")
"""Those that the test command trains; the others belong to the full selection."""


def some(names: tuple[str, ...]) -> list[Family]:
    """The families of these names."""
    return [family for family in FAMILIES if family.name in names]


def save(family: Family, folder: Path) -> Path:
    """Write the model of a family with a byte tokenizer below a folder; returns where."""
    model = folder / "model"
    if not family.is_classifier:
        tiny.save_model(model)
    elif family.name == "RoBERTa":
        tiny.save_roberta(model)
    else:
        tiny.save_bert(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _NAMED_TOKENS}
    family.made(len(tokenizer), **tokens).save_pretrained(model)
    return model


_NAMED_TOKENS = ("bos", "eos", "pad")


def save_rows(family: Family, folder: Path) -> None:
    """Write training and held-out rows of each client, of unequal lengths."""
    for split, count in (("train", 8), ("held", 6)):
        (folder / split).mkdir(parents=True)
        for client, name in enumerate(CLIENTS):
            rows = rows_of(family, count, seed=10 * client + count)
            glue.save(folder / split / f"{name}.jsonl", rows)


def rows_of(family: Family, count: int, *, seed: int) -> list[dict[str, Any]]:
    """Rows of one client."""
    if family.is_classifier:
        return glue.rows_of("rte", count, seed=seed)
    words = ("ab", "stone", "x", "riverside", "moon")
    return [
        {
            "prompt": " ".join([words[(i + seed) % 5]] * (1 + i % 3)) + ":",
            "completion": f" {words[(3 * i + seed) % 5]} {i}",
        }
        for i in range(count)
    ]


def read_rows(folder: Path, split: str, client: str) -> list[dict[str, Any]]:
    """The rows that ``save_rows`` wrote."""
    path = folder / split / f"{client}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
