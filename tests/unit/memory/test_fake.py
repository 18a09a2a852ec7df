"""Passes that are followed with fake tensors keep and need what real passes do, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.gpt2 import modeling_gpt2

from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.data import batches
from sfed.data.packing import Packing
from sfed.data.tokenize import Row
from sfed.memory import counts, profile
from sfed.memory.costs import Load
from sfed.memory.fake import FakeFloats
from sfed.memory.trial import Frozen, Trial
from sfed.models import losses, synthetic
from sfed.models.hf_config import MetaModel, asked_attention, fitted, from_config
from tests.support.selection import some_of

BF16, FP32 = torch.bfloat16, torch.float32
ALL, QV = "all-linear", ["q_proj", "v_proj"]
# A load of several clients, rows and pieces of padding.
LOAD = Load(2, 2, 32)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
DECODER = {**SIZES, "intermediate_size": 72, "num_key_value_heads": 2, "pad_token_id": 0}
HEAD = {**DECODER, "head_dim": 8}
OF_16 = {**DECODER, "intermediate_size": 80}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ENCODER = {**SIZES, "intermediate_size": 72, "max_position_embeddings": 130, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 128}
OPT = {**SIZES, "ffn_dim": 72, "word_embed_proj_dim": 32}
GLUE = {"task": "glue", "name": "mnli"}
CHECKPOINTED = {"backbone": {"gradient_checkpointing": True}}
DROPOUT = {"lora": {"dropout": 0.1}}
FP8 = {"backbone": {"compute": "fp8"}}
EAGER = {"model": {"attention": "eager"}}
SGD = {"train": {"optimizer": "sgd"}}

# Family, its shape, dtype, what else the configuration says.
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, dict[str, Any]]] = {
    "llama": ("Llama", DECODER, BF16, {}),
    "llama in fp32": ("Llama", DECODER, FP32, {}),
    "llama with dropout": ("Llama", DECODER, BF16, {**DROPOUT, **SGD}),
    "llama, checkpointed": ("Llama", DECODER, BF16, CHECKPOINTED),
    "llama, all at once": ("Llama", DECODER, FP32, {**CHECKPOINTED, **DROPOUT, **EAGER}),
    "llama of nf4 codes": ("Llama", DECODER, BF16, {"model": {"quantization": "nf4"}}),
    "llama of fp8 products": ("Llama", OF_16, BF16, FP8),
    "gpt 2 of fp8 products": ("GPT2", {**GPT2, "n_inner": 64}, FP32, {**FP8, **DROPOUT}),
    "llama classifier": ("Llama", DECODER, BF16, {"data": GLUE}),
    "mistral with a window": ("Mistral", {**DECODER, "sliding_window": 8}, BF16, {}),
    "qwen 3": ("Qwen3", HEAD, BF16, {}),
    "phi 3": ("Phi3", DECODER, BF16, {}),
    "gemma 2": ("Gemma2", HEAD, BF16, EAGER),
    "gemma 3": ("Gemma3Text", {**HEAD, "sliding_window": 8}, FP32, {}),
    "granite": ("Granite", {**DECODER, "logits_scaling": 8.0}, BF16, {}),
    "gpt 2": ("GPT2", GPT2, FP32, {}),
    "gpt 2 of int8 codes": ("GPT2", GPT2, FP32, {"model": {"quantization": "int8"}}),
    "opt": ("OPT", OPT, BF16, CHECKPOINTED),
    "mixtral": ("Mixtral", {**DECODER, **EXPERTS}, BF16, {"lora": {"target_modules": QV}}),
    "roberta": ("Roberta", ENCODER, FP32, {"data": GLUE}),
    "bert": ("Bert", ENCODER, FP32, {"data": GLUE, **DROPOUT, **CHECKPOINTED}),
}


def run_config(said: dict[str, Any]) -> Config:
    lora = {"rank": 4, "target_modules": ALL, **said.get("lora", {})}
    return config_load.validate({"data": {"task": "gsm8k"}, **said, "lora": lora})


def frozen_of(config: Config, family: str, settings: dict[str, Any], dtype: torch.dtype) -> Frozen:
    shape = fitted(config, getattr(transformers, f"{family}Config")(**settings))
    targets = counts.counts_of(config, MetaModel(config, shape)).targets
    return Frozen(shape, dtype, targets, "cpu")


def figures(trial: Trial) -> tuple[Any, ...]:
    in_chunks = trial.backbone.logits_at_a_time(32_000)
    passes = trial.kept(LOAD), trial.transient(LOAD), trial.evaluated(LOAD)
    return (*passes, trial.optimised(), in_chunks)


# Each kind of layer, storage and setting once; the others are the same again elsewhere.
REPRESENTATIVES = (
    *("llama", "llama, all at once", "llama of nf4 codes", "gpt 2 of fp8 products"),
    *("llama classifier", "mistral with a window", "phi 3", "gemma 2", "gpt 2 of int8 codes"),
    *("mixtral", "bert"),
)


@pytest.mark.parametrize("name", some_of(CASES, *REPRESENTATIVES))
def test_fake_passes_need_the_bytes_of_real_ones(name: str) -> None:
    family, settings, dtype, said = CASES[name]
    config = run_config(said)
    frozen = frozen_of(config, family, settings, dtype)
    fake, real = (Trial(config, frozen, 2, 4, fake) for fake in (FakeFloats(), None))
    assert any(isinstance(weight, FakeTensor) for weight in fake.backbone.model.parameters())
    found = figures(fake)
    assert min(found[:3]) > 0, "nothing was counted"
    assert found == figures(real)


class Packed(Trial):
    """Passes over rows of several documents."""

    def batch(self, load: Load) -> batches.Batch:
        lengths = [load.tokens - 2, 11, 9] * load.rows
        rows = [Row(np.zeros(length, dtype=np.int32), 1, None) for length in lengths]
        packing = Packing(widest=load.tokens, even_width=1e9, document_slots=0.0)
        packed = batches.collate([rows] * load.clients, len(rows), packing)
        assert packed.documents is not None
        return packed


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("Llama", DECODER, {}),
        ("Llama", DECODER, {"model": {"attention": "sdpa"}}),
        ("Llama", DECODER, EAGER),
        ("Qwen3", HEAD, CHECKPOINTED),
    ],
)
def test_so_they_do_where_rows_are_packed(
    family: str, settings: dict[str, Any], said: dict[str, Any]
) -> None:
    config = run_config(said)
    frozen = frozen_of(config, family, settings, BF16)
    fake, real = (Packed(config, frozen, 2, 4, fake) for fake in (FakeFloats(), None))
    assert figures(fake) == figures(real)


def test_a_pass_of_large_layers_is_followed_without_memory_for_them() -> None:
    """93,352 bytes per token and layer are what real layers of LLaMA-2 7B were seen to keep."""
    config = config_load.validate(
        {"data": {"task": "gsm8k"}, "lora": {"rank": 8, "target_modules": QV}}
    )
    shape = fitted(config, synthetic.model_config("llama2-7b", None, None))
    targets = counts.counts_of(config, MetaModel(config, shape)).targets
    said: list[str] = []
    costs = profile.measure(config, Frozen(shape, BF16, targets, "cpu"), said.append)
    assert costs.kept_by_layer.per_token == 93_352
    assert not said


@pytest.fixture
def curious_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """GPT-2 whose MLP looks at the values that it gets."""
    plain = modeling_gpt2.GPT2MLP.forward

    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(module, x) if x.sum() < 1e9 else x

    monkeypatch.setattr(modeling_gpt2.GPT2MLP, "forward", forward)
    return


@pytest.mark.usefixtures("curious_model")
def test_what_fake_tensors_cannot_follow_is_computed_and_that_is_said() -> None:
    config = run_config({})
    frozen = frozen_of(config, "GPT2", GPT2, FP32)
    said: list[str] = []
    costs = profile.measure(config, frozen, said.append)
    (line,) = said
    assert "fake tensors cannot follow a pass of gpt2" in line
    assert "DataDependentOutputException" in line
    assert costs.kept_by_layer.per_token > 0


@pytest.mark.parametrize("name", ["llama", "gemma 2", "granite", "gpt 2"])
def test_whether_logits_are_made_in_chunks_is_told_as_by_a_model_with_weights(name: str) -> None:
    family, settings, dtype, said = CASES[name]
    config = run_config(said)
    frozen = frozen_of(config, family, settings, dtype)
    attention = asked_attention(config)
    torch.manual_seed(0)
    model = from_config(config, frozen.config, dtype=FP32, attn_implementation=attention)
    probed = losses.TokenLosses(model.eval()).logits_at_a_time(96)
    trial = Trial(config, frozen, 1, 4, FakeFloats())
    assert trial.backbone.logits_at_a_time(96) == probed
    assert (probed is None) == (name in ("gemma 2", "granite"))
