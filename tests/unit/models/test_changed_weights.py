"""Changes of frozen weights: exact, from the originals, in checkpoints, refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from sfed.lora.linear import PassContext, StackedLoraLinear
from sfed.models import changed_weights
from sfed.models.changed_weights import Change, ChangedWeights
from sfed.utils.errors import CheckpointError, UserError

SHAPES = {"m.up": (7, 5), "m.down": (5, 7), "m.k": (3, 4)}


def model_of(
    shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype = torch.float32
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.m = nn.Module()
    for name, (out, width) in shapes.items():
        setattr(model.m, name.removeprefix("m."), nn.Linear(width, out, bias=False, dtype=dtype))
    return model.requires_grad_(False)


def layers_of(model: nn.Module) -> dict[str, StackedLoraLinear]:
    return {
        f"m.{name}": StackedLoraLinear(layer, 1.0, 0.0, index, PassContext())
        for index, (name, layer) in enumerate(model.m.named_children())
    }


def changed(model: nn.Module, rank: int = 0, size: int = 1) -> ChangedWeights:
    sharding = SimpleNamespace(is_sharded=False)
    backbone: Any = SimpleNamespace(model=model, sharding=sharding, release=lambda: None)
    world: Any = SimpleNamespace(device=torch.device("cpu"), rank=rank, size=size)
    return ChangedWeights(backbone, layers_of(model), world)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"m.{name}": layer.weight.clone() for name, layer in model.m.named_children()}


def terms(seed: int, q: int, scale: float = 1.0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (
            scale * torch.randn(out, q, generator=draw),
            torch.randn(q, width, generator=draw),
        )
        for name, (out, width) in SHAPES.items()
    }


def dense(changes: list[dict[str, tuple[torch.Tensor, torch.Tensor]]], name: str) -> torch.Tensor:
    return sum(one[name][0].double() @ one[name][1].double() for one in changes)


@pytest.mark.parametrize("chunk", [2**24, 12])
def test_weights_are_the_originals_and_the_sum_of_all_terms(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terms first, then the matrix: 2, 4 and 6 columns of weights that hold 35 and 12 numbers."""
    monkeypatch.setattr(changed_weights, "_NUMBERS_AT_A_TIME", chunk)
    model = model_of(SHAPES)
    before, own, done = weights(model), changed(model), []
    for round_index in range(3):
        done.append(terms(round_index, 2))
        own.add(done[-1])
        kept = {name: change.dense is not None for name, change in own.changes.items()}
        assert kept["m.up"] == (12 * 2 * (round_index + 1) > 35)
        for name, weight in weights(model).items():
            expected = before[name].double() + dense(done, name)
            torch.testing.assert_close(weight, expected.float(), atol=2e-6, rtol=1e-6)
        for name, (u, v) in own.factors().items():
            torch.testing.assert_close(
                (u.double() @ v.double()).float(), dense(done, name).float(), atol=2e-6, rtol=1e-6
            )
            assert u.shape[1] == v.shape[0] <= max(6, min(SHAPES[name]))


def test_rounding_of_16_bit_weights_does_not_add_up() -> None:
    """64 changes of 1/1024 of a weight near 1, each less than half of what bf16 can tell apart."""
    model = model_of({"m.up": (7, 5)}, torch.bfloat16)
    model.m.up.weight.data.fill_(1.0)
    own = changed(model)
    for _ in range(64):
        own.add({"m.up": (torch.full((7, 1), 2.0**-10), torch.ones(1, 5))})
    assert (model.m.up.weight == 1.0625).all()
    assert model.m.up.weight.dtype == torch.bfloat16


def test_the_original_tensor_is_not_written_to() -> None:
    """It may be the mapped file of the model."""
    model = model_of(SHAPES)
    tensor = model.m.up.weight.data
    copy = tensor.clone()
    changed(model).add(terms(0, 1))
    assert torch.equal(tensor, copy)
    assert not torch.equal(model.m.up.weight, copy)


def test_what_is_in_a_checkpoint_is_not_written_to_by_later_rounds() -> None:
    """A thread writes it while the next round runs."""
    own = changed(model_of(SHAPES))
    for round_index in range(4):
        own.add(terms(round_index, 1))
        stored = own.stored()
        copies = {name: part.clone() for name, part in stored.items()}
        own.add(terms(9, 1))
        assert all(torch.equal(part, copies[name]) for name, part in stored.items())


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_change_is_the_same_bits_and_goes_on_so(
    rounds: int, size: int, dtype: torch.dtype
) -> None:
    models = [model_of(SHAPES, dtype) for _ in range(size)]
    own = [changed(model, rank, size) for rank, model in enumerate(models)]
    for round_index in range(rounds):
        for one in own:
            one.add(terms(round_index, 2))
    parts: dict[str, torch.Tensor] = {}
    for one in own:
        assert not parts.keys() & one.stored().keys(), "written once"
        parts |= one.stored()
    other = model_of(SHAPES, dtype)
    restored = changed(other)
    restored.restore({"m.up/velocity": torch.ones(3), **parts})
    for _ in range(2):
        for name, weight in weights(other).items():
            assert torch.equal(weight, weights(models[0])[name])
        restored.add(terms(7, 2))
        own[0].add(terms(7, 2))


def test_the_smaller_form_is_stored() -> None:
    own = changed(model_of(SHAPES))
    own.add(terms(0, 2))
    sizes = {
        name: sum(part.numel() for key, part in own.stored().items() if f"/{name}/" in key)
        for name in SHAPES
    }
    assert sizes == {"m.up": 24, "m.down": 24, "m.k": 12}


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("m.up/u", (6, 2)),
        ("m.up/v", (3, 5)),
        ("m.up/u", (7,)),
        ("m.k/dense/0", (11,)),
        ("m.k/dense/5", (7,)),
        ("m.k/dense/0", (3, 4)),
        ("m.k/dense/0", (13,)),
        ("m.other/u", (7, 2)),
    ],
)
def test_a_change_that_does_not_fit_is_refused(key: str, shape: tuple[int, ...]) -> None:
    own = changed(model_of(SHAPES))
    own.add(terms(0, 2))
    parts = own.stored()
    assert "base_change/m.k/dense/0" in parts and "base_change/m.up/u" in parts
    if "/dense/" in key:
        del parts["base_change/m.k/dense/0"]
    parts[f"base_change/{key}"] = torch.zeros(shape)
    model = model_of(SHAPES)
    before = weights(model)
    with pytest.raises(CheckpointError, match=key.partition("/")[0]):
        changed(model).restore(parts)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def refused(model: nn.Module) -> str:
    with pytest.raises(UserError) as mistake:
        changed(model)
    return str(mistake.value)


def test_a_weight_that_is_tied_transposed_or_quantised_is_refused_by_name() -> None:
    tied = model_of(SHAPES)
    tied.embedding = nn.Embedding(7, 5)
    tied.embedding.weight = tied.m.up.weight
    assert "that of m.up cannot be changed: other modules use the same weight" in refused(tied)
    transposed = model_of(SHAPES)
    transposed.m.down = Conv1D(5, 7)
    assert "m.down cannot be changed: it is a Conv1D" in refused(transposed)
    quantised = model_of(SHAPES)
    weight = torch.zeros(3, 4, dtype=torch.uint8)
    quantised.m.k.weight = nn.Parameter(weight, requires_grad=False)
    message = refused(quantised)
    assert "m.k cannot be changed: its weight is of dtype torch.uint8" in message
    for remedy in ("lora.target_modules", "model.name", "flexlora"):
        assert remedy in message


@given(st.integers(0, 35), st.integers(0, 35), st.integers(1, 9), st.booleans())
def test_a_share_of_a_change_is_that_part_of_the_matrix(
    one: int, other: int, q: int, twice: bool
) -> None:
    """Shares of ZeRO-3 begin and end within rows, and some are empty."""
    start, stop = sorted((one, other))
    u, v = terms(0, q)["m.up"]
    change = Change((7, 5), start, stop).plus((u, v), torch.device("cpu"))
    whole = u.double() @ v.double()
    if twice:
        change = change.plus((u, v), torch.device("cpu"))
        whole = 2 * whole
    expected = whole.flatten()[start:stop].float()
    torch.testing.assert_close(change.values(torch.device("cpu")), expected, atol=2e-6, rtol=1e-6)
    columns = q * (1 + twice)
    assert (change.dense is not None) == (columns * 12 > 35)
