"""Kernels of Triton against the plain operations, in Triton's interpreter, which needs no GPU.

The interpreter rounds to bf16 towards 0: by up to 2^-7 of a number, on a GPU by half of that. Shape
suffixes: C clients, N parameters of a row.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed (pip install 'sfed[kernels]')")

from sfed.kernels.fused import adamw as fused_adamw
from sfed.kernels.fused import dropout as fused_dropout
from sfed.kernels.fused import quantise as fused_quantise
from sfed.kernels.fused import rotary as fused_rotary
from sfed.kernels.fused.swiglu import FusedSwiglu
from sfed.kernels.interface import AdamwRows, ClientStep, DropoutMask, FactorStep
from sfed.kernels.plain import adamw as plain_adamw
from sfed.kernels.plain import dropout as plain_dropout
from sfed.kernels.plain import quantise as plain_quantise
from sfed.kernels.plain import rotary as plain_rotary
from sfed.kernels.plain.swiglu import PlainSwiglu
from tests.support import interpreter

interpreter.require()

FP32, BF16 = torch.float32, torch.bfloat16
few = settings(max_examples=20, deadline=None)
dtypes = st.sampled_from([FP32, BF16])


def assert_near(found: torch.Tensor, exact: torch.Tensor, roundings: int = 1) -> None:
    """Compare with fp64: rounding errors of each number, of the largest where terms cancel."""
    unit = {FP32: 2.0**-22, BF16: 2.0**-7}[found.dtype]
    error = (found.double() - exact).abs()
    bound = roundings * unit * exact.abs() + 2.0**-22 * exact.abs().max()
    assert bool((error <= bound).all()), float((error / bound).max())


def drawn(seed: int, *shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randn(*shape, generator=generator)).to(dtype)


# --- AdamW ---------------------------------------------------------------------------------------


def rows_of(clients: int, width: int, padding: int) -> AdamwRows:
    """Rows of several strides, as views of wider ones."""
    made = [drawn(place, clients, width + place * padding) for place in range(4)]
    return AdamwRows(made[0], made[1], made[2] * 0.1, made[3].square())


def exact_step(
    rows: AdamwRows, factor: FactorStep, step: ClientStep, client: int
) -> tuple[torch.Tensor, ...]:
    """AdamW of one client by its textbook formula, in fp64: values and moments afterwards."""
    value, grad, mean, square = (part[client, factor.columns].double() for part in rows)
    if step.clip is not None:
        grad = grad * step.clip[client].double()
    lr, count = float(factor.rates[client]), float(factor.steps[client])
    mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad * grad
    corrected = mean / (1 - 0.9**count), square / (1 - 0.999**count)
    value = value * (1 - lr * step.weight_decay) - lr * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return value, mean, square


@few
@given(
    st.integers(1, 4),
    st.integers(1, 2300),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_each_client_steps_by_the_formula_at_its_own_rate_clip_and_number_of_steps(
    clients: int, width: int, padding: int, weight_decay: float, clips: bool, seed: int
) -> None:
    rows = rows_of(clients, width, padding)
    before = AdamwRows(*(part.clone() for part in rows))
    cut = width // 2
    draw = torch.Generator().manual_seed(seed)
    counts_CF = torch.randint(1, 4000, (clients, 3), generator=draw).float()
    active_C = torch.rand(clients, generator=draw) < 0.7
    lr_C = torch.rand(clients, generator=draw) * 0.1
    clip_C = torch.rand(clients, generator=draw) if clips else None
    columns = (slice(0, cut), slice(cut, width))
    factors = [
        FactorStep(one, (1.0 + place) * lr_C * active_C, counts_CF[:, place])
        for place, one in enumerate(columns)
    ]
    step = ClientStep(active_C, clip_C, weight_decay)
    fused_adamw.adamw(rows, factors, step)
    for client in range(clients):
        for factor in factors:
            found = [part[client, factor.columns] for part in (rows[0], *rows[2:])]
            if factor.columns.start == factor.columns.stop:
                continue
            if not active_C[client]:
                kept = [part[client, factor.columns] for part in (before[0], *before[2:])]
                assert all(map(torch.equal, found, kept))
                continue
            expected = exact_step(before, factor, step, client)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)
    for part, was in zip(rows, before, strict=True):
        assert torch.equal(part[:, width:], was[:, width:]), "beyond the row"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_client_that_rests_keeps_every_bit_whatever_its_gradient_holds(bad: float) -> None:
    rows = rows_of(3, 1100, 0)
    rows.values[1, :4] = torch.tensor([-0.0, math.inf, 1e-45, math.nan])
    rows.grads[1] = bad
    before = [part.clone().view(torch.int32) for part in rows]
    rates_C, active_C = torch.tensor([1e-2, 0.0, 1e-2]), torch.tensor([True, False, True])
    factor = FactorStep(slice(0, 1100), rates_C, torch.tensor([1.0, 0.0, 1.0]))
    fused_adamw.adamw(rows, [factor], ClientStep(active_C, torch.ones(3), 0.5))
    for place in (0, 2, 3):
        assert torch.equal(rows[place][1].view(torch.int32), before[place][1])
        for client in (0, 2):
            assert not torch.equal(rows[place][client].view(torch.int32), before[place][client])
            assert bool(torch.isfinite(rows[place][client]).all())


def test_a_client_steps_bit_for_bit_the_same_whatever_the_others_do() -> None:
    rows, others = rows_of(3, 700, 3), rows_of(3, 700, 3)
    for part in others:
        part[[0, 2]] *= 100.0
    steps_C = torch.tensor([1.0, 5.0, 9.0])
    for one, lr in ((rows, 1e-2), (others, 7.0)):
        rates_C = torch.tensor([lr, 3e-3, lr])
        factor = FactorStep(slice(0, 700), rates_C, steps_C)
        fused_adamw.adamw(one, [factor], ClientStep(rates_C > 0, rates_C, 0.1))
    assert torch.equal(rows.values[1], others.values[1])
    assert not torch.equal(rows.values[0], others.values[0])


@pytest.mark.parametrize("steps", [1, 2, 400, 501, 10**5])
def test_bias_corrections_lose_no_digits(steps: int) -> None:
    """1 - beta^t of small t, where the two are nearly equal, and around where the series ends."""
    rows = AdamwRows(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    factor = FactorStep(slice(0, 1), torch.ones(1), torch.tensor([float(steps)]))
    fused_adamw.adamw(rows, [factor], ClientStep(torch.ones(1, dtype=torch.bool), None, 0.0))
    expected = -math.sqrt(-math.expm1(steps * math.log(0.999))) / -math.expm1(steps * math.log(0.9))
    assert float(rows.values) == pytest.approx(expected, rel=5e-7)


def test_torch_is_told_that_the_values_have_changed() -> None:
    """PassRows makes its copy anew by that."""
    rows = rows_of(2, 5, 0)
    before = rows.values._version
    factor = FactorStep(slice(0, 5), torch.ones(2), torch.ones(2))
    fused_adamw.adamw(rows, [factor], ClientStep(torch.ones(2, dtype=torch.bool), None, 0.0))
    assert rows.values._version > before


def test_the_step_is_that_of_the_plain_operations_to_a_few_units() -> None:
    ours, plain = rows_of(3, 2500, 5), rows_of(3, 2500, 5)
    rates_C, steps_C = torch.tensor([1e-2, 1e-3, 1e-1]), torch.tensor([1.0, 40.0, 3000.0])
    factor = FactorStep(slice(0, 2500), rates_C, steps_C)
    for make, rows in ((fused_adamw.adamw, ours), (plain_adamw.adamw, plain)):
        make(rows, [factor], ClientStep(rates_C > 0, torch.tensor([1.0, 0.3, 0.9]), 0.1))
    for place in (0, 2, 3):
        torch.testing.assert_close(ours[place], plain[place], rtol=1e-6, atol=1e-7)


# --- SwiGLU --------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), dtypes, st.booleans())
def test_products_and_gradients_are_those_of_the_formula(
    shape: list[int], dtype: torch.dtype, strided: bool
) -> None:
    gate, up, grad = (drawn(seed, *shape, 7, dtype=dtype) for seed in range(3))
    if strided:  # other strides than those of up
        gate, grad = (one.transpose(0, -1).contiguous().transpose(0, -1) for one in (gate, grad))
    g, u, d = gate.double(), up.double(), grad.double()
    s = torch.sigmoid(g)
    swiglu = FusedSwiglu()
    for product in (swiglu.product(gate, up), swiglu.recompute(gate, up)):
        assert product.shape == gate.shape and product.dtype == dtype
        assert_near(product, g * s * u, roundings=2)
    grad_gate, grad_up = swiglu.gradients(grad, gate, up)
    assert_near(grad_up, d * g * s, roundings=2)
    assert_near(grad_gate, d * u * s * (1 + g * (1 - s)), roundings=2)


def test_the_product_is_that_of_the_plain_operations_for_extreme_numbers() -> None:
    gate = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e-30, 3e38, -3e38, math.inf, math.nan])
    up, grad = torch.full_like(gate, 0.5), torch.full_like(gate, 2.0)
    ours, plain = FusedSwiglu(), PlainSwiglu()
    torch.testing.assert_close(ours.product(gate, up), plain.product(gate, up), equal_nan=True)
    finite = (grad[:7], gate[:7], up[:7])
    for found, expected in zip(ours.gradients(*finite), plain.gradients(*finite), strict=True):
        torch.testing.assert_close(found, expected)


# --- rotary embedding ----------------------------------------------------------------------------


@few
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 19), st.integers(1, 40)),
    dtypes,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_heads_are_turned_by_the_formula_and_back(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    of_attention: bool,
    common: bool,
    back: bool,
) -> None:
    """Heads as projections have them and as attention's gradients; angles of each row or of all."""
    rows, tokens, heads, half = sizes
    if of_attention:
        x = drawn(0, rows, heads, tokens, 2 * half, dtype=dtype).transpose(1, 2)
    else:
        x = drawn(0, rows, tokens, heads, 2 * half, dtype=dtype)
    angles = (1 if common else rows, tokens, 1, 2 * half)
    cos, sin = (drawn(seed, *angles, dtype=dtype) for seed in (1, 2))
    (x1, x2), (c1, c2), (s1, s2) = (one.double().chunk(2, dim=-1) for one in (x, cos, sin))
    exact = (
        (x1 * c1 + x2 * s2, x2 * c2 - x1 * s1) if back else (x1 * c1 - x2 * s1, x2 * c2 + x1 * s2)
    )
    found = fused_rotary.rotary(x, cos, sin, back)
    assert found.is_contiguous() and found.dtype == dtype
    assert_near(found, torch.cat(exact, dim=-1))
    if dtype == FP32:
        torch.testing.assert_close(
            found, plain_rotary.rotary(x, cos, sin, back), rtol=1e-5, atol=1e-5
        )


def test_what_is_turned_and_turned_back_is_what_it_was() -> None:
    x, angle = drawn(0, 2, 5, 3, 8), drawn(1, 1, 5, 1, 4).repeat(1, 1, 1, 2)
    turned = fused_rotary.rotary(x, angle.cos(), angle.sin(), False)
    torch.testing.assert_close(fused_rotary.rotary(turned, angle.cos(), angle.sin(), True), x)
    assert not torch.allclose(turned, x)


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@few
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=0, max_size=5),
    st.one_of(st.sampled_from([0, 1, -1]), st.integers(-(2**63), 2**63 - 1)),
    st.integers(1, 2500),
    st.sampled_from([0.0, 0.05, 0.5, 0.999]),
    dtypes,
)
def test_what_is_dropped_is_that_of_the_plain_operations(
    count: int, keys: list[int], word: int, width: int, probability: float, dtype: torch.dtype
) -> None:
    tensors = [drawn(width + i, len(keys), width, dtype=dtype).add(9.0) for i in range(count)]
    mask = DropoutMask(torch.tensor(keys, dtype=torch.int64), probability, word)
    both = fused_dropout.dropout(mask, *tensors), plain_dropout.dropout(mask, *tensors)
    for found, plain, x in zip(*both, tensors, strict=True):
        assert found.dtype == dtype and found.shape == x.shape
        assert torch.equal(found == 0.0, plain == 0.0)
        if keys:
            assert_near(found, torch.where(plain == 0.0, 0.0, x.double() / (1 - probability)))


# --- FP8 -----------------------------------------------------------------------------------------


def assert_same_codes(rows: torch.Tensor) -> None:
    (codes, scales), (plain, plain_scales) = (
        make.quantise(rows) for make in (fused_quantise, plain_quantise)
    )
    assert codes.dtype == plain.dtype and codes.is_contiguous()
    assert torch.equal(scales, plain_scales)
    assert torch.equal(codes.view(torch.uint8), plain.view(torch.uint8))


@few
@given(
    st.integers(0, 4),
    st.integers(1, 4500),
    st.integers(-30, 30),
    st.sampled_from([1.0, 1e3, 1e7]),
    dtypes,
    st.booleans(),
)
def test_codes_and_scales_are_those_of_torch_bit_for_bit(
    count: int, width: int, exponent: int, outlier: float, dtype: torch.dtype, strided: bool
) -> None:
    """Outliers make small numbers subnormal codes, or 0."""
    rows = (drawn(width, count, width) * 10.0**exponent).to(dtype)
    if count:
        rows[-1, width // 2] *= outlier
        rows[0] *= count > 1
    assert_same_codes(rows.t().contiguous().t() if strided else rows)


def test_every_code_and_the_middle_of_each_two_are_rounded_as_by_torch() -> None:
    """Beside 448 the scale is 1, so that the numbers are rounded as they are."""
    codes = torch.arange(127, dtype=torch.uint8).view(plain_quantise.CODES).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = [torch.nextafter(middles, torch.full_like(middles, to)) for to in (0.0, 500.0)]
    numbers = torch.cat([codes, middles, *near, torch.tensor([2.0**-10, 2.0**-11, 1e-30, 448.0])])
    rows = torch.stack([numbers, -numbers])
    assert fused_quantise.quantise(rows)[1].flatten().tolist() == [1.0, 1.0]
    assert_same_codes(rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2047, 2048, 2999])
def test_a_row_that_is_not_finite_is_nan_and_the_others_are_not(bad: float, place: int) -> None:
    rows = drawn(0, 3, 3000)
    rows[1, place] = bad
    codes, scales = fused_quantise.quantise(rows)
    numbers = codes.float() * scales
    assert numbers[1].isnan().all() and numbers[[0, 2]].isfinite().all()
    torch.testing.assert_close(numbers[[0, 2]], rows[[0, 2]], rtol=2**-4, atol=1e-4)
