"""What is settled before any weight is read: attention and the token of padding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from sfed.config.load import validate
from sfed.config.schema import Config
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.models import backbone, hf_config
from sfed.models.hf_config import MetaModel
from sfed.utils.errors import UserError
from tests.support import tiny
from tests.support.deadlines import RUN_SECONDS

MIXTRAL = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2}
MIXTRAL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT_J = {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 64, "rotary_dim": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA, which has sdpa, and a GPT-J, which has not."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_model(folder / "llama", layers=1)
    hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=64, **GPT_J)).save_pretrained(folder / "gptj")
    return folder


def config_of(model: Path, attention: str = "auto", **data: Any) -> Config:
    task = data or {"task": "text", "train_files": "rows.jsonl"}
    return validate({"model": {"name": str(model), "attention": attention}, "data": task})


def loaded(config: Config, world: World) -> backbone.Backbone:
    return backbone.load(config, config.model.name, world)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = distributed.start(RUN_SECONDS)
    yield world
    distributed.stop(world)


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("name", "asked", "used"),
    [
        ("llama", "auto", "sdpa"),
        ("llama", "sdpa", "sdpa"),
        ("llama", "eager", "eager"),
        ("gptj", "auto", "eager"),
        ("gptj", "eager", "eager"),
    ],
)
def test_attention_is_the_one_that_is_named_or_that_the_model_supports(
    folder: Path, world: World, name: str, asked: str, used: str
) -> None:
    config = config_of(folder / name, asked)
    assert loaded(config, world).attention == used
    meta = MetaModel.read(config, config.model.name)
    assert meta.may_be_eager is (used == "eager")
    assert meta.model.config._attn_implementation == ("sdpa" if name == "llama" else "eager")


def test_attention_that_the_model_itself_names_is_not_used(tmp_path: Path, world: World) -> None:
    tiny.save_model(tmp_path, layers=1)
    changed(tmp_path, attn_implementation="flash_attention_2")
    config = config_of(tmp_path)
    assert loaded(config, world).attention == "sdpa"
    assert MetaModel.read(config, config.model.name).num_weights > 0  # makes the model


@pytest.mark.parametrize(
    ("name", "asked"),
    [("gptj", "sdpa"), ("gptj", "flash_attention_2"), ("llama", "flash_attention_2")],
)
def test_attention_that_is_not_there_is_refused_with_the_key_that_helps(
    folder: Path, world: World, name: str, asked: str
) -> None:
    with pytest.raises(UserError) as refused:
        loaded(config_of(folder / name, asked), world)
    message = str(refused.value)
    assert message.startswith(f"model.attention = {asked!r} cannot be used for model.name = ")
    assert "set model.attention=auto" in message
    assert message[-1] in ".!?)`\"'"


def test_rows_for_which_bigbird_attends_to_blocks_are_refused_with_both_remedies(
    tmp_path: Path,
) -> None:
    """transformers changes to full attention for good at the first row of at most 28 tokens."""
    sparse = {"block_size": 4, "num_random_blocks": 1}
    hf.BigBirdConfig(**sparse).save_pretrained(tmp_path)
    task = {"task": "glue", "name": "rte", "train_files": "rows.jsonl"}

    def read(max_tokens: int, task: dict[str, Any] = task) -> None:
        config = config_of(tmp_path, **task, max_tokens=max_tokens)
        MetaModel.read(config, config.model.name)

    read(28)
    with pytest.raises(UserError, match=r"data\.max_tokens = 29: .* with more than 28 tokens") as e:
        read(29)
    for words in (str(tmp_path), "attention_type", "block_sparse", "at most 28", "original_full"):
        assert words in str(e.value)
    changed(tmp_path, attention_type="original_full")
    read(29)
    hf.BigBirdPegasusConfig(**sparse).save_pretrained(tmp_path)
    read(29, {"task": "text", "train_files": "rows.jsonl"})  # its decoder has no blocks


@pytest.mark.parametrize(
    ("settings", "of_text", "of_classifier"),
    [
        ({"pad_token_id": -1, "eos_token_id": 1}, None, 1),
        ({"pad_token_id": -100, "eos_token_id": [7, 1]}, None, 7),
        ({"pad_token_id": -1, "eos_token_id": [300, 1]}, None, 1),
        ({"pad_token_id": None, "eos_token_id": -1}, None, 0),
        ({"pad_token_id": None, "eos_token_id": None}, None, 0),
        ({"pad_token_id": None, "eos_token_id": []}, None, 0),
        ({"pad_token_id": 0, "eos_token_id": 1}, 0, 0),
        ({"pad_token_id": 257, "eos_token_id": 1}, 257, 257),
    ],
)
def test_a_token_of_padding_below_zero_counts_as_none(
    settings: dict[str, Any], of_text: int | None, of_classifier: int
) -> None:
    files = {"train_files": "rows.jsonl"}
    for task, expected in (
        ({"task": "text", **files}, of_text),
        ({"task": "glue", "name": "rte", **files}, of_classifier),
    ):
        own = hf.LlamaConfig(vocab_size=258, **settings)
        assert hf_config.fitted(config_of(Path("x"), **task), own).pad_token_id == expected


def test_the_token_of_padding_is_that_of_the_language_model() -> None:
    own = hf.Gemma3Config(
        text_config={"vocab_size": 300, "pad_token_id": -1, "eos_token_id": 1}, vision_config={}
    )
    task = {"task": "glue", "name": "rte", "train_files": "rows.jsonl"}
    fitted = hf_config.fitted(config_of(Path("x"), **task), own)
    assert fitted.get_text_config().pad_token_id == 1
    assert fitted.pad_token_id == 1


def test_what_evaluation_mode_uses_is_left_as_it_is() -> None:
    own = hf.PhimoeConfig(router_jitter_noise=0.1, attention_dropout=0.1)
    fitted = hf_config.fitted(config_of(Path("x")), own)
    assert (fitted.router_jitter_noise, fitted.attention_dropout) == (0.1, 0.0)


@pytest.mark.parametrize(
    "asked",
    [{"return_dict": False}, {"output_router_logits": True}, {"output_hidden_states": True}],
    ids=lambda asked: next(iter(asked)),
)
def test_a_model_gives_out_logits_whatever_its_configuration_asks_for(
    tmp_path: Path, world: World, asked: dict[str, bool]
) -> None:
    own = hf.MixtralConfig(vocab_size=64, num_local_experts=2, **MIXTRAL)
    hf.MixtralForCausalLM(own).save_pretrained(tmp_path)
    numbers = []
    for settings in ({}, asked):
        changed(tmp_path, **settings)
        one = loaded(config_of(tmp_path), world)
        one.evaluating()
        ids, positions = torch.arange(3, 15).view(2, 6), torch.tensor([0, 3, 7])
        numbers.append(one.token_losses(ids, ids, positions).tolist())
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            hf.LlamaConfig(vocab_size=258, pad_token_id=258),
            "pad_token_id = 258, and its vocabulary has 258 tokens; set it to one of these or to",
        ),
        (hf.PreTrainedConfig(hidden_size=8), "does not tell vocab_size; a configuration with"),
        (hf.PreTrainedConfig(vocab_size=8), "does not tell hidden_size; a configuration with"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_by_its_key(
    own: hf.PreTrainedConfig, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        hf_config.fitted(config_of(Path("x")), own)


def test_a_model_that_cannot_recompute_its_layers_is_refused_with_the_key(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    config = config_of(folder / "llama")
    changes = {"gradient_checkpointing": True}
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update=changes)})
    with pytest.raises(UserError, match="gradient_checkpointing = true: LlamaForCausalLM of"):
        loaded(config, world)


def test_a_model_that_hides_its_output_layer_is_refused(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf.LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(UserError, match="LlamaForCausalLM does not tell its output layer"):
        loaded(config_of(folder / "llama"), world)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"task": "text"}, "transformers has no causal language model of this architecture"),
        (
            {"task": "glue", "name": "rte"},
            "transformers has no sequence classifier of this architecture",
        ),
    ],
)
def test_an_architecture_without_such_a_model_is_named_in_one_sentence(
    tmp_path: Path, world: World, task: dict[str, str], said: str
) -> None:
    hf.CLIPConfig(text_config={"vocab_size": 64}).save_pretrained(tmp_path)
    config = config_of(tmp_path, train_files="rows.jsonl", **task)
    with pytest.raises(UserError) as refused:
        loaded(config, world)
    assert str(refused.value).endswith(f"cannot be loaded for this task: {said}")
