"""Which device a process takes, and that no GPU is passed over without a word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sfed.distributed import devices
from sfed.distributed import world as distributed
from sfed.models import hf_config
from sfed.utils.errors import ConfigError, UserError
from sfed.utils.launcher import launch
from tests.support import tiny
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes


@pytest.fixture
def with_a_gpu(tmp_path: Path) -> Path:
    """The devices of a machine with one GPU."""
    for name in ("nvidia0", "nvidiactl", "null"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_gpu_that_torch_cannot_use_is_no_run_on_the_cpu(with_a_gpu: Path) -> None:
    with pytest.raises(UserError, match=r"NVIDIA GPU .* built for CUDA 13\.0.*CUDA_VISIBLE_DEV"):
        devices.refuse_unusable_gpu(with_a_gpu, {}, "13.0")


@pytest.mark.parametrize(
    ("environment", "built_for"),
    [({"CUDA_VISIBLE_DEVICES": ""}, "13.0"), ({"CUDA_VISIBLE_DEVICES": "-1"}, "13.0"), ({}, None)],
    ids=["hidden", "hidden by -1", "torch for CPUs"],
)
def test_a_gpu_that_nobody_meant_is_left_alone(
    with_a_gpu: Path, environment: dict[str, str], built_for: str | None
) -> None:
    devices.refuse_unusable_gpu(with_a_gpu, environment, built_for)


def test_a_machine_without_a_gpu_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    devices.refuse_unusable_gpu(tmp_path, {}, "13.0")


def sharing() -> int:
    # What a launcher says of the node is not asked: each process may see a device of its own.
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    world = distributed.start(RUN_SECONDS)
    try:
        return world.processes_per_device
    finally:
        distributed.stop(world)


@pytest.mark.dist
def test_processes_count_who_computes_on_their_device() -> None:
    assert on_processes(2, sharing) == [2, 2]


@pytest.mark.parametrize(("key", "value"), [("sharding", "zero3"), ("offload", "cpu")])
def test_processes_that_share_a_gpu_cannot_shard(tmp_path: Path, key: str, value: str) -> None:
    section = tiny.config(tmp_path, backbone={key: value}).backbone
    with pytest.raises(ConfigError, match=f"backbone.{key} = '{value}': 2 processes share a GPU"):
        hf_config._on_shared_gpus(section, 2)


def test_processes_that_share_a_gpu_have_a_replica_each(tmp_path: Path) -> None:
    found = hf_config._on_shared_gpus(tiny.config(tmp_path).backbone, 2)
    assert (found.kind, found.reason) == ("none", "a replica each, since 2 processes share a GPU")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("x")])
def test_a_device_without_room_is_no_fault_of_the_model(error: Exception) -> None:
    assert hf_config.is_of_the_machine(error) == (str(error) != "x")


def allocator_settings(given: str | None) -> str:
    """What torch's allocators are told, where it was imported before."""
    if given is not None:
        os.environ["PYTORCH_ALLOC_CONF"] = given
    devices.set_arithmetic(launch())
    said: str = torch._C._accelerator_getAllocatorSettings()
    return said


@pytest.mark.dist
@pytest.mark.parametrize("given", [None, "max_split_size_mb:64"])
def test_the_allocators_are_told_before_their_first_use_unless_a_person_did(
    given: str | None,
) -> None:
    (said,) = on_processes(1, allocator_settings, given)
    if given:
        assert said == given
    else:
        assert "expandable_segments:True" in said
        assert "pinned_max_round_threshold_mb:1" in said
