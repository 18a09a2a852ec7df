"""Kernels of Triton and FP8 products on a device, beside what they stand for: differences, seconds.

The seconds are figures and no test. On a CPU sizes are tiny and kernels are interpreted.
``python -m tests.gpu.arithmetic DEVICE`` prints those of the kernels, as JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from sfed.bench.meters import seconds_of
from sfed.kernels import choice, comparison
from sfed.kernels.interface import AdamwRows, ClientStep, DropoutMask, FactorStep
from sfed.kernels.plain.quantise import quantise
from sfed.lora.frozen import fp8
from sfed.utils.errors import UserError

Figures = dict[str, Any]
TIMES = {"cpu": 1, "cuda": 20}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of LLaMA-2-7B on a GPU; clients and numbers are those of AdamW's rows."""

    clients: int
    numbers: int
    tokens: int
    hidden: int
    inner: int
    heads: int


SIZES = {
    "cpu": Sizes(clients=2, numbers=1500, tokens=3, hidden=64, inner=96, heads=2),
    "cuda": Sizes(clients=16, numbers=2**22 + 3, tokens=4096, hidden=4096, inner=11008, heads=32),
}


def kernels(device_type: str) -> Figures:
    """Each kernel against torch's operations at the sizes of training."""
    if importlib.util.find_spec("triton") is None:
        return {"skipped": "Triton is not installed (pip install 'sfed[kernels]')"}
    device, sizes = torch.device(device_type), SIZES[device_type]
    fused = choice.choose("triton", device, torch.bfloat16, choice.OPTIONS)
    found: Figures = {}
    works = {"adamw": _adamw, "swiglu": _swiglu, "rotary": _rotary}
    works |= {"dropout": _dropout, "quantise": _quantise}
    for name, work in works.items():
        by_both = [work(made, device, sizes) for made in (fused, choice.PLAIN)]
        (ours, own_step), (plain, plain_step) = by_both
        found[name] = {
            "excess": comparison.excess(zip(ours, plain, strict=True)),
            "triton_seconds": seconds_of(device, own_step, TIMES[device.type]),
            "torch_seconds": seconds_of(device, plain_step, TIMES[device.type]),
        }
    return found


Outcome = tuple[list[torch.Tensor], Callable[[], object]]
"""What came out once, and the work, to be timed."""


def _adamw(made: choice.Kernels, device: torch.device, sizes: Sizes) -> Outcome:
    generator = torch.Generator(device).manual_seed(0)
    shape = (sizes.clients, sizes.numbers)
    parts = [torch.randn(shape, generator=generator, device=device) for _ in range(4)]
    rows = AdamwRows(*parts[:3], parts[3].square_())
    active_C = torch.arange(sizes.clients, device=device) % 5 != 1
    rates_C = torch.full((sizes.clients,), 1e-2, device=device) * active_C
    factor = FactorStep(slice(0, sizes.numbers), rates_C, torch.full_like(rates_C, 3.0))
    step = ClientStep(active_C, torch.full_like(rates_C, 0.5), 0.1)
    made.adamw(rows, [factor], step)
    found = [part.clone() for part in (rows.values, rows.exp_avg, rows.exp_avg_sq)]
    return found, lambda: made.adamw(rows, [factor], step)


def _swiglu(made: choice.Kernels, device: torch.device, sizes: Sizes) -> Outcome:
    shape = (sizes.tokens, sizes.inner)
    grad, gate, up = _drawn(device, *[shape] * 3)

    def work() -> list[torch.Tensor]:
        one = made.swiglu()
        return [one.product(gate, up), one.recompute(gate, up), *one.gradients(grad, gate, up)]

    return work(), work


def _rotary(made: choice.Kernels, device: torch.device, sizes: Sizes) -> Outcome:
    width = sizes.hidden // sizes.heads
    x, cos, sin = _drawn(
        device, (1, sizes.heads, sizes.tokens, width), *[(1, sizes.tokens, 1, width)] * 2
    )

    def work() -> list[torch.Tensor]:
        return [made.rotary(x.transpose(1, 2), cos, sin, back) for back in (False, True)]

    return work(), work


def _dropout(made: choice.Kernels, device: torch.device, sizes: Sizes) -> Outcome:
    (x,) = _drawn(device, (sizes.tokens, sizes.hidden))
    keys = torch.arange(sizes.tokens, device=device) * 0x9E3779B97F4A7C1
    mask = DropoutMask(keys, 0.05)
    return list(made.dropout(mask, x, x)), lambda: made.dropout(mask, x, x)


def _quantise(made: choice.Kernels, device: torch.device, sizes: Sizes) -> Outcome:
    (rows,) = _drawn(device, (sizes.tokens, sizes.inner))
    codes, scales = made.quantise(rows)
    return [codes.float(), scales], lambda: made.quantise(rows)


def _drawn(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes]


def fp8_products(device_type: str) -> Figures:
    """A layer in FP8 against the definition of its products, and its seconds beside bf16."""
    device, sizes = torch.device(device_type), SIZES[device_type]
    try:
        fp8.refuse_device(device, torch.bfloat16)
    except UserError as error:
        return {"skipped": str(error)}
    x, weight, grad = _drawn(
        device,
        (sizes.tokens, sizes.hidden),
        (sizes.inner, sizes.hidden),
        (sizes.tokens, sizes.inner),
    )
    layer = fp8.Fp8Linear(weight, None).to(device)
    found, found_grad = _passed(layer, x, grad)
    pairs = {
        "forward": (found, fp8.defined_product(quantise(x), quantise(weight))),
        "backward": (found_grad, fp8.defined_product(quantise(grad), quantise(weight.t()))),
    }
    differences = {
        name: float((one.float() - exact).abs().max() / exact.abs().max())
        for name, (one, exact) in pairs.items()
    }
    plain = torch.nn.functional.linear
    times = TIMES[device.type]
    return {
        "differences": differences,
        "fp8_seconds": seconds_of(device, lambda: _passed(layer, x, grad), times),
        "bf16_seconds": seconds_of(
            device, lambda: _passed(lambda one: plain(one, weight), x, grad), times
        ),
    }


def _passed(
    layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward: the output, and the gradient of x."""
    x = x.detach().requires_grad_()
    output = layer(x)
    (grad_x,) = torch.autograd.grad(output, x, grad)
    return output.detach(), grad_x


if __name__ == "__main__":
    sys.stdout.write(json.dumps(kernels(sys.argv[1])) + "\n")
