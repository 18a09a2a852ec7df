"""An exported folder is a stock PEFT adapter, for every family of models and every reader."""

from __future__ import annotations

import enum
import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.utils.errors import UserError
from sfed.utils.json_text import plain_json

LORA_RANK, GAMMA, VOCABULARY = 4, 1.7, 64
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": VOCABULARY, "initializer_range": 0.2, "max_position_embeddings": 64}
SMALL |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GROUPED = {**SMALL, "intermediate_size": 72, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("query", "value", "dense")  # "dense" is also a layer of poolers and heads

Make = Callable[[], nn.Module]
FAMILIES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), ATTENTION),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
        ATTENTION,
    ),
    "qwen3-moe": (
        lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**EXPERTS, mlp_only_layers=[0])),
        ATTENTION,
    ),
    "qwen2-moe": (
        lambda: hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=16)
        ),
        (*ATTENTION, "gate_proj", "up_proj", "down_proj", "shared_expert_gate"),
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **_only(_VOCABULARY))
        ),
        ("c_attn", "c_fc"),
    ),
    "bert": (
        lambda: hf.BertLMHeadModel(hf.BertConfig(**SMALL, intermediate_size=72, is_decoder=True)),
        DENSE,
    ),
    "roberta": (
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL, intermediate_size=72)),
        DENSE,
    ),
    "gemma3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED)), ATTENTION),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_phi3())), ("qkv_proj", "gate_up_proj")),
    "opt": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**_opt(), ffn_dim=72, word_embed_proj_dim=32)),
        ("q_proj", "out_proj", "fc1"),
    ),
    "gpt-neox": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, intermediate_size=72)),
        ("query_key_value", "dense", "dense_4h_to_h"),
    ),
}
_VOCABULARY = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")


def _only(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: SMALL[name] for name in names}


def _phi3() -> dict[str, Any]:
    return {name: value for name, value in GROUPED.items() if name != "head_dim"}


def _opt() -> dict[str, Any]:
    return {("init_std" if k == "initializer_range" else k): v for k, v in SMALL.items()}


# The experts of these are parameters of one module: their linear layers are named one by one.
FUSED = ("mixtral", "qwen3-moe")
CASES = [
    *((family, FAMILIES[family][1]) for family in FAMILIES),
    *((family, "all-linear") for family in FAMILIES if family not in FUSED),
    ("llama", r".*layers\.1\..*\.(k|down)_proj"),
    ("llama", ("model.layers.0.self_attn.q_proj", "v_proj")),
    ("mixtral", r".*layers\.0\.self_attn\.(q|v)_proj"),
    ("mixtral", ("layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj")),
    ("qwen3-moe", r".*\.1\.self_attn\..*_proj"),
    ("roberta", ("layer.0.output.dense", "layer.1.attention.output.dense")),
]


def made(family: str, folder: Path) -> tuple[nn.Module, Path]:
    """A model with random weights, also in its norms and biases, saved and read back."""
    torch.manual_seed(1)
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return loaded(family, folder), folder


def loaded(family: str, folder: Path) -> nn.Module:
    with torch.device("meta"):
        kind = type(FAMILIES[family][0]())
    return kind.from_pretrained(folder).eval().requires_grad_(False)


def attach(model: nn.Module, targets: tuple[str, ...] | str, **changes: object) -> Adapters:
    request: dict[str, Any] = {
        "lora_rank": LORA_RANK,
        "lora_scaling": GAMMA,
        "dropout": 0.0,
        "target_modules": targets,
        "base_name": "organisation/model",
    }
    return adapters.attach(model, LoraSpec(**{**request, **changes}))


def random_row(own: Adapters) -> torch.Tensor:
    return torch.randn(own.layout.size, generator=torch.Generator().manual_seed(3)) * 0.2


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_an_exported_folder_in_stock_peft_is_what_the_trainer_computed(
    tmp_path: Path, family: str, targets: tuple[str, ...] | str
) -> None:
    model, base = made(family, tmp_path / "model")
    own = attach(model, targets)
    row = random_row(own)
    own.bind(row[None])
    own.peft_form.write(tmp_path / "adapter", row)
    ids = torch.randint(2, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(4))
    ours = model(ids).logits
    untouched = loaded(family, base)
    plain = untouched(ids).logits
    assert float((ours - plain).abs().max()) > 0.05, "the adapter does nothing"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stock = PeftModel.from_pretrained(untouched, tmp_path / "adapter")
    assert not [str(one.message) for one in said if not _is_deprecation(one)]
    assert set(lora_layers(stock)) == set(own.layers)
    assert {layer.scaling["default"] for layer in lora_layers(stock).values()} == {GAMMA}
    torch.testing.assert_close(stock(ids).logits, ours, rtol=1e-5, atol=1e-5)
    stock.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    theirs = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert theirs.keys() == written.keys()
    assert all(torch.equal(theirs[name], written[name]) for name in theirs)
    merged = stock.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_a_model_without_weights_gives_the_same_layout(
    family: str, targets: tuple[str, ...] | str
) -> None:
    """So an export knows the places of a checkpoint's numbers."""
    with torch.device("meta"):
        empty = FAMILIES[family][0]()
    own, other = attach(empty, targets), attach(FAMILIES[family][0](), targets)
    assert own.layout == other.layout
    known, others = ({**one.peft_form.settings, "task_type": None} for one in (own, other))
    assert known == others


def _is_deprecation(one: warnings.WarningMessage) -> bool:
    return issubclass(one.category, DeprecationWarning | FutureWarning)


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_the_written_configuration_says_no_more_than_it_must(
    tmp_path: Path, family: str, targets: tuple[str, ...] | str
) -> None:
    """Plain JSON; the values of PEFT's own defaults but for what the trainer decides."""
    model, _ = made(family, tmp_path / "model")
    own = attach(model, targets)
    own.peft_form.write(tmp_path / "adapter", random_row(own))
    found = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert found["lora_alpha"] / found["r"] == GAMMA
    assert found["use_rslora"] is False
    assert found["base_model_name_or_path"] == "organisation/model"
    assert found["inference_mode"] is True
    assert found["fan_in_fan_out"] is (family == "gpt2")
    assert found["target_modules"] == sorted(found["target_modules"])
    decided = {"r", "lora_alpha", "base_model_name_or_path", "inference_mode", "fan_in_fan_out"}
    decided |= {"target_modules", "task_type", "lora_dropout"}
    default = json.loads(json.dumps(LoraConfig().to_dict()))
    assert {k: v for k, v in found.items() if k not in decided} == {
        k: v for k, v in default.items() if k not in decided
    }


def test_names_of_targets_are_short_where_a_short_name_matches_no_other_layer(
    tmp_path: Path,
) -> None:
    def exported(family: str, targets: tuple[str, ...] | str) -> list[str]:
        model, _ = made(family, tmp_path / family)
        own = attach(model, targets)
        own.peft_form.write(tmp_path / "adapter", random_row(own))
        names = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        return names["target_modules"]

    linear = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    assert exported("llama", "all-linear") == sorted(linear)
    assert exported("llama", r".*\.[qv]_proj") == ["q_proj", "v_proj"]
    assert exported("llama", ("layers.1.self_attn.q_proj", "v_proj")) == [
        "model.layers.1.self_attn.q_proj",
        "v_proj",
    ]


def test_a_pattern_adapts_the_layers_that_it_names_and_no_others_of_a_mixture_of_experts(
    tmp_path: Path,
) -> None:
    """PEFT by itself keeps only the last part of what a pattern matches there."""
    model, _ = made("mixtral", tmp_path / "model")
    own = attach(model, r".*layers\.0\.self_attn\.(q|v)_proj")
    assert sorted(own.layers) == [f"model.layers.0.self_attn.{x}_proj" for x in "qv"]


class Nested(nn.Module):
    """One name is the end of another's, so PEFT cannot tell the first from the second."""

    config = hf.PretrainedConfig()

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.ModuleDict({"q": nn.Linear(4, 4)})
        self.whole = nn.ModuleDict({"part": nn.ModuleDict({"q": nn.Linear(4, 4)})})
        self.dtype = torch.float32


def test_layers_that_peft_cannot_tell_apart_are_adapted_together_or_not_at_all() -> None:
    assert sorted(attach(Nested(), ("q",)).layers) == ["part.q", "whole.part.q"]
    assert sorted(attach(Nested(), ("whole.part.q",)).layers) == ["whole.part.q"]
    with pytest.raises(UserError, match=r"PEFT would adapt whole\.part\.q too"):
        attach(Nested(), r"part\.q")


def test_a_rank_or_scaling_that_peft_gives_a_layer_of_its_own_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = functools.partial(LoraConfig, alpha_pattern={"k_proj": 3})
    monkeypatch.setattr(adapters, "LoraConfig", own)
    model, _ = made("llama", tmp_path / "model")
    with pytest.raises(AssertionError, match="k_proj a rank or a scaling of its own"):
        attach(model, ATTENTION)


# --- values of the configuration -----------------------------------------------------------------


class Colour(str, enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (2.5, 2.5),
        ("text", "text"),
        (Colour.RED, "red"),
        ([1, "a"], [1, "a"]),
        ((1, 2), [1, 2]),
        (set(), []),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({2, 1}), [1, 2]),
        ({"a": {"c", "b"}}, {"a": ["b", "c"]}),
        ([{"x"}, (None,)], [["x"], [None]]),
    ],
)
def test_a_value_is_written_as_plain_json(value: object, plain: object) -> None:
    found = plain_json("key", value)
    assert found == plain
    assert json.loads(json.dumps(found)) == plain


@pytest.mark.parametrize(
    "value",
    [object(), b"bytes", math.nan, math.inf, {1: 2}, torch.float32, Path("x"), [LoraConfig], 1j],
)
def test_a_value_that_is_no_plain_json_is_an_error_and_never_its_printed_form(
    value: object,
) -> None:
    with pytest.raises(TypeError, match="key"):
        plain_json("key", value)


def test_every_field_of_pefts_configuration_has_a_plain_form() -> None:
    settings = LoraConfig(
        target_modules=["a", "b"],
        exclude_modules=["c"],
        target_parameters=["d"],
        layers_to_transform=[1, 2],
        rank_pattern={"a": 2},
        alpha_pattern={"a": 3.5},
        task_type="CAUSAL_LM",
        base_model_name_or_path="x",
    ).to_dict()
    plain = {key: plain_json(key, value) for key, value in settings.items()}
    read = LoraConfig(**json.loads(json.dumps(plain)))
    assert read.to_dict() == settings
