"""Tiny random models with tokenizers, small files of rows, and runs of the trainer on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from sfed.config.load import validate
from sfed.config.schema import Config
from tests.support.deadlines import RUN_SECONDS

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def byte_tokenizer(tokens: list[str], unk_token: str | None = None) -> Tokenizer:
    """A token per byte, and special ones, numbered in this order."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_model(
    folder: Path,
    *,
    hidden: int = 32,
    inner: int | None = None,
    layers: int = 2,
    context: int = 128,
    seed: int = 0,
) -> Path:
    """Write a LLaMA with random weights (GQA, non-square layers) and a byte tokenizer."""
    tokens = ["<s>", "</s>", *ALPHABET]
    tokenizer = byte_tokenizer(tokens)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=inner or 2 * hidden + 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,  # large enough that adapters have something to change
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_roberta(folder: Path, *, seed: int = 0) -> Path:
    """Write a RoBERTa encoder with random weights, without a classifier, and a byte tokenizer.

    Special tokens, their ids and the form of pairs are those of FacebookAI/roberta-large, and so is
    the checkpoint: a masked language model.
    """
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *ALPHABET, "<mask>"]
    tokenizer = byte_tokenizer(tokens, unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=len(tokens),
        **ENCODER,
        max_position_embeddings=514,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def save_bert(folder: Path, *, seed: int = 0) -> Path:
    """Write a BERT encoder with random weights, token types and a pooler, and a byte tokenizer.

    Special tokens and the form of pairs are those of google-bert/bert-base-uncased, and so is the
    checkpoint: one with the heads of pre-training.
    """
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ALPHABET]
    tokenizer = byte_tokenizer(tokens, unk_token="[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokens),
        **ENCODER,
        max_position_embeddings=512,
        type_vocab_size=2,
        pad_token_id=0,
    )
    BertForPreTraining(config).save_pretrained(folder)
    return folder


def save_rows(path: Path, count: int, *, seed: int = 0, kinds: int = 1) -> Path:
    """Write ``count`` rows of prompt, completion and kind; lengths differ."""
    rows = []
    for i in range(count):
        kind = i % kinds
        word = "abcdefghij"[(seed + 3 * i + kind) % 10]
        rows.append(
            {
                "prompt": f"{i} times {word}:",
                "completion": f" {word * (1 + i % 5)}{kind}",
                "kind": f"kind-{kind}",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a quick run on ``folder``/model and ``folder``/rows.jsonl; sections go over."""
    data: dict[str, Any] = {
        "model": {"name": str(folder / "model")},
        "data": {
            "task": "jsonl",
            "train_files": str(folder / "rows.jsonl"),
            "max_tokens": 64,
            "eval_fraction": 0.25,
        },
        "lora": {"rank": 4},
        "federated": {"num_clients": 4, "num_rounds": 3, "deadline_seconds": RUN_SECONDS},
        "train": {"local_steps": 3, "batch_size": 4, "lr": 1e-2},
        "output": {"dir": str(folder / "runs"), "name": "run"},
    }
    for section, values in sections.items():
        if isinstance(values, dict):
            data[section] = {**data.get(section, {}), **values}
        else:
            data[section] = values
    return data


def named_settings(folder: Path, out: Path, name: str, **federated: Any) -> dict[str, Any]:
    """Settings of a run of four clients that is written to ``out``/``name``."""
    output = {"dir": str(out), "name": name}
    return settings(folder, output=output, federated={"num_clients": 4, **federated})


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    """The same as a checked configuration."""
    return validate(settings(folder, **sections))


def plant_code(model: Path, proof: Path) -> None:
    """Give a model folder code of its own, which leaves a proof when it runs."""
    (model / "planted.py").write_text(
        f"open({str(proof)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class PlantedConfig(LlamaConfig):\n    model_type = 'planted'\n"
        "class Planted(LlamaForCausalLM):\n    config_class = PlantedConfig\n"
    )
    settings = json.loads((model / "config.json").read_text())
    settings |= {
        "model_type": "planted",
        "auto_map": {
            "AutoConfig": "planted.PlantedConfig",
            "AutoModelForCausalLM": "planted.Planted",
        },
    }
    (model / "config.json").write_text(json.dumps(settings))
