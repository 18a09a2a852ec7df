"""The lean forms save little and compute what the plain modules compute."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from sfed.kernels.interface import DropoutMask
from sfed.kernels.plain.dropout import dropout
from sfed.lora import adapters, hf_blocks, linear
from sfed.lora.adapters import LoraSpec
from sfed.lora.factors import Factors, PassRows
from sfed.lora.layout import Layout
from sfed.memory.live_bytes import LiveBytes
from tests.support.keys import token_keys

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
FAMILIES |= {"qwen3": Qwen3Config}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 50,
}


def make(config, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False).to(dtype)


def attach(model: torch.nn.Module, num_clients: int, lora_rank: int = 4, dropout: float = 0.0):
    """Adapters of random factors; returns them with the buffer that collects gradients."""
    attached = adapters.attach(model, LoraSpec(lora_rank, 0.7, dropout, "all-linear", "base"))
    torch.manual_seed(1)
    values = 0.1 * torch.randn(num_clients, attached.layout.size)
    grads = torch.zeros_like(values)
    attached.bind(values, grads, ("A", "B"))
    return attached, values, grads


def losses_and_gradients(model: torch.nn.Module, checkpointing: bool = False):
    _, _, grads = attach(model, num_clients=3)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(2)
    ids = torch.randint(0, 50, (6, 11))
    logits = model(input_ids=ids, use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    losses.view(6, -1).mean(dim=1).sum().backward()
    return losses.detach(), grads


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_lean_forms_compute_what_the_modules_compute(family, checkpointing):
    model = make(FAMILIES[family](**SIZES))
    quick = copy.deepcopy(model)
    hf_blocks.patch_blocks(quick)
    assert any("forward" in vars(module) for module in quick.modules())
    slow_losses, slow_grads = losses_and_gradients(model)
    quick_losses, quick_grads = losses_and_gradients(quick, checkpointing)
    assert float(slow_grads.abs().max()) > 1e-3
    torch.testing.assert_close(quick_losses, slow_losses, rtol=1e-6, atol=1e-6)
    scale = float(slow_grads.abs().max())
    assert float((quick_grads - slow_grads).abs().max()) <= 1e-6 * scale


def test_in_bf16_the_lean_forms_are_no_further_from_fp32_than_the_modules_are():
    exact_model = make(LlamaConfig(**SIZES))
    model = copy.deepcopy(exact_model).to(torch.bfloat16)
    quick = copy.deepcopy(model)
    hf_blocks.patch_blocks(quick)
    exact = losses_and_gradients(exact_model)[1]
    plain_error = (losses_and_gradients(model)[1] - exact).norm()
    quick_error = (losses_and_gradients(quick)[1] - exact).norm()
    assert float(quick_error) <= 1.1 * float(plain_error)
    assert float(quick_error) < 0.1 * float(exact.norm())


def test_an_activation_that_is_no_silu_stays_as_it_is():
    model = make(LlamaConfig(**SIZES, hidden_act="gelu"))
    quick = copy.deepcopy(model)
    hf_blocks.patch_blocks(quick)
    assert not any("forward" in vars(layer.mlp) for layer in quick.model.layers)
    slow, fast = losses_and_gradients(model), losses_and_gradients(quick)
    torch.testing.assert_close(fast[1], slow[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trained", ["A", "B", "AB"])
@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_an_adapter_saves_its_input_for_a_and_a_x_for_b(trained, probability):
    layout = Layout.of([("layer", 5, 6)], lora_rank=3)
    values, grads = torch.randn(2, layout.size), torch.zeros(2, layout.size)
    rows = PassRows(values, grads, torch.float32)
    factors = Factors.of(rows, layout.pieces[:1], layout.pieces[1:], trained)
    x, y = torch.randn(2, 7, 5, requires_grad=True), torch.randn(2, 7, 6, requires_grad=True)
    mask = DropoutMask(torch.arange(14) * 2**35 + 1, probability)
    (factors_of_x,) = dropout(mask, torch.ones(2, 7, 5))
    shapes = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        drop = partial(dropout, mask) if probability else None
        (output,) = linear.add_lora((y.clone(),), x, linear.LoraTerm(factors, 0.5, drop))
    assert ((2, 7, 5) in shapes) == ("A" in trained)
    assert ((2, 7, 3) in shapes) == ("B" in trained)
    torch.autograd.backward(output.square().sum())
    a, b = (piece.of(values).clone().requires_grad_() for piece in layout.pieces)
    plain_x, plain_y = (tensor.detach().requires_grad_() for tensor in (x, y))
    dropped = plain_x * factors_of_x
    assert bool((dropped == 0.0).any()) == bool(probability)
    twin = plain_y + 0.5 * dropped @ a.transpose(1, 2) @ b.transpose(1, 2)
    torch.testing.assert_close(output, twin)
    torch.autograd.backward(twin.square().sum())
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.grad, plain_y.grad, rtol=1e-5, atol=1e-5)
    for piece, its in zip(layout.pieces, (a, b), strict=True):
        expected = its.grad if piece.factor in trained else torch.zeros_like(its)
        torch.testing.assert_close(piece.of(grads), expected, rtol=1e-5, atol=1e-5)


# --- what is saved -------------------------------------------------------------------------------


def saved_bytes(config: LlamaConfig, tokens: int, dropout: float) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside weights and factors.

    Storages are counted once. Copies of factors in the backbone's dtype, which do not grow with
    the tokens, cancel in the differences below.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").requires_grad_(False)  # the numbers do not matter
    hf_blocks.patch_blocks(model)
    attached, values, grads = attach(model, num_clients=1, lora_rank=16, dropout=dropout)
    if dropout:
        attached.context.token_keys = token_keys((3,), 1, tokens)
    held = [*model.parameters(), *model.buffers(), values, grads]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.randint(0, config.vocab_size, (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=ids, use_cache=False)
    return sum(found.values())


def per_token_and_layer(sizes: dict[str, int], dropout: float = 0.0) -> float:
    def of(layers: int, tokens: int) -> int:
        return saved_bytes(LlamaConfig(**{**sizes, "num_hidden_layers": layers}), tokens, dropout)

    return ((of(2, 96) - of(1, 96)) - (of(2, 32) - of(1, 32))) / 64


def least(d: int, kv: int, f: int, heads: int, r: int = 16) -> int:
    """x twice, q, k, v, attention out, gate, up and seven A x in bf16; in fp32 two scales of the
    norms and attention's log-sum-exp."""
    return 2 * (2 * d + d + 2 * kv + d + 2 * f + 7 * r) + 4 * (2 + heads)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_saves_what_nothing_can_do_without(dropout):
    """Neither masks nor what is left of an input: both are made again."""
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 64}
    assert per_token_and_layer(sizes, dropout) == least(128, 128, 320, 4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_checkpointed_layer_keeps_its_input_alone(dropout):
    def kept(layers: int, tokens: int = 40) -> int:
        model = make(LlamaConfig(**{**SIZES, "num_hidden_layers": layers}))
        hf_blocks.patch_blocks(model)
        attached, *_held = attach(model, num_clients=1, dropout=dropout)
        if dropout:
            attached.context.token_keys = token_keys((3,), 1, tokens)
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        with LiveBytes() as live:
            _hidden = model.model(input_ids=torch.zeros(1, tokens, dtype=torch.int64))
        return live.now

    assert kept(3) - kept(2) == 40 * 4 * SIZES["hidden_size"]


@pytest.mark.slow
def test_on_llama_2_7b_dimensions_that_is_93544_bytes():
    assert least(4096, 4096, 11008, 32) == 93_544
    assert per_token_and_layer({"vocab_size": 64}) == 93_544
