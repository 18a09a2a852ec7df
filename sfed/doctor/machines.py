"""Checks of what is here: processes, versions, devices, host memory, the folder of the runs."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sfed.bench.measure import Clock, Matmul, Spread
from sfed.config.load import validate
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.distributed.consistency import by_value
from sfed.distributed.devices import identity
from sfed.doctor.job import Job
from sfed.doctor.report import Result, failed, ok, skipped, warning
from sfed.models.hf_config import DTYPES, dtype_name
from sfed.utils import versions
from sfed.utils.launcher import launch
from sfed.utils.text import size_text

Facts = dict[str, Any]

_MUST_AGREE = ("sfed", "python", *versions.LIBRARIES)
_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (its size is asked for)
_LEAST_SHARED_MEMORY = 2**30
_LEAST_DISK = 10 * 2**30
_FREE_SHARE = 0.9
"""Share of a GPU's memory that is free where nobody else uses it."""
_SLOW_SHARE = 0.8
"""A GPU below this share of the others' rate is named."""
_PRODUCTS = 5


def processes(job: Job) -> Result:
    """Which processes there are, and on which machines."""
    world, here = job.world, launch()
    own = {"host": socket.gethostname(), "pid": os.getpid(), "local_size": here.local_size}
    found = sync.gather_json(world, "processes", own)
    hosts = Counter(one["host"] for one in found)
    told = ", ".join(f"{host}: {count}" for host, count in hosts.items())
    seen = f"{_number(world.size, 'process')} on {_number(len(hosts), 'node')} ({told})"
    figures: Facts = {"processes": found, "nodes": dict(hosts)}
    if any(hosts[one["host"]] < one["local_size"] for one in found):
        return warning(
            f"{seen}, and the launcher says LOCAL_WORLD_SIZE = {found[0]['local_size']}",
            "check that all processes of a node have the same host name",
            **figures,
        )
    if len(set(hosts.values())) > 1:
        return warning(
            f"{seen}: not equally many on each",
            "start equally many processes on each node, or accept that clients are divided by "
            "process and not by node",
            **figures,
        )
    return ok(seen, **figures)


def _number(count: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{count} {what}{'' if count == 1 else plural}"


def software(job: Job) -> Result:
    """Versions of everything that numbers depend on, the same on all processes."""
    found = sync.gather_json(job.world, "versions", versions_here())
    own = found[0]
    differ = {name: by_value([str(one.get(name)) for one in found]) for name in own}
    differ = {name: values for name, values in differ.items() if values}
    cuda = ""
    if own["cuda"]:
        driver = own["driver"] or "unknown"
        cuda = f", CUDA {own['cuda']}, driver {driver}, NCCL {own['nccl']}"
    libraries = ", ".join(f"{name} {own[name]}" for name in _MUST_AGREE)
    if not differ:
        return ok(f"{libraries}{cuda}", versions=own)
    told = "; ".join(f"{name} {values}" for name, values in differ.items())
    figures = {"versions": own, "differences": differ}
    if differ.keys() & set(_MUST_AGREE):
        return failed(
            told, "install the same versions on all nodes: a run refuses to start", **figures
        )
    return warning(told, "install the same driver and CUDA libraries on all nodes", **figures)


def versions_here() -> Facts:
    """Versions of the libraries, of CUDA and of the driver on this process's machine."""
    has_cuda = torch.version.cuda is not None
    return {
        **versions.of_libraries(*versions.RECORDED),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn() if has_cuda else None,
        "nccl": _nccl() if has_cuda else None,
        "driver": _driver(),
    }


def _cudnn() -> int | None:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    try:
        text = _DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module\D*\s(\d[\d.]*)", text)
    return found[1] if found else None


def devices(job: Job) -> Result:
    """The device of each process, its memory, and the dtype of the backbone there."""
    found: list[Facts] = sync.gather_json(job.world, "devices", device_here(job))
    own = found[0]
    figures = {"devices": found}
    if own["type"] == "cpu":
        seen = f"no GPU is used: {own['name']}, backbone in {own['dtype']} ({own['why']})"
        if own["idle_gpus"]:
            return warning(
                f"{seen}, although the machine has {_number(own['idle_gpus'], 'GPU')}",
                "install a torch that is built for CUDA",
                **figures,
            )
        return ok(seen, **figures)
    names = Counter({one["identity"]: one["name"] for one in found}.values())
    told = ", ".join(f"{count} x {name}" for name, count in names.items())
    free = min(one["free_bytes"] for one in found)
    seen = (
        f"{told}, capability {own['capability']}, at least {size_text(free)} of "
        f"{size_text(own['memory_bytes'])} free, {own['backend']}; backbone in {own['dtype']} "
        f"({own['why']})"
    )
    for is_so, problem, remedy in _problems_of_gpus(found):
        if is_so:
            return warning(f"{seen}; {problem}", remedy, **figures)
    return ok(seen, **figures)


def device_here(job: Job) -> Facts:
    """The device of this process."""
    world, device = job.world, job.world.device
    dtype = dtype_name(validate({}), world)
    found: Facts = {
        "device": str(device),
        "identity": identity(device, socket.gethostname()),
        "type": device.type,
        "processes_on_it": world.processes_per_device,
        "dtype": dtype,
        "backend": "gloo" if distributed.is_on_host() else "nccl",
    }
    if device.type == "cpu":
        threads = _number(torch.get_num_threads(), "thread")
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
        is_hidden = torch.version.cuda is not None
        return found | {
            "name": f"{os.cpu_count()} CPU cores, {threads} for each process",
            "idle_gpus": 0 if is_hidden else gpus,
            "why": "CPUs compute bf16 several times slower",
        }
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    native = "computes bf16 natively" if dtype == "bf16" else "is too old for native bf16"
    return found | {
        "name": properties.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "why": f"this GPU {native}",
        "memory_bytes": total,
        "free_bytes": free,
        "own_bytes": torch.cuda.memory_reserved(device),
        "gpus_of_node": torch.cuda.device_count(),
        "local_size": launch().local_size,
    }


def _problems_of_gpus(found: Sequence[Facts]) -> list[tuple[bool, str, str]]:
    """What may be wrong with the GPUs of all processes: whether it is, what, and the remedy."""
    most = max(one["processes_on_it"] for one in found)
    unlike = by_value([f"{one['name']}, {size_text(one['memory_bytes'])}" for one in found])
    used = [
        str(process)
        for process, one in enumerate(found)
        if one["free_bytes"] + one["own_bytes"] < _FREE_SHARE * one["memory_bytes"]
    ]
    one = found[0]
    return [
        (
            most > 1,
            f"{most} processes share a GPU, so messages go through host memory and ZeRO-3 is "
            "refused",
            "start one process per GPU (--nproc_per_node)",
        ),
        (
            bool(unlike),
            f"the GPUs differ: {unlike}",
            "train on equal GPUs: the slowest one sets the pace, the smallest one the memory",
        ),
        (
            bool(used),
            f"more than a tenth of the memory is in use on the GPU of process {', '.join(used)}",
            "end the other programs there (nvidia-smi lists them)",
        ),
        (
            one["local_size"] < one["gpus_of_node"],
            f"{one['gpus_of_node']} GPUs are visible and {one['local_size']} processes run here",
            f"start {one['gpus_of_node']} processes per node, unless the others are meant to rest",
        ),
    ]


def speed(job: Job) -> Result:
    """The rate of a large matrix product on each device, which shows a GPU that is throttled."""
    world = job.world
    dtype = DTYPES[dtype_name(validate({}), world)]
    clock, product = Clock(world.device), Matmul(world.device, dtype)
    product.run()
    sync.barrier(world, "matrix products")
    spread = Spread.of([clock.seconds_of(product.run) for _ in range(_PRODUCTS)])
    rate = product.flops / spread.low / 1e12
    rates: list[float] = sync.gather_json(world, "rates", rate)
    middle = median(rates)
    slow = [(peer, one) for peer, one in enumerate(rates) if one < _SLOW_SHARE * middle]
    rate_text = f"{max(rates):.3g}" if len(rates) == 1 else f"{min(rates):.3g} to {max(rates):.3g}"
    seen = f"{rate_text} TFLOP/s in a large matrix product ({dtype_name(validate({}), world)})"
    figures = {"matmul_tflops": rates}
    if slow and world.device.type == "cuda":
        told = ", ".join(f"process {peer} reaches {one:.3g}" for peer, one in slow)
        return warning(
            f"{seen}; {told}, the median is {middle:.3g}",
            "look at clocks, temperature and other programs of that GPU (nvidia-smi -q)",
            **figures,
        )
    return ok(seen, **figures)


def host(job: Job) -> Result:
    """Memory of each machine, and the shared memory through which NCCL sends within a node."""
    found: list[Facts] = sync.gather_json(job.world, "host memory", host_here())
    free, total = (min(one[key] for one in found) for key in ("free_bytes", "memory_bytes"))
    shared = [one["shared_memory_bytes"] for one in found]
    least = min((one for one in shared if one is not None), default=None)
    told = "not there" if least is None else size_text(least)
    seen = f"{size_text(free)} of {size_text(total)} host memory free, /dev/shm {told}"
    uses_nccl = job.world.device.type == "cuda" and launch().local_size > 1
    if uses_nccl and (least is None or least < _LEAST_SHARED_MEMORY):
        return warning(
            seen,
            "give the container at least 1 GiB of shared memory (docker run --shm-size 16g)",
            hosts=found,
        )
    return ok(seen, hosts=found)


def host_here() -> Facts:
    """Memory of this process's machine."""
    page = os.sysconf("SC_PAGE_SIZE")
    shared = shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else None
    return {
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * page,
        "free_bytes": os.sysconf("SC_AVPHYS_PAGES") * page,
        "shared_memory_bytes": shared,
        "cpu_cores": os.cpu_count(),
    }


def folder(job: Job) -> Result:
    """Whether all processes see one folder of runs, and how much room it has."""
    parent = job.folder.path.parent
    strangers = ", ".join(map(str, job.folder.strangers))
    free = shutil.disk_usage(job.folder.path).free if job.world.is_main else 0
    if strangers:
        return failed(
            f"process {strangers} does not share {parent} with process 0",
            "name a folder on a file system that all nodes share: --dir here, output.dir of a run",
            free_bytes=free,
        )
    seen = f"{parent} is written by all processes, {size_text(free)} free"
    if free < _LEAST_DISK:
        return warning(
            seen,
            "make room: each checkpoint holds all adapters and moments of all clients",
            free_bytes=free,
        )
    return ok(seen, free_bytes=free)


def needs_folder(job: Job) -> Result | None:
    """The result of a check that trains where the processes share no folder."""
    if job.is_shared:
        return None
    return skipped(f"the processes do not share {job.folder.path.parent} (see folder)")
