"""Which implementation is in use, and that a wrong one is found before it is used."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sfed.config.schema import Config
from sfed.config.sections.train import TrainSection
from sfed.kernels import choice, comparison
from sfed.kernels.choice import OPTIONS, PLAIN, Kernels, choose
from sfed.kernels.interface import AdamwRows, ClientStep, DropoutMask, FactorStep, Quantised
from sfed.kernels.plain import adamw as plain_adamw
from sfed.kernels.plain import dropout as plain_dropout
from sfed.kernels.plain import quantise as plain_quantise
from sfed.kernels.plain import rotary as plain_rotary
from sfed.kernels.plain.swiglu import PlainSwiglu
from sfed.utils.errors import UserError
from sfed.utils.launcher import launch
from tests.support import interpreter, launchers, runs, tiny
from tests.support.processes import ends_of

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    choose.cache_clear()
    yield
    choose.cache_clear()


def functions(kernels: Kernels) -> tuple[Any, ...]:
    names = ("adamw", "swiglu", "rotary", *OPTIONS)
    return tuple(getattr(kernels, name) for name in names)


def test_auto_is_the_default_and_takes_torch_on_a_cpu() -> None:
    assert Config().train.kernels == "auto" == TrainSection().kernels
    chosen = choose("auto", CPU, FP32)
    assert functions(chosen) == functions(PLAIN)
    assert set(chosen.by_name.values()) == {"torch"} and not chosen.faults


def test_torch_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_lack", None)
    assert functions(choose("torch", CPU, FP32)) == functions(PLAIN)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_triton_auto_takes_torch_and_triton_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _name: None)
    assert "not installed" in choose("auto", torch.device(device), BF16).line
    with pytest.raises(UserError, match=r"train.kernels=triton: Triton is not installed \(pip ins"):
        choose("triton", torch.device(device), BF16)


def test_on_a_cpu_triton_is_refused_unless_it_is_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpreter.require()
    assert choose("triton", CPU, BF16).fused == ("adamw", "swiglu", "rotary")
    chosen = choose("triton", CPU, BF16, OPTIONS)
    assert chosen.fused == ("adamw", "swiglu", "rotary", *OPTIONS) == tuple(chosen.by_name)
    chosen = choose("triton", CPU, BF16, ("dropout",))
    assert chosen.fused == ("adamw", "swiglu", "rotary", "dropout") == tuple(chosen.by_name)
    choose.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match=r"need a GPU and this process computes on cpu .* set "):
        choose("triton", CPU, BF16)


# --- kernels that are wrong ----------------------------------------------------------------------


def unclipped(
    rows: AdamwRows, factors: list[FactorStep], step: ClientStep, active: bool = False
) -> None:
    everyone = torch.ones_like(step.active) if active else step.active
    plain_adamw.adamw(rows, factors, ClientStep(everyone, None if not active else step.clip, 0.1))


def moves_everyone(rows: AdamwRows, factors: list[FactorStep], step: ClientStep) -> None:
    """A client that rests keeps its values, since its rate is 0, and its moments move."""
    unclipped(rows, factors, step, active=True)


def no_decay(rows: AdamwRows, factors: list[FactorStep], step: ClientStep) -> None:
    plain_adamw.adamw(rows, factors, dataclasses.replace(step, weight_decay=0.0))


def first_factor_only(rows: AdamwRows, factors: list[FactorStep], step: ClientStep) -> None:
    plain_adamw.adamw(rows, factors[:1], step)


class OtherGradients(PlainSwiglu):
    def gradients(self, grad: Any, gate: Any, up: Any) -> Any:
        return tuple(reversed(super().gradients(grad, gate, up)))


class NoNumbers(PlainSwiglu):
    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product = super().product(gate, up)
        product[-1, -1] = math.nan
        return product


class ForgetsTheEnd(PlainSwiglu):
    def recompute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product = super().recompute(gate, up)
        product.view(-1)[1024:] = 0.0
        return product


def never_back(x: Any, cos: Any, sin: Any, back: bool) -> torch.Tensor:
    del back
    return plain_rotary.rotary(x, cos, sin, False)


def ignores_strides(x: Any, cos: Any, sin: Any, back: bool) -> torch.Tensor:
    flat = torch.as_strided(x, x.shape, torch.empty(x.shape).stride())
    return plain_rotary.rotary(flat, cos, sin, back)


def other_masks(mask: DropoutMask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return plain_dropout.dropout(mask._replace(keys=mask.keys + 1), *tensors)


def one_mask_for_all(mask: DropoutMask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    keys = mask.keys[:1].repeat(len(mask.keys))
    return plain_dropout.dropout(mask._replace(keys=keys), *tensors)


def half_of_the_key(mask: DropoutMask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return plain_dropout.dropout(mask._replace(keys=mask.keys & 0xFFFFFFFF), *tensors)


def one_word_for_all_layers(mask: DropoutMask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return plain_dropout.dropout(mask._replace(word=0), *tensors)


def unscaled(mask: DropoutMask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x / mask.scale for x in plain_dropout.dropout(mask, *tensors))


def the_first_twice(mask: DropoutMask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return plain_dropout.dropout(mask, *(tensors[0] for _ in tensors))


def one_scale_for_all(rows: torch.Tensor) -> Quantised:
    codes, scales = plain_quantise.quantise(rows.reshape(1, -1))
    return codes.view(rows.shape), scales.expand(len(rows), 1)


def towards_zero(rows: torch.Tensor) -> Quantised:
    codes, scales = plain_quantise.quantise(rows)
    smaller = codes.view(torch.uint8) - (codes.float().abs() > (rows / scales).abs()).byte()
    return smaller.view(plain_quantise.CODES), scales


def bad_numbers_become_the_largest(rows: torch.Tensor) -> Quantised:
    return plain_quantise.quantise(rows.nan_to_num())


def zeros_at_the_end(rows: torch.Tensor) -> Quantised:
    codes, scales = plain_quantise.quantise(rows)
    codes.view(torch.uint8)[:, 2048:] = 0
    return codes, scales


WRONG = [
    ("adamw", unclipped),
    ("adamw", moves_everyone),
    ("adamw", no_decay),
    ("adamw", first_factor_only),
    ("swiglu", OtherGradients),
    ("swiglu", NoNumbers),
    ("swiglu", ForgetsTheEnd),
    ("rotary", never_back),
    ("rotary", ignores_strides),
    ("dropout", other_masks),
    ("dropout", one_mask_for_all),
    ("dropout", half_of_the_key),
    ("dropout", one_word_for_all_layers),
    ("dropout", unscaled),
    ("dropout", the_first_twice),
    ("quantise", one_scale_for_all),
    ("quantise", towards_zero),
    ("quantise", bad_numbers_become_the_largest),
    ("quantise", zeros_at_the_end),
]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["adamw", "swiglu", "rotary", *OPTIONS])
def test_the_plain_operations_are_as_they_are(name: str, dtype: torch.dtype) -> None:
    assert comparison.BY_NAME[name](getattr(PLAIN, name), CPU, dtype) == 0.0


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_wrong_kernel_is_not_used_and_is_refused_where_it_is_asked_for(
    name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter.require()
    monkeypatch.setattr(choice, "_lack", lambda _device, is_asked: None)
    made = dataclasses.replace(PLAIN, **{name: wrong})
    monkeypatch.setattr(choice, "_fused", lambda: made)
    chosen = choose("auto", CPU, BF16, OPTIONS)
    assert [one for one, by in chosen.by_name.items() if by == "torch"] == [name]
    assert functions(chosen) == functions(PLAIN)
    (fault,) = chosen.faults
    assert choice._NAMES[name] in fault and "times the tolerance" in fault
    with pytest.raises(
        UserError, match=rf"train.kernels=triton: {fault[:12]}.*; set train.kernels="
    ):
        choose("triton", CPU, BF16, OPTIONS)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        AssertionError("libcuda.so cannot found!"),
        ImportError("failed to map segment from shared object"),
    ],
)
def test_a_compiler_that_is_missing_leaves_torch_and_says_what_to_install(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter.require()

    def fails(*_arguments: Any) -> None:
        raise error

    monkeypatch.setattr(choice, "_lack", lambda _device, is_asked: None)
    monkeypatch.setattr(choice, "_fused", lambda: Kernels(fails, fails, fails))
    chosen = choose("auto", CPU, FP32)
    assert functions(chosen) == functions(PLAIN)
    (fault,) = chosen.faults
    assert fault.startswith("AdamW, SwiGLU, rotary embedding: ") and "gcc and python3-dev" in fault
    with pytest.raises(UserError, match="gcc and python3-dev"):
        choose("triton", CPU, FP32)


# --- without a GPU -------------------------------------------------------------------------------


def test_every_kernel_compiles_for_compute_capability_9_0() -> None:
    """In a process of its own: here kernels are interpreted."""
    interpreter.require()
    variables = launchers.environment(TRITON_INTERPRET="0")
    done = launchers.python("-m", "tests.support.compiled_kernels", env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 20
    for name, one in found.items():
        assert one["cubin_bytes"] > 1000 and one["is_for_the_gpu"], name


# --- several processes ---------------------------------------------------------------------------


def train_with_kernels_of_its_own(settings: dict[str, Any]) -> None:
    """Process 1 takes another implementation, as where it alone has a compiler."""
    if launch().rank == 1:
        other = dataclasses.replace(PLAIN, fused=("adamw",))
        choice.choose = lambda *_arguments, **_options: other  # the process ends with the test
    runs.train_or_leave(settings)


@pytest.mark.dist
def test_processes_that_compute_differently_train_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    output = {"dir": str(tmp_path), "name": "run"}
    ends = ends_of(2, train_with_kernels_of_its_own, tiny.settings(tiny_folder, output=output))
    assert [end.code for end in ends] == [2, 2], ends
    told = ends[0].said
    assert "the processes do not agree, so nothing was trained" in told
    assert "train.kernels: " in told and '"adamw": "triton"' in told and "process 1" in told
