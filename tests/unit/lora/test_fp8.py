"""FP8 products: against their definition, which layers, which devices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sfed.distributed import world as distributed
from sfed.federated.fingerprints import of_backbone
from sfed.kernels.choice import OPTIONS, choose
from sfed.kernels.plain.quantise import CODES, quantise
from sfed.lora.adapters import LoraSpec, attach
from sfed.lora.frozen import fp8
from sfed.lora.frozen.fp8 import Fp8Linear, chosen_layers, convert
from sfed.lora.frozen.quantized import Stored, total_weights
from sfed.lora.hf_blocks import patch_blocks
from sfed.utils.errors import UserError
from tests.support import interpreter
from tests.support.deadlines import RUN_SECONDS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
INNER = {**SIZES, "intermediate_size": 80, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 48, "n_positions": 64}
MIXTRAL = {**INNER, "num_key_value_heads": 2, "num_local_experts": 4}
LLAMA = {**INNER, "num_key_value_heads": 2, "tie_word_embeddings": True}
# What sums of up to 64 products may differ by, of the sum of their absolute values.
SUMS = 1e-5
BF16_STEP = 2.0**-8


def build(kind: str, sizes: dict[str, Any], device: str = "cpu") -> Any:
    of_kind = getattr(transformers, kind)
    torch.manual_seed(0)
    with torch.device(device):
        return of_kind(of_kind.config_class(**sizes)).eval().requires_grad_(False)


# --- the definition, written once more -----------------------------------------------------------


def values_of_e4m3() -> list[float]:
    """All numbers of e4m3 that are not negative, by their codes: 4 bits exponent, 3 mantissa."""
    found = []
    for code in range(127):
        exponent, mantissa = divmod(code, 8)
        of_code = (mantissa / 8) * 2.0**-6
        found.append((1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else of_code)
    return found


GRID = np.array(values_of_e4m3())


def to_e4m3(numbers: np.ndarray) -> np.ndarray:
    """The nearest number of e4m3, of two equally near ones that with the even code."""
    size = np.abs(numbers)
    above = np.searchsorted(GRID, size).clip(0, len(GRID) - 1)
    below = (above - 1).clip(0)
    up, down = GRID[above] - size, size - GRID[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(GRID[code], numbers)


def rounded(rows: torch.Tensor) -> np.ndarray:
    """Q(rows) in fp64."""
    numbers = rows.float().numpy()
    largest = np.abs(numbers).max(axis=1, keepdims=True)
    tiny = np.finfo(np.float32).tiny
    scales = np.maximum(largest / np.float32(448), tiny).astype(np.float32)
    return to_e4m3((numbers / scales).astype(np.float64)) * scales


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Fp8Linear:
    return Fp8Linear(weight, None if bias is None else nn.Parameter(bias, requires_grad=False))


def gradient(make: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, g: torch.Tensor) -> Any:
    x = x.clone().requires_grad_()
    y = make(x)
    y.backward(g)
    return y.detach(), x.grad


def require_near(found: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
    """It is rows @ columns.T but for the order of sums, and the rounding to its dtype."""
    expected, size = rows @ columns.T, np.abs(rows) @ np.abs(columns).T
    step = BF16_STEP if found.dtype == torch.bfloat16 else 0.0
    allowed = SUMS * size + step * np.abs(expected) + np.finfo(np.float32).tiny
    assert (np.abs(found.double().numpy() - expected) <= allowed).all()


def test_the_grid_of_the_tests_is_that_of_torch() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(CODES)
    assert codes.double().tolist() == GRID.tolist()
    halves = np.array([(one + other) / 2 for one, other in pairwise(GRID)])
    assert to_e4m3(halves).tolist() == torch.from_numpy(halves).float().to(CODES).double().tolist()


cases = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 5),
        "sizes": st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 48])),
        "exponent": st.integers(-37, 15),
        "outlier": st.sampled_from([1.0, 1e3, 1e6]),
        "has_zeros": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "seed": st.integers(0, 2**31),
    }
)


def drawn(case: dict[str, Any], width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case["seed"] + width)
    numbers = torch.randn(case["rows"], width, generator=generator) * 10.0 ** case["exponent"]
    if case["rows"]:
        numbers[-1, 3] *= case["outlier"]
        numbers[0] *= not case["has_zeros"]
    return numbers.to(case["dtype"])


@settings(deadline=None, max_examples=60)
@given(cases)
def test_output_and_gradient_are_those_of_the_definition(case: dict[str, Any]) -> None:
    width, height = case["sizes"]
    weight = torch.randn(height, width, generator=torch.Generator().manual_seed(case["seed"]))
    x, g = drawn(case, width), drawn({**case, "seed": case["seed"] + 1}, height)
    output, grad_x = gradient(layer_of(weight), x, g)
    assert output.dtype == grad_x.dtype == case["dtype"]
    assert output.shape == g.shape and grad_x.shape == x.shape
    if case["rows"]:
        require_near(output, rounded(x), rounded(weight))
        require_near(grad_x, rounded(g), rounded(weight.t().contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 16), (7, 64, 48), (300, 256, 96)])
def test_scaled_products_are_those_of_dequantised_numbers(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """On this device they are the emulation: fp32 arithmetic on quantised values."""
    rows, width, height = shape
    torch.manual_seed(2)
    x, weight = torch.randn(rows, width, dtype=dtype), torch.randn(height, width)
    found = layer_of(weight)(x).float()
    expected = fp8.defined_product(quantise(x), quantise(weight))
    apart = (found - expected).abs().max() / expected.abs().max()
    assert apart <= {torch.float32: 1e-6, torch.bfloat16: BF16_STEP}[dtype]


def test_a_bias_is_added_and_any_shape_is_taken() -> None:
    torch.manual_seed(3)
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(2, 3, 32)
    plain, layer = layer_of(weight), layer_of(weight, bias)
    assert torch.equal(layer(x), plain(x) + bias)
    assert torch.equal(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
    torch.testing.assert_close(plain(x)[1, 2], plain(x[1, 2]))
    strided = torch.randn(5, 64)[:, ::2]
    assert torch.equal(plain(strided), plain(strided.contiguous()))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_does_not_vanish(bad: float) -> None:
    """A cast to e4m3 alone makes 448 of an infinity."""
    weight, x, g = torch.randn(16, 32), torch.randn(3, 32), torch.randn(3, 16)
    x[1, 5], g[2, 7] = bad, bad
    output, grad_x = gradient(layer_of(weight), x, g)
    assert output.isnan().all(dim=1).tolist() == [False, True, False]
    assert output[[0, 2]].isfinite().all()
    assert grad_x.isnan().all(dim=1).tolist() == [False, False, True]
    assert grad_x[:2].isfinite().all()


def test_rows_do_not_change_each_other() -> None:
    """With one scale for all rows, the largest number of a client would round those of others."""
    torch.manual_seed(4)
    layer, x = layer_of(torch.randn(32, 32)), torch.randn(4, 32)
    other = torch.cat([x[:2], x[2:] * 1e6])
    assert torch.equal(layer(x)[:2], layer(other)[:2])


def test_a_plain_product_of_codes_is_something_else() -> None:
    torch.manual_seed(5)
    weight, x = torch.randn(16, 64), torch.randn(8, 64)
    (codes, scales), (columns, column_scales) = quantise(x), quantise(weight)
    plain = (codes @ columns.t()).float() * scales * column_scales.t()
    found = layer_of(weight)(x)
    expected = fp8.defined_product((codes, scales), (columns, column_scales))
    apart = [float((one - expected).norm() / expected.norm()) for one in (plain, found)]
    assert apart[0] > 0.02 and apart[1] < 1e-6
    assert not layer_of(weight).weight.is_floating_point(), "a plain product would find float8"


def test_the_backward_pass_keeps_what_the_layer_holds_and_nothing_else() -> None:
    layer, kept = layer_of(torch.randn(16, 32)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 32, requires_grad=True))
    held = {one.data_ptr() for one in (layer.transposed, layer.scales[1])}
    assert {one.data_ptr() for one in kept} == held


def test_other_inputs_are_refused() -> None:
    with pytest.raises(TypeError, match="bf16 and fp32, not torch"):
        layer_of(torch.randn(16, 32))(torch.randn(2, 32).to(CODES))


def test_layers_that_share_an_input_give_the_bits_of_each_by_itself() -> None:
    torch.manual_seed(6)
    x, bias = torch.randn(2, 3, 32), torch.randn(16)
    layers = [
        layer_of(torch.randn(48, 32)),
        nn.Linear(32, 8).requires_grad_(False),
        layer_of(torch.randn(16, 32) * 100, bias),
    ]
    one, other = (x.clone().requires_grad_() for _ in range(2))
    together, apart = fp8.outputs_of(layers, one), [layer(other) for layer in layers]
    for found, expected in zip(together, apart, strict=True):
        assert torch.equal(found, expected)
    for outputs in (together, apart):
        torch.cat(outputs, dim=-1).square().sum().backward()
    assert torch.equal(one.grad, other.grad)


def test_q_k_and_v_quantise_their_input_once_and_so_do_gate_and_up() -> None:
    """Forward: x of q, k, v; of o; of gate, up; of down. Backward: the gradient of each output."""
    model, widths = build("LlamaForCausalLM", LLAMA), []
    convert(model, lambda x: widths.append(x.shape[1]) or quantise(x))
    attached = attach(model, LoraSpec(4, 2.0, 0.0, "all-linear", "base"))
    patch_blocks(model)
    values, grads = (torch.zeros(1, attached.layout.size) for _ in range(2))
    attached.bind(values, grads, "AB")
    output = model(inputs_embeds=torch.randn(1, 5, 32, requires_grad=True)).logits
    assert widths == [32, 32, 32, 80] * 2
    widths.clear()
    output.sum().backward()
    assert sorted(widths) == sorted([32, 32, 16, 16, 80, 80, 32] * 2)


def test_kernels_of_triton_give_the_same_bits() -> None:
    interpreter.require()
    kernels = choose("triton", torch.device("cpu"), torch.float32, OPTIONS)
    weight, x, g = torch.randn(48, 32), torch.randn(3, 5, 32), torch.randn(3, 5, 48)
    fused = Fp8Linear(weight, None, rounding=kernels.quantise)
    for found, plain in zip(gradient(fused, x, g), gradient(layer_of(weight), x, g), strict=True):
        assert torch.equal(found, plain)


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sizes", "count", "transposed"),
    [
        ("LlamaForCausalLM", LLAMA, 14, False),
        ("GPT2LMHeadModel", GPT2, 8, True),
        ("BertForSequenceClassification", INNER, 12, False),
    ],
)
def test_a_model_is_converted_and_adapted(
    kind: str, sizes: dict[str, Any], count: int, transposed: bool
) -> None:
    plain, model, counted = build(kind, sizes), build(kind, sizes), build(kind, sizes, "meta")
    weights, names = total_weights(plain), chosen_layers(plain)
    for one in (model, counted):
        convert(one)
        assert [name for name, _ in fp8.fp8_layers(one)] == names and len(names) == count
        assert total_weights(one) == weights
    assert Stored.of(model) == Stored.of(counted)
    own = plain.get_submodule(names[0])
    layer = model.get_submodule(names[0])
    weight = own.weight.t() if isinstance(own, Conv1D) else own.weight
    assert torch.equal(layer.weight, quantise(weight)[0].view(torch.uint8))
    fp8.refuse_nonfinite(model)
    spec = LoraSpec(4, 2.0, 0.0, "all-linear", "base")
    one, other = attach(plain, spec), attach(model, spec)
    assert one.layout.pieces == other.layout.pieces
    assert one.peft_form.settings == other.peft_form.settings
    assert other.peft_form.settings["fan_in_fan_out"] is transposed
    assert f"{count} linear layers" in str(fp8.summary(model)) and fp8.summary(plain) is None


def test_stored_bytes_are_two_codes_a_weight_and_scales() -> None:
    plain, model = (build("LlamaForCausalLM", LLAMA) for _ in range(2))
    convert(model)
    linear = sum(layer.in_features * layer.out_features for _, layer in fp8.fp8_layers(model))
    sides = sum(layer.in_features + layer.out_features for _, layer in fp8.fp8_layers(model))
    assert Stored.of(model) == Stored(total_weights(plain) - linear, 2 * linear, 4 * sides)


def test_layers_of_other_sizes_stay_and_are_said() -> None:
    """40 is no multiple of 16: the inner size of one of the MLPs."""
    sizes = {**LLAMA, "num_hidden_layers": 3}
    model = build("LlamaForCausalLM", sizes)
    for name in ("gate_proj", "up_proj", "down_proj"):
        inner = (32, 40) if name != "down_proj" else (40, 32)
        model.set_submodule(f"model.layers.1.mlp.{name}", nn.Linear(*inner, bias=False))
    convert(model)
    left = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    assert left == [f"model.layers.1.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")]
    said = str(fp8.summary(model))
    assert said.endswith("; float32 for 3 linear layers with sizes that are no multiples of 16")


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("MixtralForCausalLM", MIXTRAL, "only [0-9]+ % of the weights"),
        ("AlbertForSequenceClassification", INNER, "no list of as many layers"),
        ("LlamaForCausalLM", {**LLAMA, "intermediate_size": 72}, "multiples of 16"),
    ],
)
def test_a_model_of_other_weights_is_refused(kind: str, sizes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=rf"backbone.compute = 'fp8': .*{reason}.*compute=full"):
        chosen_layers(build(kind, sizes, "meta"))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = build("LlamaForCausalLM", LLAMA)
    model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    convert(model)
    with pytest.raises(UserError, match=r"layer model\.layers\.1\.mlp\.up_proj are not finite"):
        fp8.refuse_nonfinite(model)


def test_the_digest_of_a_backbone_covers_codes_and_scales() -> None:
    world = distributed.start(RUN_SECONDS)
    try:
        layer = layer_of(torch.randn(16, 32))
        digests = {of_backbone(world, layer, {})}
        for changed in (layer.weight, layer.transposed, *layer.scales):
            changed.data[0, 0] += 1
            digests.add(of_backbone(world, layer, {}))
        assert len(digests) == 5
    finally:
        distributed.stop(world)


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((8, 9), torch.bfloat16, None),
        ((10, 0), torch.bfloat16, None),
        ((8, 6), torch.bfloat16, "GPU has compute capability 8.6, and FP8 products need 8.9"),
        ((7, 5), torch.float32, "compute capability 7.5"),
        ((9, 0), torch.float32, "set it to bf16"),
        (None, torch.bfloat16, "no GPU of NVIDIA"),
    ],
)
def test_a_gpu_that_lacks_these_products_is_told(
    capability: Any, dtype: torch.dtype, reason: str | None
) -> None:
    told = fp8.lack_of_gpu("GPU", capability, dtype)
    assert told is None if reason is None else told is not None and reason in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_device_is_tried_and_has_them(dtype: torch.dtype) -> None:
    fp8.refuse_device(torch.device("cpu"), dtype)


@pytest.mark.parametrize("broken", ["wrong", "missing"])
def test_a_device_that_computes_something_else_is_refused(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = torch._scaled_mm

    def other(*args: Any, **kwargs: Any) -> torch.Tensor:
        if broken == "missing":
            raise NotImplementedError("no kernel for this device")
        return scaled(*args, **kwargs) * 1.1

    monkeypatch.setattr(torch, "_scaled_mm", other)
    reason = {"wrong": "gives wrong products on cpu", "missing": "no kernel for this device"}
    with pytest.raises(UserError, match=rf"{reason[broken]}.*; set backbone.compute=full"):
        fp8.refuse_device(torch.device("cpu"), torch.bfloat16)


def test_stock_peft_wraps_an_fp8_layer_as_a_linear_one() -> None:
    model = build("LlamaForCausalLM", LLAMA)
    convert(model)
    config = LoraConfig(r=4, target_modules=["q_proj"])
    found: Any = get_peft_model(model, config, low_cpu_mem_usage=True)
    wrapped = found.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(wrapped.get_base_layer(), Fp8Linear)
