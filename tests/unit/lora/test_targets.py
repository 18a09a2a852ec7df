"""The layers that lora.target_modules names, and what is refused by the names the model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from sfed.lora import adapters, targets
from sfed.lora.adapters import LoraSpec
from sfed.utils.errors import UserError
from tests.support.families import FAMILIES, Family

WORDS = 64
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 72, "num_key_value_heads": 2, "head_dim": 8}
STRANGE = {
    "phimoe": Family(
        "PhiMoE", "PhimoeForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "mamba": Family("Mamba", "MambaForCausalLM", {**SIZES, "state_size": 4}),
    "dense layers beside experts": Family(
        "Qwen 3 MoE", "Qwen3MoeForCausalLM", {**GROUPED, **MOE, "mlp_only_layers": [0]}
    ),
}


def made(name: str) -> hf.PreTrainedModel:
    known = {family.name: family for family in FAMILIES} | STRANGE
    with torch.device("meta"):
        return known[name].built(WORDS)


def attached(name: str, asked: tuple[str, ...] | str) -> set[str]:
    """The last parts of the names of the adapted layers."""
    spec = LoraSpec(2, 1.0, 0.0, asked, "base")
    return targets.last_parts(adapters.attach(made(name), spec).layers)


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("Falcon", "dense, dense_4h_to_h, dense_h_to_4h, query_key_value"),
        ("Mixtral", "k_proj, o_proj, q_proj, v_proj"),
        ("phimoe", "k_proj, o_proj, q_proj, v_proj"),  # its routers are derived from nn.Linear
        ("GPT-2", "c_attn, c_fc, c_proj"),
    ],
)
def test_all_linear_layers_are_those_that_give_out_their_product(name: str, adapted: str) -> None:
    assert attached(name, "all-linear") == set(adapted.split(", "))


GEMMA_WITH_IMAGES = "Gemma 3 for images and text (trained on text)"


@pytest.mark.parametrize("asked", ["all-linear", ("q_proj", "k_proj")])
def test_of_a_model_for_images_and_text_the_language_model_is_adapted(asked: Any) -> None:
    model = made(GEMMA_WITH_IMAGES)
    names = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    assert any("vision_tower" in name for name in names)
    chosen = targets.chosen(model, asked)
    assert {name for name in chosen if name.endswith("q_proj")} == {
        name for name in names if ".language_model." in name
    }
    assert all(".language_model." in name for name in chosen)


def test_a_full_name_and_a_pattern_mean_what_they_match() -> None:
    model = made(GEMMA_WITH_IMAGES)
    of_vision = next(n for n, _ in model.named_modules() if n.endswith("q_proj") and "vision" in n)
    assert targets.chosen(model, (of_vision,)) == [of_vision]
    assert targets.chosen(model, r".*\.vision_tower\..*\.0\..*\.q_proj") == [of_vision]


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("LLaMA 2", ("q_proj", "qproj"), "'qproj' is no layer of this model; name some of down_pr"),
        ("LLaMA 2", r".*\.(q_proj", "it is not a valid regular expression (missing )"),
        ("LLaMA 2", r".*\.nothing", "it matches no layer of this model"),
        ("LLaMA 2", ("mlp",), "model.layers.0.mlp (LlamaMLP) is not a linear layer"),
        ("phimoe", ("router",), "model.layers.0.mlp.router (PhimoeTopKRouter) is not a linear"),
        (
            "Mixtral",
            ("experts", "q_proj"),
            "model.layers.0.mlp.experts (MixtralExperts) holds the weights of all experts as "
            "parameters, not as linear layers, and sfed adapts linear layers only; name some of "
            "k_proj, o_proj, q_proj, v_proj, or choose another model.name",
        ),
        (
            "Mixtral",
            ("gate_up_proj",),
            "'gate_up_proj' is no layer of this model; name some of",
        ),
        (
            "dense layers beside experts",
            "all-linear",
            "PEFT reads down_proj, gate_proj, up_proj as names of fused experts; name some of "
            "k_proj, o_proj, q_proj, v_proj, or choose",
        ),
        ("mamba", ("in_proj", "out_proj"), "name some of dt_proj, in_proj, x_proj, or choose"),
        ("mamba", ("in_proj", "out_proj"), "compatibility issues); name"),  # PEFT's last words
    ],
)
def test_what_cannot_be_adapted_is_refused_by_the_names_of_the_model(
    name: str, asked: tuple[str, ...] | str, said: str
) -> None:
    with pytest.raises(UserError) as refused:
        attached(name, asked)
    message = str(refused.value)
    assert message.startswith("lora.target_modules = ")
    assert said in message
    for of_a_wrapper in ("base_layer", "lora_A", "default", "base_model", "lm_head"):
        assert of_a_wrapper not in message


def test_a_model_without_linear_layers_offers_none() -> None:
    with pytest.raises(UserError, match=r"no linear layer .* choose another model\.name"):
        raise targets.wrong("all-linear", "it matches no layer", [])
