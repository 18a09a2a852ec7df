"""Tensors go to a GPU as one block: the same numbers, one copy, no wait."""

from __future__ import annotations

import pytest
import torch

from sfed.distributed.transfer import to_device
from tests.support.pretended_gpu import PretendedGpu

GPU = torch.device("cuda", 0)


def tensors() -> dict[str, torch.Tensor]:
    """Of odd sizes, so that a part would not lie at a multiple of its dtype's size by itself."""
    return {
        "mask": torch.tensor([True, False, True]),
        "ids": torch.arange(15).view(3, 5),
        "nothing": torch.zeros(0, 4),
        "targets": torch.tensor([1.5, float("nan")]),
        "number": torch.tensor(7, dtype=torch.int32),
        "turned": torch.arange(6.0, dtype=torch.float64).view(2, 3).T,
        "half": torch.ones(3, dtype=torch.bfloat16),
    }


def test_on_a_cpu_they_stay_what_they_are() -> None:
    given = tensors()
    moved = to_device(given, torch.device("cpu"))
    assert list(moved) == list(given) and all(moved[name] is given[name] for name in given)


def test_a_gpu_gets_the_same_numbers_in_one_copy_for_which_the_host_does_not_wait() -> None:
    given = tensors()
    with PretendedGpu(races=True) as gpu:
        before = sum(gpu.launches.values())
        moved = to_device(given, GPU)
        assert not gpu.host_waits and sum(gpu.launches.values()) <= before + 1
        assert all(one.device == GPU for one in moved.values())
        back = {name: one.cpu() for name, one in moved.items()}
    assert not gpu.mixes and not gpu.races
    assert list(back) == list(given)
    for name, tensor in given.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_system_that_refuses_pinned_memory_gets_slower_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = tensors()
    with PretendedGpu() as gpu:
        empty = torch.empty

        def refuse(*size: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
            if pin_memory:
                raise RuntimeError("CUDA error: out of memory")
            return empty(*size, **options)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(torch, "empty", refuse)
        with pytest.warns(UserWarning, match="refuses pinned host memory"):
            moved = to_device(given, GPU)
        monkeypatch.undo()
        assert sum(gpu.host_waits.values()) == 1
        assert torch.equal(moved["ids"].cpu(), given["ids"])
