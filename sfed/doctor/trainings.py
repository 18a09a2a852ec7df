"""Checks that train the tiny federation: right numbers, learning, and ZeRO-3.

The runs are the trainer's own, with its own start, among the processes of this job.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sfed.config.load import validate
from sfed.data.partition import place
from sfed.distributed import sync
from sfed.distributed.shutdown import StoppedEarlyError
from sfed.doctor import federation
from sfed.doctor.job import Job
from sfed.doctor.machines import needs_folder
from sfed.doctor.report import Result, failed, ok, skipped
from sfed.federated.session import train_among
from sfed.files.names import ADAPTER_FILE, GLOBAL, adapter_folder
from sfed.storage.run_record import RunRecord, open_run
from sfed.utils.errors import UserError
from sfed.utils.text import one_line

Tensors = dict[str, torch.Tensor]

NEAR_CPU = {"cpu": 1e-5, "cuda": 1e-3}
"""Largest difference from a CPU over the largest number of a tensor, after one round of SGD in
fp32. Each product and sum is rounded to 2^-24, in another order on another device, and five steps
carry the differences on: expected are about 1e-5. A product in TF32 or bf16 (2^-11, 2^-8), a wrong
scale or a missing term is above. On a CPU only the mean over processes is in another order; with
one process nothing is, and the adapters are equal bit by bit."""
NEAR_REPLICA = {"cpu": 1e-6, "cuda": 1e-4}
"""The same between a backbone in shards and replicas, on one kind of device."""
NOTHING_STAYS_GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Otherwise every parameter of a model so small stays on every process."""
_LEAST_CLIENTS = 4
_SGD: dict[str, Any] = {
    "model": {"dtype": "fp32"},
    "train": {"optimizer": "sgd", "lr": 0.05, "local_steps": 5, "batch_size": 4},
    "federated": {"num_rounds": 1, "clients_per_pass": 2},
    "evaluation": {"max_examples": 4, "adapters": ["personal"]},
}
_DEFAULTS: dict[str, Any] = {
    "train": {"lr": 1e-2, "local_steps": 10, "batch_size": 4},
    "federated": {"num_rounds": 2},
}
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def numbers(job: Job) -> Result:
    """SGD in fp32 on the devices gives the adapters that one process on a CPU gives."""
    if problem := needs_folder(job):
        return problem
    own = _train(job, "fp32", _SGD)
    reference = _reference(job)
    found = difference(adapters(reference), adapters(own))
    device = job.world.device.type
    is_same_work = device == "cpu" and job.world.size == 1
    bound = 0.0 if is_same_work else NEAR_CPU[device]
    worst = max(found, key=lambda client: found[client])
    by_client = {client: _of_json(one) for client, one in found.items()}
    figures = {"relative_difference": by_client[worst], "bound": bound, "by_client": by_client}
    seen = f"largest relative difference from a CPU {found[worst]:.2g}, bound {bound:g}"
    if found[worst] <= bound:
        return ok(f"{len(found)} clients, 5 steps of SGD in fp32: {seen}", **figures)
    process = _process_of(job, own, worst)
    return failed(
        f"{seen}: {worst} on process {process} differs most, which computes on "
        f"{_places(job)[process]}",
        "do not train there: leave that device out and run the doctor again, or look for "
        "settings that change the arithmetic (NVIDIA_TF32_OVERRIDE, TORCH_ALLOW_TF32_*)",
        **figures,
    )


def _places(job: Job) -> list[str]:
    """Host and device of each process. Collective."""
    here = f"{os.uname().nodename}/{job.world.device}"
    return [str(one) for one in sync.gather_json(job.world, "places", here)]


def learning(job: Job) -> Result:
    """With the default dtype and AdamW losses fall, A is shared and every client has its own B."""
    if problem := needs_folder(job):
        return problem
    run = _train(job, "defaults", _DEFAULTS)
    return judge_run(run)


def judge_run(run: RunRecord) -> Result:
    """Judge a finished run: finite, learned, A the same for all clients and B for none."""
    losses = [float(event["eval/loss"]) for event in run.evaluated]
    clients = {name: a for name, a in adapters(run).items() if name.startswith("client")}
    figures = {
        "eval_losses": losses,
        "clients": len(clients),
        "dtype": run.config["resolved"]["dtype"],
    }
    infinite = [
        name
        for name, tensors in clients.items()
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    ]
    if infinite:
        return failed(
            f"adapters are not finite: {', '.join(infinite)}",
            "do not train in this dtype here: set model.dtype=fp32, and report it",
            **figures,
        )
    if not losses[-1] < losses[0]:
        return failed(
            f"the held-out loss went from {losses[0]:.3f} to {losses[-1]:.3f}",
            "compare with model.dtype=fp32, and report it with the JSON of this examination",
            **figures,
        )
    first, *others = clients.values()
    if not all(_equal(first, other, "A") for other in others):
        return failed(
            "the clients hold different A after the mean",
            "look at the machines whose clients differ, and report it",
            **figures,
        )
    if any(_equal(first, other, "B") for other in others):
        return failed(
            "two clients hold the same B, which no client shares",
            "report it with the JSON of this examination",
            **figures,
        )
    return ok(
        f"held-out loss {losses[0]:.3f} -> {losses[-1]:.3f}; A is the same for all "
        f"{len(clients)} clients, B is each client's own",
        **figures,
    )


def zero3(job: Job) -> Result:
    """A backbone in shards over all processes gives the adapters that replicas give."""
    if problem := needs_folder(job):
        return problem
    most = max(sync.gather_json(job.world, "sharing", job.world.processes_per_device))
    if job.world.device.type == "cuda" and most > 1:
        return skipped(f"{most} processes share a GPU, where ZeRO-3 is refused")
    replicas = adapters(_train(job, "fp32", _SGD))
    sharded = {"sharding": "zero3", "deepspeed": NOTHING_STAYS_GATHERED}
    shards = adapters(_train(job, "zero3", {**_SGD, "backbone": sharded}))
    found = max(difference(replicas, shards).values())
    bound = NEAR_REPLICA[job.world.device.type]
    seen = f"largest relative difference from replicas {found:.2g}, bound {bound:g}"
    figures = {"relative_difference": _of_json(found), "bound": bound}
    if found > bound:
        return failed(
            seen,
            "set backbone.sharding=none, and report it with the versions of torch and DeepSpeed",
            **figures,
        )
    alone = ", one process, which gathers from nobody" if job.world.size == 1 else ""
    return ok(f"{seen}{alone}", **figures)


def _train(job: Job, name: str, sections: dict[str, Any]) -> RunRecord:
    """Train, or return what was trained before. Collective.

    Raises:
        StoppedEarlyError: where somebody asked to stop.
    """
    if name not in job.trained:
        run = train_among(job.world, validate(_settings(job, name, sections)), job.stop)
        if run is None:
            raise StoppedEarlyError(1)
        job.trained[name] = run
    return job.trained[name]


def _settings(job: Job, name: str, sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run on the federation, which process 0 writes once. Collective."""
    folder = job.folder.path / "federation"
    num_clients = max(_LEAST_CLIENTS, job.world.size)
    if job.world.is_main and not folder.exists():
        folder.mkdir()
        federation.write(folder, num_clients)
    sync.barrier(job.world, "writing the tiny federation")
    deadline = {"deadline_seconds": job.world.deadline_seconds}
    federated = {**sections["federated"], "num_clients": num_clients, **deadline}
    return federation.settings(folder, name, num_clients, **{**sections, "federated": federated})


def _reference(job: Job) -> RunRecord:
    """The same run by one process that sees no GPU. Collective: process 0 starts it."""
    settings = _settings(job, "reference", _SGD)
    with sync.raise_everywhere(job.world, "the reference on a CPU"):
        if job.world.is_main:
            _train_on_cpu(settings, job.folder.path)
    return open_run(Path(settings["output"]["dir"]) / "reference")


def _train_on_cpu(settings: dict[str, Any], folder: Path) -> None:
    config = folder / "reference.json"
    config.write_text(json.dumps(settings), encoding="utf-8")
    done = subprocess.run(  # noqa: S603  (this Python and a file of ours)
        [sys.executable, "-m", "sfed.train", str(config)],
        env=_alone_on_cpu(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2] or "it said nothing"
        raise UserError(f"the reference on a CPU failed: {one_line(last)}")


def _alone_on_cpu(folder: Path) -> dict[str, str]:
    """This process's environment without its launcher and without GPUs."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith(("TORCHELASTIC_", "SFED_", "MASTER_"))
    }
    return {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_DATASETS_CACHE": str(folder / "cache" / "reference"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def adapters(run: RunRecord) -> dict[str, Tensors]:
    """The exported adapters: client-0000, ..., whatever their folders are called, and global."""
    found = {adapter_folder(one.client): one.adapter for one in run.clients.values()}
    found[GLOBAL] = run.adapters.get(GLOBAL)
    return {name: load_file(path / ADAPTER_FILE) for name, path in found.items() if path}


def difference(one: dict[str, Tensors], other: dict[str, Tensors]) -> dict[str, float]:
    """Largest difference over the largest number of a tensor, for each client.

    Raises:
        UserError: where the two do not hold the same clients and tensors.
    """
    if one.keys() != other.keys():
        raise UserError(f"the runs hold other clients: {sorted(one.keys() ^ other.keys())}")
    found = {}
    for client, tensors in one.items():
        worst = 0.0
        for name, tensor in tensors.items():
            scale = max(float(tensor.abs().max()), 1e-12)
            gap = float((tensor - other[client][name]).abs().max()) / scale
            worst = max(worst, float("inf") if math.isnan(gap) else gap)
        found[client] = worst
    return found


def _of_json(number: float) -> float | None:
    """The number; JSON knows none that is not finite."""
    return number if math.isfinite(number) else None


def _equal(one: Tensors, other: Tensors, factor: str) -> bool:
    """Whether all factors of a kind are equal bit by bit."""
    names = [name for name in one if f".lora_{factor}." in name]
    return all(torch.equal(one[name], other[name]) for name in names)


def _process_of(job: Job, run: RunRecord, client: str) -> int:
    """The process that trained a client, by the name of its adapter."""
    number = int(client.rpartition("-")[2])
    by_number = place(max(_LEAST_CLIENTS, job.world.size), job.world.size)
    owners = run.config["resolved"].get("placement", by_number)
    return next(process for process, own in enumerate(owners) if number in own)
