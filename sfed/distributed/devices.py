"""Which device a process computes on, and how it computes there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from sfed.utils.errors import UserError
from sfed.utils.launcher import Launch
from sfed.utils.text import one_line

_HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES with which a person hides all GPUs."""

_ALLOCATOR = "expandable_segments:True,pinned_max_round_threshold_mb:1"
"""Passes differ in shape: without segments that grow, free memory is in pieces that are too small.
Pinned blocks of clients at rest are as large as asked for, not the next power of two."""


def choose(local_rank: int) -> torch.device:
    """Take the GPU of this process's number on its node, in turns where there are fewer.

    Raises:
        UserError: where the machine has a GPU that torch cannot use.
    """
    if not torch.cuda.is_available():
        refuse_unusable_gpu(Path("/dev"), os.environ, torch.version.cuda)
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def refuse_unusable_gpu(
    devices: Path, environment: Mapping[str, str], built_for: str | None
) -> None:
    """Refuse to train on the CPU without a word where a GPU was meant.

    Args:
        devices: the folder of the machine's devices.
        environment: in which a person may have hidden the GPUs.
        built_for: version of CUDA that torch was built for; None = it was built for CPUs.

    Raises:
        UserError: where the machine has a GPU and torch, built for one, finds none.
    """
    is_hidden = environment.get("CUDA_VISIBLE_DEVICES", "0") in _HIDDEN
    if built_for is None or is_hidden or not any(devices.glob("nvidia[0-9]*")):
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "it finds none"
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)
    raise UserError(
        f"this machine has an NVIDIA GPU that torch {torch.__version__}, built for CUDA "
        f"{built_for}, cannot use: {reason}; install a driver for CUDA {built_for} or a torch "
        "built for an older CUDA, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
    )


def identity(device: torch.device, host: str) -> str:
    """Name a device among those of all machines, whatever number this process sees it under."""
    if device.type == "cpu":
        return f"{host}/cpu"
    return f"{host}/{torch.cuda.get_device_properties(device).uuid}"


@contextmanager
def unchanged_arithmetic() -> Iterator[None]:
    """Restore at the end of the block what ``set_arithmetic`` and ``choose`` change within it.

    But for environment variables, of which there are more.
    """
    matmul = torch.backends.cuda.matmul
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    reduces = matmul.allow_bf16_reduced_precision_reduction
    has_cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    device = torch.cuda.current_device() if has_cuda else None
    try:
        with torch.random.fork_rng([] if device is None else [device]):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        matmul.allow_bf16_reduced_precision_reduction = reduces
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn)
        if device is not None:
            torch.cuda.set_device(device)


def set_arithmetic(here: Launch) -> None:
    """Set how this process computes, before it uses its device for the first time.

    fp32 is fp32, and sums over bf16 products are kept in fp32. cuDNN's attention is left out: it
    plans anew for each shape, and the shapes of packed rows differ from step to step.
    """
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, deepspeed and python do not
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here.local_size))
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = _ALLOCATOR
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
