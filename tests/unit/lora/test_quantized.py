"""Quantised frozen layers: their product, what is chosen, what is stored."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from sfed.distributed import world as distributed
from sfed.federated.fingerprints import of_backbone
from sfed.lora.adapters import LoraSpec, attach
from sfed.lora.frozen.quantized import (
    QuantisedLinear,
    Stored,
    chosen_layers,
    loading_settings,
    put_stand_ins,
    quantised_layers,
    take_over,
    total_weights,
)
from sfed.utils.errors import UserError
from tests.support.deadlines import RUN_SECONDS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
INNER = {**SIZES, "intermediate_size": 56, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 48, "n_positions": 64}
MIXTRAL = {**INNER, "num_key_value_heads": 2, "num_local_experts": 4}
LLAMA = {**INNER, "num_key_value_heads": 2, "tie_word_embeddings": True}
SCHEMES = ["nf4", "int8"]


def build(kind: str, sizes: dict[str, Any], device: str = "cpu") -> Any:
    of_kind = getattr(transformers, kind)
    torch.manual_seed(0)
    with torch.device(device):
        return of_kind(of_kind.config_class(**sizes)).eval().requires_grad_(False)


def linear(scheme: str, dtype: torch.dtype, sizes: tuple[int, int] = (96, 40)) -> Any:
    """A layer of bitsandbytes with random weights that it has quantised, and the weights."""
    torch.manual_seed(1)
    plain = nn.Linear(*sizes, dtype=dtype)
    if scheme == "nf4":
        theirs: Any = bitsandbytes.nn.Linear4bit(
            *sizes, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
        )
    else:
        theirs = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to(dtype).to("cpu")
    theirs.source_cls = nn.Linear
    return theirs, plain.weight.detach()


class Holder(nn.Module):
    """A model of one layer, as far as ``take_over`` looks at one."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.dtype = dtype
        self.hf_quantizer = self
        self.config = transformers.LlamaConfig()

    def remove_quantization_config(self, model: nn.Module) -> None:
        assert model is self


def ours(theirs: nn.Module, dtype: torch.dtype) -> QuantisedLinear:
    holder = Holder(theirs, dtype)
    take_over(holder, torch.device("cpu"))  # type: ignore[arg-type]
    assert isinstance(holder.layer, QuantisedLinear)
    return holder.layer


def gradient(make: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[Any, Any]:
    x = x.clone().requires_grad_()
    y = make(x)
    torch.autograd.backward(y.float().square().sum())
    return y.detach(), x.grad


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_its_dequantised_weight_bit_by_bit(scheme: str, dtype: torch.dtype) -> None:
    theirs, weight = linear(scheme, dtype)
    layer, x = ours(theirs, dtype), torch.randn(2, 3, 96, dtype=dtype)
    dequantised = layer.dequantise(layer.weight)
    assert dequantised.dtype == dtype and dequantised.shape == weight.shape
    expected = gradient(lambda x: functional.linear(x, dequantised, layer.bias), x)
    found = gradient(layer, x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_agrees_with_that_of_bitsandbytes_and_does_not_warn(scheme: str) -> None:
    theirs, weight = linear(scheme, torch.float32)
    layer, x = ours(theirs, torch.float32), torch.randn(5, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradient(layer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = gradient(theirs, x)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6
    error = (layer.dequantise(layer.weight) - weight).abs().max() / weight.abs().max()
    assert 0 < error < {"nf4": 0.2, "int8": 0.01}[scheme]


def test_an_odd_number_of_weights_is_stored() -> None:
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles what it does of them
        theirs, weight = linear("nf4", torch.float32, (7, 5))
        layer = ours(theirs, torch.float32)
        assert layer.weight.numel() == 18
        assert layer.dequantise(layer.weight).shape == weight.shape


def test_the_backward_pass_keeps_codes_and_nothing_else() -> None:
    layer = ours(linear("nf4", torch.float32)[0], torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 96, requires_grad=True))
    assert [one is layer.weight for one in kept] == [True]


@pytest.mark.parametrize(
    ("kind", "sizes", "count", "others"),
    [
        ("LlamaForCausalLM", LLAMA, 14, ["lm_head"]),
        ("GPT2LMHeadModel", GPT2, 8, ["lm_head"]),
        ("BertForSequenceClassification", INNER, 12, ["bert.pooler.dense", "classifier"]),
    ],
)
def test_linear_layers_within_the_transformer_are_chosen(
    kind: str, sizes: dict[str, Any], count: int, others: list[str]
) -> None:
    model = build(kind, sizes, "meta")
    chosen = chosen_layers(model, "nf4")
    assert len(chosen) == count and not set(others) & chosen.keys()
    skipped = loading_settings(model, "nf4", torch.float32).llm_int8_skip_modules
    assert [name.strip("^$").replace("\\", "") for name in skipped] == others


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("MixtralForCausalLM", MIXTRAL, "MixtralExperts"),
        ("AlbertForSequenceClassification", INNER, "no list of as many layers"),
    ],
)
def test_a_model_of_other_weights_is_refused(kind: str, sizes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=rf"model.quantization = 'nf4': .*{reason}"):
        chosen_layers(build(kind, sizes, "meta"), "nf4")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("kind", "sizes"), [("LlamaForCausalLM", LLAMA), ("GPT2LMHeadModel", GPT2)]
)
def test_stand_ins_store_what_a_loaded_model_stores(
    scheme: Any, kind: str, sizes: dict[str, Any], tmp_path: Any
) -> None:
    plain = build(kind, sizes)
    plain.save_pretrained(tmp_path)
    counted = build(kind, sizes, "meta")
    settings = loading_settings(counted, scheme, torch.float32)
    weights = total_weights(counted)
    put_stand_ins(counted, scheme, torch.float32)
    loaded = type(plain).from_pretrained(tmp_path, quantization_config=settings)
    take_over(loaded, torch.device("cpu"))
    assert Stored.of(loaded) == Stored.of(counted)
    assert total_weights(loaded) == total_weights(counted) == weights
    assert [name for name, _ in quantised_layers(loaded)] == list(chosen_layers(plain, scheme))
    assert Stored.of(counted).bytes(torch.bfloat16) < 2 * weights
    assert not loaded.is_quantized and not hasattr(loaded.config, "quantization_config")


def test_a_layer_that_transformers_leaves_as_it_is_is_named(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build("LlamaForCausalLM", LLAMA)
    plain.save_pretrained(tmp_path)
    settings = loading_settings(plain, "nf4", torch.float32)
    monkeypatch.setattr(type(plain), "_keep_in_fp32_modules", ["down_proj"])
    loaded = type(plain).from_pretrained(tmp_path, quantization_config=settings)
    with pytest.raises(UserError, match=r"keeps model.layers.0.mlp.down_proj of LlamaForCausalLM"):
        take_over(loaded, torch.device("cpu"))


def test_weights_that_int8_cannot_hold_are_refused() -> None:
    """bitsandbytes makes fp16 numbers of them first."""
    theirs, _ = linear("int8", torch.float32)
    theirs.weight.SCB[3] = torch.inf
    with pytest.raises(UserError, match="weights of the layer layer are not finite"):
        ours(theirs, torch.float32)


@pytest.mark.parametrize(
    ("kind", "sizes", "is_transposed"),
    [("LlamaForCausalLM", LLAMA, False), ("GPT2LMHeadModel", GPT2, True)],
)
def test_adapters_and_their_export_are_those_of_the_plain_model(
    kind: str, sizes: dict[str, Any], is_transposed: bool, tmp_path: Any
) -> None:
    plain = build(kind, sizes)
    plain.save_pretrained(tmp_path)
    settings = loading_settings(plain, "nf4", torch.float32)
    loaded = type(plain).from_pretrained(tmp_path, quantization_config=settings)
    take_over(loaded, torch.device("cpu"))
    spec = LoraSpec(4, 2.0, 0.0, "all-linear", "base")
    one, other = attach(plain, spec), attach(loaded, spec)
    assert one.layout.pieces == other.layout.pieces
    assert one.peft_form.settings == other.peft_form.settings
    assert other.peft_form.settings["fan_in_fan_out"] is is_transposed


def test_the_digest_of_a_backbone_covers_scales() -> None:
    layer = ours(linear("int8", torch.float32)[0], torch.float32)
    world = distributed.start(RUN_SECONDS)
    try:
        before = of_backbone(world, nn.Sequential(layer), {})
        layer.dequantise.scales[0] += 1e-3
        assert of_backbone(world, nn.Sequential(layer), {}) != before
    finally:
        distributed.stop(world)
