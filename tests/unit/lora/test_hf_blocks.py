"""Blocks in their lean forms, with adapters in groups, against plain modules with separate LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from sfed.bench.variants import VARIANTS, count
from sfed.bench.workload import Workload
from sfed.lora import adapters, hf_blocks
from sfed.lora.adapters import LoraSpec
from sfed.lora.linear import Probe
from sfed.models.synthetic import model_config
from tests.support.keys import token_keys

CLIENTS, ROWS, TOKENS, LORA_RANK, GAMMA = 3, 2, 9, 4, 0.7
FAMILIES = {
    "llama": LlamaConfig,
    "mistral, which slides a window": MistralConfig,
    "qwen2, which has biases": Qwen2Config,
    "qwen3, which has norms of q and k": Qwen3Config,
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # k and v are narrower than q
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "sliding_window": 4,
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.randint(0, 50, (CLIENTS * ROWS, TOKENS), generator=torch.Generator().manual_seed(2))


def make(family="llama", dtype=torch.float32, attention="sdpa"):
    """A frozen model of random weights, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[family](**SIZES), attn_implementation=attention
    )
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif "bias" in name:
            torch.nn.init.uniform_(weight, -0.2, 0.2)
    return model.requires_grad_(False).to(dtype)


def lean(model):
    quick = copy.deepcopy(model)
    hf_blocks.patch_blocks(quick)
    return quick


def attach(model, targets=LINEAR, dropout=0.0):
    return adapters.attach(model, LoraSpec(LORA_RANK, GAMMA, dropout, targets, "base"))


def rows_of(layout):
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(CLIENTS, layout.size, generator=generator)


def backward(model, **inputs):
    """The clients' losses, each a mean over its own tokens; gradients go where they go."""
    logits = model(input_ids=IDS, use_cache=False, **inputs).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none"
    )
    losses = losses.view(CLIENTS, -1).mean(dim=1)
    torch.autograd.backward(losses.sum())
    return losses.detach()


def of_separate_lora(model, layout, values):
    """The slow twin: transformers' own modules, and B A x added to each by autograd's means."""
    values = values.clone().requires_grad_()
    factors = {(piece.layer, piece.factor): piece.of(values) for piece in layout.pieces}

    def adapt(name):
        def hook(_module, inputs, y):
            x = inputs[0].view(CLIENTS, -1, inputs[0].shape[-1])
            a, b = factors[name, "A"], factors[name, "B"]
            return y + GAMMA * (x @ a.transpose(1, 2) @ b.transpose(1, 2)).view(y.shape)

        return hook

    for name in {piece.layer for piece in layout.pieces}:
        model.get_submodule(name).register_forward_hook(adapt(name))
    losses = backward(model)
    return losses, values.grad


def assert_close(ours, twin, tolerance=1e-5):
    scale = float(twin.abs().max())
    assert scale > 1e-4
    assert float((ours - twin).abs().max()) <= tolerance * scale


CASES = [(family, LINEAR, "AB") for family in FAMILIES]
CASES += [
    ("llama", targets, "AB")
    for targets in [
        ("q_proj", "v_proj"),
        ("k_proj",),
        ("gate_proj",),
        ("down_proj",),
        ("o_proj", "up_proj"),
    ]
]
CASES += [("llama", LINEAR, "A"), ("llama", LINEAR, "B"), ("llama", ("q_proj", "v_proj"), "B")]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("family", "targets", "trained"), CASES)
def test_groups_compute_what_separate_adapters_of_plain_modules_do(
    family, targets, trained, checkpointing
):
    model = make(family)
    quick = lean(model)
    attached = attach(quick, targets)
    assert {name.rpartition(".")[2] for name in attached.layers} == set(targets)
    values = rows_of(attached.layout)
    grads = torch.zeros_like(values)
    attached.bind(values, grads, trained)
    if checkpointing:
        quick.train().gradient_checkpointing_enable({"use_reentrant": False})
    losses = backward(quick)
    slow_losses, slow_grads = of_separate_lora(model, attached.layout, values)
    torch.testing.assert_close(losses, slow_losses, rtol=1e-6, atol=1e-6)
    for piece in attached.layout.pieces:
        if piece.factor in trained:
            assert_close(piece.of(grads), piece.of(slow_grads))
        else:
            assert not bool(piece.of(grads).any())


def test_a_group_gives_the_outputs_of_its_layers_bit_for_bit_and_their_gradients():
    """Transformers' own attention calls q, k and v one by one."""
    found = []
    for model in (make(), lean(make())):
        attached = attach(model)
        values = rows_of(attached.layout)
        grads = torch.zeros_like(values)
        attached.bind(values, grads, "AB")
        attention = model.model.layers[0].self_attn
        x = torch.randn(CLIENTS * ROWS, TOKENS, 64, generator=torch.Generator().manual_seed(4))
        x.requires_grad_()
        angles = model.model.rotary_emb(x, torch.arange(TOKENS)[None])
        output = attention((2 * x), angles, attention_mask=None)[0]
        torch.autograd.backward(output.square().sum())
        found.append((output.detach(), x.grad, grads))
    for slow, quick in zip(*found, strict=True):
        assert_close(quick, slow, 2e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_micro_passes_add_up(dropout):
    quick = lean(make())
    attached = attach(quick, dropout=dropout)
    attached.context.token_keys = token_keys((3, 4, 5), ROWS, TOKENS) if dropout else None
    values = rows_of(attached.layout)
    once, twice = torch.zeros_like(values), torch.zeros_like(values)
    attached.bind(values, once, "AB")
    backward(quick)
    attached.bind(values, twice, "AB")
    backward(quick)
    backward(quick)
    assert_close(twice, 2 * once, 1e-6)


def test_each_layer_of_a_model_has_dropout_masks_of_its_own():
    attached = attach(make(), dropout=0.5)
    attached.bind(rows_of(attached.layout))
    attached.context.token_keys = token_keys((3, 4, 5), ROWS, TOKENS)
    ones = torch.ones(CLIENTS * ROWS, TOKENS, 16)
    drops = [layer.dropout_of(ones) for layer in attached.layers.values()]
    masks = {tuple(drop(ones)[0].flatten().tolist()) for drop in drops}
    assert len(masks) == len(attached.layers)


def test_dropout_in_lean_blocks_is_that_of_layers_called_one_by_one():
    found = []
    for model in (make(), lean(make())):
        attached = attach(model, dropout=0.4)
        attached.context.token_keys = token_keys((3, 4, 5), ROWS, TOKENS)
        values = rows_of(attached.layout)
        grads = torch.zeros_like(values)
        attached.bind(values, grads, "AB")
        found.append((backward(model), grads))
    (slow_losses, slow_grads), (losses, grads) = found
    torch.testing.assert_close(losses, slow_losses, rtol=1e-6, atol=1e-6)
    assert_close(grads, slow_grads)


# --- passes in another dtype than the rows' ------------------------------------------------------


def test_bf16_passes_see_rows_that_have_changed_and_add_to_fp32_gradients():
    quick = lean(make(dtype=torch.bfloat16))
    attached = attach(quick)
    values = rows_of(attached.layout)
    grads = torch.zeros_like(values)
    attached.bind(values, grads, "AB")
    first = backward(quick)
    once = grads.clone()
    assert torch.equal(once, once.bfloat16().float())
    assert bool(once.any())
    backward(quick)
    assert torch.equal(grads, 2 * once), "nothing is left over from the pass before"
    values[:, attached.layout.columns("B")].mul_(3.0)  # as the optimizer does, through a view
    grads.zero_()
    second = backward(quick)
    moved = grads.clone()
    grads.zero_()
    attached.bind(values, grads, "AB")
    assert torch.equal(backward(quick), second)
    assert torch.equal(grads, moved)
    assert not torch.equal(first, second)


def test_gradients_of_a_bf16_pass_are_as_near_to_fp32_as_those_of_separate_adapters():
    model = make()
    layout = attach(make()).layout
    values = rows_of(layout).bfloat16().float()
    coarse = copy.deepcopy(model).to(torch.bfloat16)
    quick = lean(coarse)
    attached = attach(quick)
    grads = torch.zeros_like(values)
    attached.bind(values, grads, "AB")
    backward(quick)
    exact = of_separate_lora(model.bfloat16().float(), layout, values)[1]
    plain = of_separate_lora(coarse, layout, values.bfloat16())[1].float()
    assert float((grads - exact).norm()) <= 1.1 * float((plain - exact).norm())


# --- what transformers hands to attention --------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_windows_and_documents_are_honoured(family, attention):
    model = make(family, attention=attention).eval()
    quick = lean(model)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    documents = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)]).expand(len(IDS), -1)
    plain = model(input_ids=IDS).logits
    for inputs in ({"attention_mask": mask}, {"position_ids": documents}, {}):
        ours = quick(input_ids=IDS, use_cache=False, **inputs).logits
        expected = model(input_ids=IDS, use_cache=False, **inputs).logits
        seen = mask.bool() if "attention_mask" in inputs else torch.ones_like(IDS).bool()
        torch.testing.assert_close(ours[seen], expected[seen], rtol=1e-5, atol=1e-5)
        assert not inputs or not torch.allclose(expected[seen], plain[seen], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_written_with_a_cache_are_the_same(family):
    model = make(family).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    expected = model.generate(IDS, attention_mask=mask, **settings)
    assert torch.equal(lean(model).generate(IDS, attention_mask=mask, **settings), expected)


def test_attention_weights_are_handed_on():
    model = make(attention="eager").eval()
    weights = lean(model)(input_ids=IDS, output_attentions=True).attentions
    expected = model(input_ids=IDS, output_attentions=True).attentions
    assert len(weights) == len(expected) == 2
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_a_class_that_only_has_the_name_stays_as_it_is():
    class Namesake(LlamaAttention):
        pass

    Namesake.__name__ = "LlamaAttention"
    model = make()
    own = model.model.layers[0].self_attn
    own.__class__ = Namesake
    hf_blocks.patch_blocks(model)
    assert "forward" not in vars(own)
    assert "forward" in vars(model.model.layers[1].self_attn)


# --- the probe and the counts --------------------------------------------------------------------


def test_the_probe_sees_every_adapters_output():
    model = make()
    quick = lean(model)
    attached = attach(quick)
    values = rows_of(attached.layout)
    attached.bind(values)
    attached.context.probe = Probe.of(torch.ones_like(IDS).bool())
    with torch.no_grad():
        quick(input_ids=IDS, use_cache=False)
    found, attached.context.probe = attached.context.probe, None
    expected = torch.zeros(len(IDS))
    pieces = {(piece.layer, piece.factor): piece.of(values) for piece in attached.layout.pieces}

    def adapted(_module, x, y, name):
        x_CMI = x[0].view(CLIENTS, -1, x[0].shape[-1])
        a, b = pieces[name, "A"], pieces[name, "B"]
        added = GAMMA * (x_CMI @ a.transpose(1, 2) @ b.transpose(1, 2)).view(y.shape)
        expected.add_(added.square().mean(dim=-1).sum(dim=1))
        return y + added

    for name in attached.layers:
        model.get_submodule(name).register_forward_hook(
            lambda module, x, y, name=name: adapted(module, x, y, name)
        )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    torch.testing.assert_close(found.sum_squares, expected, rtol=1e-4, atol=1e-6)
    assert found.count.tolist() == [TOKENS * len(attached.layers)] * len(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("targets", "most"), [("all-linear", 101), (("q_proj", "v_proj"), 74)], ids=["all", "q and v"]
)
def test_a_layer_takes_few_operations(targets, most, dtype):
    """Whatever its dimensions; of PEFT's 203 and 128 on a bf16 backbone."""
    load = Workload(2, 1, 4, 16, targets, dtype)
    variants = [variant for variant in VARIANTS if variant.key in "cd"]
    found = count(variants, model_config("llama-30m", None, 2), load, torch.device("cpu"))
    assert {one.operations for one in found.values()} == {most}
