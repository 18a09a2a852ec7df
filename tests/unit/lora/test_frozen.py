"""A frozen linear layer keeps its weight alone, and computes what torch's own does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfed.lora.frozen.linear import keep_weights_alone


def layer(dtype: torch.dtype, *, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("shape", [(7, 48), (3, 5, 48)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_the_same_bit_for_bit(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    plain, ours = layer(dtype, bias=bias), layer(dtype, bias=bias)
    keep_weights_alone(ours)
    x, grad = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 80).to(dtype)
    found = []
    for one in (plain, ours):
        of_x = x.clone().requires_grad_()
        y = one(of_x)
        y.backward(grad)
        found.append((y.detach(), of_x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_saves_the_parameter_itself_and_uses_what_that_holds_in_the_backward_pass() -> None:
    """So ZeRO-3 may release the weight after the forward pass and gather it elsewhere."""
    one = layer(torch.float32, bias=True)
    keep_weights_alone(one)
    saved: list[torch.Tensor] = []
    x = torch.randn(3, 5, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        one(x)
    assert len(saved) == 1 and saved[0] is one.weight

    weight = one.weight.detach().clone()
    y = one(x)
    one.weight.data = torch.empty(0)
    one.weight.data = 2 * weight
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(y) @ (2 * weight))


def test_other_layers_stay_as_they_are() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    trained, own = nn.Linear(4, 4), Own(4, 4).requires_grad_(False)
    model = nn.Sequential(trained, own, layer(torch.float32, bias=False))
    keep_weights_alone(model)
    assert ["forward" in vars(module) for module in model] == [False, False, True]
