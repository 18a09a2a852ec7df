"""Pretended GPUs (tests/support/pretended_gpu) find what CUDA refuses and what nothing orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from tests.support.pretended_gpu import MixError, PretendedGpu

Case = Callable[[PretendedGpu], object]


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with PretendedGpu(devices=2, races=True) as pretended:
        yield pretended


@pytest.fixture
def nccl(gpu: PretendedGpu) -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_gpu(*sizes: int) -> torch.Tensor:
    return torch.ones(sizes or (4,), device="cuda")


# --- devices -------------------------------------------------------------------------------------


def test_tensors_lie_where_they_were_asked_for(gpu: PretendedGpu):
    x = on_gpu(2, 4)
    module = torch.nn.Linear(4, 3).to("cuda:0")
    module(x).sum().backward()
    made = (x[0], x.T, x.new_zeros(2), torch.zeros_like(x), x.double(), module.weight.grad)
    assert {str(tensor.device) for tensor in made} == {"cuda:0"}
    assert [str(x.to(where).device) for where in ("cuda:1", "cpu")] == ["cuda:1", "cpu"]
    on_host = (x.cpu(), x.new_zeros(2, device="cpu"), torch.empty(2, pin_memory=True))
    assert not any(tensor.is_cuda for tensor in on_host)
    assert [tensor.is_pinned() for tensor in on_host] == [False, False, True]
    assert x.to("cuda") is x
    assert not gpu.mixes and not gpu.races


def test_torch_describes_the_devices(gpu: PretendedGpu):
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    first, second = map(torch.cuda.get_device_properties, range(2))
    assert first.uuid != second.uuid and (first.major, first.minor) == (9, 0)
    before = torch.cuda.mem_get_info()
    x = on_gpu(1024)
    assert torch.cuda.memory_allocated() == 4096
    assert torch.cuda.mem_get_info() == (before[0] - 4096, before[1])
    del x
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (0, 4096)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:2")


def test_afterwards_there_is_no_device():
    before = torch.cuda.is_available(), torch.Generator, dist.get_backend
    with PretendedGpu():
        x = on_gpu()
    assert (torch.cuda.is_available(), torch.Generator, dist.get_backend) == before
    assert x.device.type == "cpu"


# --- what CUDA refuses ---------------------------------------------------------------------------


def host_and_gpu(_: PretendedGpu) -> None:
    on_gpu() + torch.ones(4)


def two_gpus(_: PretendedGpu) -> None:
    on_gpu() + on_gpu().to("cuda:1")


def host_indices_of_two_gpus(_: PretendedGpu) -> None:
    on_gpu()[torch.zeros(1, dtype=torch.int64, device="cuda:1")]


def generator_of_the_host(_: PretendedGpu) -> None:
    on_gpu().bernoulli_(0.5, generator=torch.Generator())


def numpy_of_a_gpu(_: PretendedGpu) -> None:
    on_gpu().numpy()


@pytest.mark.parametrize(
    "case",
    [host_and_gpu, two_gpus, host_indices_of_two_gpus, generator_of_the_host, numpy_of_a_gpu],
)
def test_a_mix_is_found(case: Case, gpu: PretendedGpu):
    with pytest.raises(MixError):
        case(gpu)
    assert gpu.mixes.total() == 1
    assert "tests/unit/test_pretended_gpu.py" in next(iter(gpu.mixes))


def test_nccl_takes_no_host_tensor(gpu: PretendedGpu, nccl: None):
    dist.all_reduce(on_gpu())
    assert gpu.collectives == {("allreduce", "cuda:0"): 1}
    with pytest.raises(MixError, match="NCCL: allreduce of tensors on host"):
        dist.all_reduce(torch.ones(4))


@pytest.mark.parametrize("case", [lambda x: x + torch.tensor(2.0), lambda x: 2 * x, lambda x: x[0]])
def test_numbers_may_meet_a_gpu(case: Callable[[torch.Tensor], object], gpu: PretendedGpu):
    case(on_gpu())
    assert not gpu.mixes and not gpu.host_waits


# --- what nothing orders -------------------------------------------------------------------------


def read_pageable_too_early(*, waits: bool) -> None:
    held = torch.empty(4)
    held.copy_(on_gpu(), non_blocking=True)
    if waits:
        torch.cuda.synchronize()
    held.sum()


def read_pinned_too_early(*, waits: bool) -> None:
    held = on_gpu().to("cpu", non_blocking=True)
    if waits:
        torch.cuda.current_stream().synchronize()
    held.tolist()


def overwrite_what_is_copied(*, waits: bool) -> None:
    held = torch.ones(4).pin_memory()
    on_gpu().copy_(held, non_blocking=True)
    if waits:
        torch.cuda.current_stream().record_event().synchronize()
    held.zero_()


def read_on_another_stream(*, waits: bool) -> None:
    x, side = on_gpu(), torch.cuda.Stream()
    if waits:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.sum()
    torch.cuda.synchronize()


def free_while_another_stream_reads(*, waits: bool) -> None:
    x, side = on_gpu(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.sum()
    if waits:
        x.record_stream(side)
    del x


def write_while_a_collective_runs(*, waits: bool) -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = on_gpu()
        work = dist.all_reduce(x, async_op=True)
        if waits:
            work.wait()
        x.zero_()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        read_pageable_too_early,
        read_pinned_too_early,
        overwrite_what_is_copied,
        read_on_another_stream,
        free_while_another_stream_reads,
        write_while_a_collective_runs,
    ],
)
def test_a_race_is_found(case: Callable[..., None], waits: bool, gpu: PretendedGpu):
    case(waits=waits)
    assert bool(gpu.races) != waits, gpu.races
    assert not gpu.mixes


# --- what the host waits for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("item", lambda x: x[0].item()),
        ("item", lambda x: bool(x.all())),
        ("tolist", lambda x: x.tolist()),
        ("nonzero", lambda x: x.nonzero()),
        ("index by a mask", lambda x: x[x > 0]),
        ("indices on the host", lambda x: x[[0, 1]]),
        ("copy to the host", lambda x: x.cpu()),
        ("copy to the device", lambda x: torch.tensor([1.0], device="cuda")),
        ("copy to the device", lambda x: x.copy_(torch.ones(4))),
        ("copy to the device, non_blocking but pageable", lambda x: torch.ones(2).cuda(0, True)),
        ("synchronize", lambda x: torch.cuda.synchronize()),
    ],
)
def test_a_wait_is_counted(kind: str, case: Callable[[torch.Tensor], object], gpu: PretendedGpu):
    x = on_gpu()
    gpu.reset()
    case(x)
    assert [found for found, _ in gpu.host_waits] == [kind]


@pytest.mark.parametrize(
    "case",
    [
        lambda x: torch.ones(4).pin_memory().to("cuda", non_blocking=True),
        lambda x: x.fill_(2.0),
        lambda x: x.__setitem__(0, 2.0),
        lambda x: x.masked_fill_(x > 0, 0.0),
        lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int64, device="cuda")),
        lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True),
    ],
)
def test_what_needs_no_wait_counts_none(case: Callable[[torch.Tensor], object], gpu: PretendedGpu):
    case(on_gpu())
    assert not gpu.host_waits
