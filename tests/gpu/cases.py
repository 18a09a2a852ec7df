"""Cases that a GPU must pass: ``python -m tests.gpu.cases NAME``; pytest runs them on a CPU, too.

Each case trains a tiny federation on the device, states its tolerance, raises AssertionError where
the device does not keep it, and returns the figures that it saw. Runs have processes of their own,
so that the one that compares touches no GPU.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sfed.bench import meters
from sfed.clients.optimizer import StackedOptimizer
from sfed.distributed import world as distributed
from sfed.doctor import measurements
from sfed.doctor.measurements import Size
from sfed.lora import packed_attention
from sfed.memory.costs import USABLE_SHARE
from tests.gpu import arithmetic, measure
from tests.support import glue, launchers, runs, tiny
from tests.support.processes import ends_of, on_processes

Figures = dict[str, Any]
Case = Callable[[str, Path], Figures]

FP32 = {"dtype": "fp32"}
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "local_steps": 5, "batch_size": 4}
NEAR = {"cpu": 0.0, "cuda": 1e-3}
"""Largest difference from a CPU over the largest number of a tensor, after the steps of one round
in fp32: sums are added in another order, and each step carries the differences on."""
AGAIN = {"cpu": 0.0, "cuda": 1e-5}
"""The same between two runs on one device that do the same work."""
GROUPED = {"cpu": 1e-6, "cuda": 1e-4}
"""The same where clients share passes in other groups, or the backbone is stored in shards."""
UNMASKED = {"cpu": 1e-5, "cuda": 2e-2}
"""Of attention without a mask, in fp32 on a CPU and in bf16 on a GPU, from fp32 under a mask."""
FP8 = {"cpu": 2.0**-7, "cuda": 2.0**-7}
"""Of a product in FP8 from its definition: a rounding to bf16, and sums in another order."""
NOTHING_STAYS_GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class Place:
    """A device, a folder, and the runs that a case makes there."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        tiny.save_model(folder / "model")
        tiny.save_rows(folder / "rows.jsonl", 80, kinds=4)
        self._count = 0

    def settings(self, **sections: Any) -> dict[str, Any]:
        """Settings of a run of one round in fp32; sections go over."""
        self._count += 1
        base: dict[str, Any] = {
            "model": {"name": str(self.folder / "model"), **FP32},
            "federated": {"num_clients": 4, "num_rounds": 1, "deadline_seconds": 120.0},
            "train": SGD,
            "evaluation": {"max_examples": 4, "adapters": ["personal"]},
            "output": {"dir": str(self.folder / "runs"), "name": f"run-{self._count}"},
        }
        merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}
        return tiny.settings(self.folder, **merged)

    def run(self, settings: dict[str, Any], processes: int = 1, device: str | None = None) -> Path:
        """Train; returns the run folder."""
        where = environment_of(device or self.device)
        return runs.run(processes, settings, environment=where)


def environment_of(device: str) -> dict[str, str]:
    """What makes a process use a device: a CPU hides the GPUs, a GPU is what sfed takes."""
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
    return {"DS_ACCELERATOR": "cuda", "TRITON_INTERPRET": "0"}


def processes_at_hand(device: str) -> int:
    """Two, or one where there is a single GPU."""
    return 2 if device == "cpu" else min(2, torch.cuda.device_count())


def require_near(what: str, found: float, tolerance: float) -> Figures:
    """Compare a relative difference with its tolerance."""
    assert found <= tolerance, f"{what}: relative difference {found:.3g}, above {tolerance:g}"
    return {"relative_difference": found, "tolerance": tolerance}


def require_finite(run_folder: Path) -> Figures:
    """Losses and adapters are finite, and something was learned."""
    events = runs.rounds(run_folder)
    losses = [event["eval/loss"] for event in events if event.get("eval/loss") is not None]
    assert all(math.isfinite(loss) for loss in losses) and len(losses) >= 2, losses
    for client, tensors in runs.adapters(run_folder).items():
        for name, tensor in tensors.items():
            assert bool(torch.isfinite(tensor).all()), f"{client}: {name} is not finite"
    return {"eval_losses": losses, "peak_bytes": events[-1].get("memory/peak_bytes")}


# --- cases ---------------------------------------------------------------------------------------


def fp32_equals_cpu(device: str, folder: Path) -> Figures:
    """A round in fp32 gives the adapters that a CPU gives."""
    place = Place(device, folder)
    own, reference = place.run(place.settings()), place.run(place.settings(), device="cpu")
    difference = runs.relative_difference(runs.adapters(reference), runs.adapters(own))
    return require_near("fp32 against a CPU", difference, NEAR[device]) | require_finite(own)


def bf16_is_finite(device: str, folder: Path) -> Figures:
    """AdamW on a bf16 backbone, with micro passes, dropout and checkpointing, learns something."""
    place = Place(device, folder)
    settings = place.settings(
        model={"dtype": "bf16"},
        lora={"rank": 4, "dropout": 0.1},
        backbone={"gradient_checkpointing": True},
        train={"optimizer": "adamw", "lr": 1e-2, "micro_batch_size": 2},
    )
    found = require_finite(place.run(settings))
    first, last = found["eval_losses"][0], found["eval_losses"][-1]
    assert last < first, f"the held-out loss went from {first} to {last}"
    return found


def clients_rest_in_host_memory(device: str, folder: Path) -> Figures:
    """Three of four clients train in a round, one in a pass; as if all shared one."""
    place = Place(device, folder)
    shared = {"clients_per_round": 3, "num_rounds": 2}
    paged = place.run(place.settings(federated={**shared, "clients_per_pass": 1}))
    together = place.run(place.settings(federated={**shared, "clients_per_pass": 3}))
    difference = runs.relative_difference(runs.adapters(together), runs.adapters(paged))
    return require_near("paged clients", difference, GROUPED[device])


def a_run_resumes(device: str, folder: Path) -> Figures:
    """A round, a stop and a round from the checkpoint end as two rounds at a stretch."""
    place = Place(device, folder)
    adamw = {**SGD, "optimizer": "adamw", "lr": 1e-2}
    first = place.settings(train=adamw)
    place.run(first)
    resumed = place.run({**first, "federated": {**first["federated"], "num_rounds": 2}})
    whole = place.run(place.settings(train=adamw, federated={"num_rounds": 2}))
    assert [event["round"] for event in runs.rounds(resumed)] == [0, 1, 2]
    difference = runs.relative_difference(runs.adapters(whole), runs.adapters(resumed))
    return require_near("resumed", difference, AGAIN[device])


def answers_are_written(device: str, folder: Path) -> Figures:
    """Generation writes an answer for every held-out example that is asked for."""
    place = Place(device, folder)
    evaluation = {"generate": True, "max_new_tokens": 6, "max_examples": 2, "every_rounds": 1}
    found = place.run(place.settings(evaluation=evaluation))
    clients = runs.rounds(found)[-1]["clients"]
    samples = [sample for client in clients for sample in client.get("samples", ())]
    assert len(samples) >= len(clients), "a client wrote nothing"
    return {"samples": len(samples)}


def a_classifier_equals_cpu(device: str, folder: Path) -> Figures:
    """Adapters and heads of a RoBERTa classifier are those of a CPU."""
    glue.save_all(folder)

    def train(where: str) -> Path:
        output = folder / f"runs-{where}-{len(list(folder.iterdir()))}"
        own = {"model": {**FP32, "name": str(folder / "roberta")}, "federated": {"num_rounds": 1}}
        settings = glue.settings(folder, "roberta", "sst2", output, **own)
        return runs.run(1, settings, environment=environment_of(where))

    own, reference = train(device), train("cpu")
    difference = runs.relative_difference(runs.adapters(reference), runs.adapters(own))
    return require_near("a classifier against a CPU", difference, NEAR[device])


def shards_equal_replicas(device: str, folder: Path) -> Figures:
    """ZeRO-3 on the processes there are gives the adapters of replicas."""
    place, processes = Place(device, folder), processes_at_hand(device)
    sharded = {"sharding": "zero3", "deepspeed": NOTHING_STAYS_GATHERED}
    zero3 = place.run(place.settings(backbone=sharded), processes)
    replicas = place.run(place.settings(backbone={"sharding": "none"}), processes)
    difference = runs.relative_difference(runs.adapters(replicas), runs.adapters(zero3))
    found = require_near("zero3 against replicas", difference, GROUPED[device])
    return found | {"processes": processes}


def offloaded_shards_equal_replicas(device: str, folder: Path) -> Figures:
    """The same with shards in host memory, in one process."""
    place = Place(device, folder)
    offloaded = {"sharding": "zero3", "offload": "cpu", "deepspeed": NOTHING_STAYS_GATHERED}
    zero3 = place.run(place.settings(backbone=offloaded))
    replica = place.run(place.settings())
    difference = runs.relative_difference(runs.adapters(replica), runs.adapters(zero3))
    return require_near("offloaded shards", difference, GROUPED[device])


def more_processes_than_devices(device: str, folder: Path) -> Figures:
    """One process more than there are GPUs train replicas, as one process does."""
    place = Place(device, folder)
    processes = torch.cuda.device_count() + 1 if device == "cuda" else 2
    clients = {"num_clients": max(4, processes)}
    crowd = place.run(place.settings(federated=clients, backbone={"sharding": "none"}), processes)
    alone = place.run(place.settings(federated=clients))
    difference = runs.relative_difference(runs.adapters(alone), runs.adapters(crowd))
    found = require_near("several processes on a device", difference, GROUPED[device])
    return found | {"processes": processes}


def processes_choose_devices(device: str, _folder: Path) -> Figures:
    """Each process of a node takes the GPU of its LOCAL_RANK; NCCL where none is shared."""
    processes = max(2, torch.cuda.device_count()) if device == "cuda" else 2
    places = on_processes(processes, _own_place, environment=environment_of(device))
    devices = [one["device"] for one in places]
    found: Figures = {"devices": devices, "backends": [one["backend"] for one in places]}
    if device == "cpu":
        assert set(devices) == {"cpu"} and set(found["backends"]) == {"gloo"}, found
        return found
    count = torch.cuda.device_count()
    assert devices == [f"cuda:{rank % count}" for rank in range(processes)], found
    assert set(found["backends"]) == {"nccl" if processes <= count else "gloo"}, found
    return found


def _own_place() -> Figures:
    """What a process chose, after one collective on it."""
    world = distributed.start(120.0)
    try:
        total = distributed.all_reduce_sum(torch.ones(3, device=world.device))
        assert total.tolist() == [float(world.size)] * 3
        backend = torch.distributed.get_backend()
        return {"device": str(world.device), "backend": str(backend)}
    finally:
        distributed.stop(world)


def an_error_ends_all_processes(device: str, folder: Path) -> Figures:
    """A device that runs out of memory on one process ends the others, and its log says why."""
    settings = Place(device, folder).settings()
    ends = ends_of(2, _train_and_fail, settings, environment=environment_of(device))
    codes = [end.code for end in ends]
    assert all(codes), f"exit codes {codes}"
    assert "injected: out of memory" in ends[1].said, ends[1].said[-1500:]
    return {"exit_codes": codes, "seconds": [round(end.seconds, 1) for end in ends]}


def _train_and_fail(settings: dict[str, Any]) -> None:
    """Train; process 1 fails at its third optimizer step."""
    steps, own = [0], StackedOptimizer.step

    def step(*arguments: Any, **options: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("injected: out of memory")
        return own(*arguments, **options)

    StackedOptimizer.step = step
    runs.train_settings(settings)


def host_seldom_waits(device: str, folder: Path) -> Figures:
    """What makes the host wait in a local step, by place; counted, with a generous bound."""
    settings = Place(device, folder).settings(evaluation={"every_rounds": 9})
    (found,) = on_processes(1, _waits_of_steps, settings, environment=environment_of(device))
    assert found["waits_per_step"] <= 40, found
    return found


def _waits_of_steps(settings: dict[str, Any]) -> Figures:
    """Train and count between the first optimizer step and the last, of one group of clients."""
    own, steps = StackedOptimizer.step, SGD["local_steps"]
    counting: list[Any] = []
    found: Figures = {}

    def step(*arguments: Any, **options: Any) -> Any:
        own(*arguments, **options)
        if not counting:
            context = meters.host_waits(measure.device_at_hand())
            counting.extend((context, context.__enter__(), 0))
            return
        counting[2] += 1
        if counting[2] == steps - 1:
            counting[0].__exit__(None, None, None)
            waits = counting[1]
            found["waits_per_step"] = waits.total() / counting[2]
            found["places"] = meters.most_common(waits)

    StackedOptimizer.step = step
    runs.train_settings(settings)
    return found


def memory_is_planned(device: str, folder: Path) -> Figures:
    """A pass takes what ``sfed.plan`` says, within the share that it leaves for gaps."""
    del folder
    shape = {"cpu": "stories", "cuda": "llama-30m"}[device]
    rows, tokens = {"cpu": (2, 64), "cuda": (4, 256)}[device]
    size = Size(shape, layers=5, clients=2, rows=rows, tokens=tokens, lora_rank=16)
    where = environment_of(device)
    (found,) = on_processes(1, _memory_of, size, device, environment=where)
    ratio = found["pass_measured_over_planned"]
    assert 0.75 <= ratio <= 1 / USABLE_SHARE, found
    return found


def _memory_of(size: Size, device: str) -> Figures:
    return measurements.memory(torch.device(device), size)


def packed_attention_is_that_under_a_mask(device: str, folder: Path) -> Figures:
    """Attention without a mask, and its gradients, are those of a CPU in fp32 under a mask."""
    del folder
    (found,) = on_processes(1, _without_a_mask, device, environment=environment_of(device))
    for name, difference in found["differences"].items():
        require_near(name, difference, UNMASKED[device])
    return found


def _without_a_mask(device: str) -> Figures:
    """For widths of heads and windows; and whether a second backward pass gives the same bits."""
    generator, lengths = torch.Generator().manual_seed(0), (50, 1, 13, 40, 24)
    dtype = {"cpu": torch.float32, "cuda": torch.bfloat16}[device]
    differences, is_repeated = {}, True
    for width, window in itertools.product((8, 64, 128, 256), (None, 16)):
        shapes = [(2, heads, sum(lengths) // 2, width) for heads in (8, 2, 2, 8)]
        drawn = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
        own, again = (_attended(drawn, lengths, window, device) for _ in range(2))
        is_repeated &= all(map(torch.equal, own, again))
        expected = _attended([one.float() for one in drawn], lengths, window, None)
        for name, one, other in zip(("o", "dq", "dk", "dv"), own, expected, strict=True):
            difference = float((one.float() - other).norm() / other.norm())
            differences[f"{name}, heads of {width}, window {window}"] = difference
    return {"differences": differences, "backward_repeats": is_repeated}


def _attended(
    drawn: list[torch.Tensor], lengths: tuple[int, ...], window: int | None, device: str | None
) -> list[torch.Tensor]:
    """Output and gradients of q, k, v, on the host; device: None = under a mask."""
    *qkv, gradient = (one.detach().to(device or "cpu").requires_grad_() for one in drawn)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    if device is not None:
        told = packed_attention.told(starts.to(device), lengths)
        output, _ = packed_attention.attend(nn.Identity(), *qkv, **told, sliding_window=window)
    else:
        place = torch.arange(sum(lengths)).view(2, 1, -1)
        document = torch.bucketize(place, starts[1:], right=True)
        behind = place[..., None] - place[..., None, :]
        seen = (document[..., None] == document[..., None, :]) & (behind >= 0)
        seen &= behind < (window or sum(lengths))
        of_rows = functional.scaled_dot_product_attention(*qkv, attn_mask=seen, enable_gqa=True)
        output = of_rows.transpose(1, 2)
    torch.autograd.backward(output, gradient.detach().transpose(1, 2))
    return [one.detach().cpu() for one in (output, *(one.grad for one in qkv))]


def kernels_equal_torch(device: str, folder: Path) -> Figures:
    """Kernels of Triton give what torch's operations give; and the seconds of both."""
    del folder
    # A fresh process: the fork server has imported Triton for the interpreter, or for the compiler.
    variables = launchers.environment(**environment_of(device))
    done = launchers.python("-m", "tests.gpu.arithmetic", device, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    if "skipped" not in found:
        for name, one in found.items():
            assert one["excess"] <= 1.0, (name, one)
    return found


def fp8_products_are_their_definition(device: str, folder: Path) -> Figures:
    """A layer in FP8 gives the products of the rounded numbers; and its seconds beside bf16."""
    del folder
    (found,) = on_processes(1, arithmetic.fp8_products, device, environment=environment_of(device))
    for name, difference in found.get("differences", {}).items():
        require_near(name, difference, FP8[device])
    return found


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        fp32_equals_cpu,
        bf16_is_finite,
        clients_rest_in_host_memory,
        a_run_resumes,
        answers_are_written,
        a_classifier_equals_cpu,
        shards_equal_replicas,
        offloaded_shards_equal_replicas,
        more_processes_than_devices,
        processes_choose_devices,
        an_error_ends_all_processes,
        host_seldom_waits,
        memory_is_planned,
        packed_attention_is_that_under_a_mask,
        kernels_equal_torch,
        fp8_products_are_their_definition,
    )
}


def main(words: list[str]) -> None:
    """Run one case on the GPU, or on the CPU where there is none, and print its figures."""
    device = measure.device_at_hand().type
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        figures = CASES[words[0]](device, Path(folder))
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
