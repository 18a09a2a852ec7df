"""Measurements of the trainer's step on random weights, for ``--benchmarks`` and ``tests/gpu``.

Each takes a device and a ``Size`` and returns figures. Nothing is communicated and nothing is
downloaded.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from sfed.bench import meters
from sfed.bench.measure import Clock, Matmul
from sfed.bench.steps import Sfed, every_position
from sfed.bench.variants import line_up, seconds_of_step
from sfed.bench.workload import Workload, random_tokens
from sfed.config.load import validate
from sfed.data.batches import Documents
from sfed.models.synthetic import build, matmul_weights, model_config, twin
from sfed.plan import estimate

_COPY_BYTES = {"cuda": 2**28, "cpu": 2**22}


@dataclass(frozen=True)
class Size:
    """The model and the step that are measured."""

    model: str = "tiny"
    layers: int = 2
    clients: int = 1
    rows: int = 2
    tokens: int = 16
    lora_rank: int = 4
    steps: int = 2
    cudnn: int = 0
    """1 = with cuDNN's attention, which the trainer leaves out."""


@dataclass
class Setup:
    """A model with random weights, and the trainer's step on it."""

    model: PreTrainedModel
    workload: Workload
    step: Sfed


def set_up(device: torch.device, size: Size) -> Setup:
    """Make the model where it is used, in bf16 on a GPU and in fp32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = model_config(size.model, None, size.layers)
    workload = Workload(size.clients, size.rows, size.tokens, size.lora_rank, "all-linear", dtype)
    model = build(config, dtype, workload.seed, device)
    ids = random_tokens(config, workload).to(device)
    return Setup(model, workload, Sfed(twin(model), workload, ids, clients_per_pass=size.clients))


def throughput(device: torch.device, size: Size) -> dict[str, Any]:
    """Tokens per second of the trainer, of stock PEFT and of the frozen model, in turns."""
    made = set_up(device, size)
    ids = random_tokens(made.model.config, made.workload).to(device)
    contestants = line_up(made.model, made.workload, ids, "ade")
    clock, names = Clock(device), {"a": "peft", "d": "sfed", "e": "frozen"}
    samples: dict[str, list[float]] = {key: [] for key in names}
    for turn in range(4):
        for key, one in contestants.items():
            seconds = seconds_of_step(one, clock, size.steps)
            if turn:  # the first one warms up
                samples[key].append(seconds)
    product = Matmul(device, made.workload.dtype)
    product.run()
    rate = product.flops / clock.seconds_of(product.run)
    found: dict[str, Any] = {"matmul_tflops": rate / 1e12}
    for key, name in names.items():
        seconds = sorted(samples[key])[1]
        tokens = made.workload.tokens_per_step / seconds
        flops = 4 * matmul_weights(made.model) * tokens
        found[name] = {
            "tokens_per_second": tokens,
            "ms_per_step": seconds * 1e3,
            "share_of_matmul": flops / rate,
        }
    found["sfed_over_peft"] = (
        found["sfed"]["tokens_per_second"] / found["peft"]["tokens_per_second"]
    )
    return found


def _pass(step: Sfed) -> None:
    """Forward and backward."""
    torch.autograd.backward(step.losses().sum())


def launches(device: torch.device, size: Size) -> dict[str, Any]:
    """Operations of a layer and of the optimizer; on a GPU kernels, busy time and host time."""
    one, two = (set_up(device, dataclasses.replace(size, layers=layers)).step for layers in (1, 2))
    for contestant in (one, two):
        contestant.step()
    passes = [meters.operations_of(partial(_pass, step)) for step in (one, two)]
    found: dict[str, Any] = {
        "operations_per_layer": passes[1] - passes[0],
        "operations_beside_layers": 2 * passes[0] - passes[1],
        "operations_of_optimizer": meters.operations_of(two.update),
    }
    del one, two
    gc.collect()
    contestant = set_up(device, size).step
    for _ in range(2):
        contestant.step()
    seconds = meters.seconds_of(device, contestant.step, size.steps)
    found["ms_per_step"] = seconds * 1e3
    found["host_ms_per_step"] = meters.host_seconds_of(device, contestant.step, 3) * 1e3
    if device.type == "cuda":
        kernels = meters.kernels_of(device, contestant.step)
        found |= kernels | {"busy_share": kernels["busy_ms"] / 1e3 / seconds}
    return found


def memory(device: torch.device, size: Size) -> dict[str, Any]:
    """Peak memory of a pass and of an optimizer step beside the figures of ``sfed.plan``."""
    made = set_up(device, size)
    made.step.step()  # makes the moments, and the workspaces of libraries

    def train() -> None:
        torch.autograd.backward(made.step.losses().sum())

    in_pass = meters.peak_bytes_of(device, train)
    optimizer = meters.peak_bytes_of(device, made.step.update)
    needs = _planned(made, size)["needs"]
    transient = max(needs["logits"], needs["transient"])
    planned = needs["copies"] + needs["activations"] + transient
    found: dict[str, Any] = {
        "pass_bytes": in_pass,
        "pass_planned_bytes": planned,
        "pass_measured_over_planned": in_pass / planned,
        "optimizer_bytes": optimizer,
        "optimizer_planned_bytes": needs["optimizer"],
    }
    if device.type == "cuda":  # a CPU does not tell the device's tensors from the host's
        found["state_bytes"] = sum(one.nbytes for one in made.step.state() if one.is_cuda)
        found["state_planned_bytes"] = needs["values"] + needs["moments"] + needs["gradients"]
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return found


def _planned(made: Setup, size: Size) -> dict[str, Any]:
    """What ``sfed plan`` answers for a run with this step."""
    with tempfile.TemporaryDirectory() as folder:
        made.model.config.save_pretrained(folder)
        config = validate(
            {
                "model": {
                    "name": folder,
                    "dtype": "bf16" if made.workload.dtype == torch.bfloat16 else "fp32",
                },
                "data": {"task": "gsm8k", "max_tokens": size.tokens},
                "lora": {"rank": size.lora_rank},
                "federated": {"num_clients": size.clients, "clients_per_pass": None},
                "train": {"batch_size": size.rows},
            }
        )
        return estimate.estimate(config, gpus=1)


def new_shapes(device: torch.device, size: Size) -> dict[str, Any]:
    """What a step of a width that was never seen costs beside one that was."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(bool(size.cudnn))
    step = set_up(device, size).step
    rows, found = size.clients * size.rows, {}
    # Packing makes widths in steps of 8; each is seen twice.
    widths = [size.tokens // 2 + 8 * number for number in range(size.steps)]
    for packed in (False, True):

        def pass_of(width: int, packed: bool = packed) -> float:
            return meters.seconds_of(device, lambda: _ragged_pass(step, rows, width, packed))

        for _ in range(2):
            pass_of(size.tokens // 2 - 4)
        new = [pass_of(width) for width in widths]
        seen = [pass_of(width) for width in widths]
        found["packed" if packed else "padded"] = {
            "new_ms": 1e3 * sum(new) / len(new),
            "slowest_new_ms": 1e3 * max(new),
            "seen_ms": 1e3 * sum(seen) / len(seen),
        }
    return {"cudnn": bool(size.cudnn), "widths": len(widths), **found}


def _ragged_pass(step: Sfed, rows: int, width: int, packed: bool) -> None:
    """A pass over rows of a width, each one document or two."""
    device = step.rows.values.device
    ids = torch.zeros(rows, width, dtype=torch.long, device=device)
    documents = None
    if packed:
        half = width // 2
        places = torch.arange(width, device=device).repeat(rows, 1)
        places[:, half:] -= half
        lengths = (half, width - half) * rows
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        documents = Documents(places, starts, lengths)
    step.rows.grads.zero_()
    losses = step.backbone.token_losses(ids, ids, every_position(ids), documents)
    torch.autograd.backward(losses.sum() / width)


def lora_products(device: torch.device, size: Size) -> dict[str, Any]:
    """The thin products of a layer: on factors as they lie in flat rows, and on copies."""
    width = model_config(size.model, None, 1).hidden_size
    clients, tokens, lora_rank = size.clients, size.rows * size.tokens, size.lora_rank
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, y = random(clients, tokens, width), random(clients, tokens, width)
    flat = random(clients, 2 * lora_rank * width + 64)
    a = flat[:, : lora_rank * width].view(clients, lora_rank, width)
    b = flat[:, lora_rank * width : 2 * lora_rank * width].view(clients, width, lora_rank)
    weight, xa = random(width, width), random(clients, tokens, lora_rank)
    copies = {"a": a.contiguous(), "b": b.contiguous()}
    works: dict[str, Callable[[], object]] = {
        "base": lambda: torch.mm(x.view(-1, width), weight),
        "x A": lambda: torch.bmm(x, a.transpose(1, 2)),
        "x A, copied": lambda: torch.bmm(x, copies["a"].transpose(1, 2)),
        "y += xa B": lambda: y.baddbmm_(xa, b.transpose(1, 2), beta=0.0),
        "y += xa B, copied": lambda: y.baddbmm_(xa, copies["b"].transpose(1, 2), beta=0.0),
        "grad A": lambda: torch.bmm(xa.transpose(1, 2), x),
        "grad B": lambda: torch.bmm(y.transpose(1, 2), xa),
    }
    for work in works.values():
        work()
    return {
        name: {"us": 1e6 * meters.seconds_of(device, work, 10 * size.steps)}
        for name, work in works.items()
    }


def host_copies(device: torch.device, _size: Size) -> dict[str, Any]:
    """Bytes per second between host memory and the device, as for clients that rest."""
    count = _COPY_BYTES[device.type]
    on_device = torch.empty(count, dtype=torch.uint8, device=device)
    found: dict[str, Any] = {"bytes": count}
    kinds = {"pageable": False} | ({"pinned": True} if device.type == "cuda" else {})
    for name, is_pinned in kinds.items():
        host = torch.zeros(count, dtype=torch.uint8, pin_memory=is_pinned)
        to_device = meters.seconds_of(device, partial(on_device.copy_, host, non_blocking=True))
        to_host = meters.seconds_of(device, partial(host.copy_, on_device, non_blocking=True))
        found[name] = {
            "to_device_gb_per_second": count / to_device / 1e9,
            "to_host_gb_per_second": count / to_host / 1e9,
        }
    return found


def host_waits(device: torch.device, size: Size) -> dict[str, Any]:
    """What makes the host wait for the device within a step of the trainer, by place."""
    step = set_up(device, size).step
    step.step()
    with meters.host_waits(device) as waits:
        for _ in range(size.steps):
            step.step()
    return {"waits_per_step": waits.total() / size.steps, "places": meters.most_common(waits)}


Measurement = Callable[[torch.device, Size], dict[str, Any]]
MEASUREMENTS: dict[str, Measurement] = {
    "throughput": throughput,
    "launches": launches,
    "memory": memory,
    "host_waits": host_waits,
    "new_shapes": new_shapes,
    "lora_products": lora_products,
    "host_copies": host_copies,
}
