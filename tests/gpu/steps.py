"""The steps of ``python -m tests.gpu``, in order of what must be known first. Needs no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass

ANSWER = "{answer}"
"""Word of a command in whose place comes the file that it writes its figures to."""

CASES = (
    "fp32_equals_cpu",
    "bf16_is_finite",
    "clients_rest_in_host_memory",
    "a_run_resumes",
    "answers_are_written",
    "a_classifier_equals_cpu",
    "processes_choose_devices",
    "more_processes_than_devices",
    "an_error_ends_all_processes",
    "shards_equal_replicas",
    "offloaded_shards_equal_replicas",
    "host_seldom_waits",
    "memory_is_planned",
    "packed_attention_is_that_under_a_mask",
    "kernels_equal_torch",
    "fp8_products_are_their_definition",
)
_OF_A_CASE = ("datasets", "peft", "pytest", "transformers")
_SHARDED = {"shards_equal_replicas", "offloaded_shards_equal_replicas"}
_OF_THE_TRAINER = ("datasets", "peft", "transformers")
_OF_A_MEASUREMENT = ("peft", "transformers")

# Weights of the full width, few layers; a step of one client, and one of sixteen.
_ONE = "model=llama2-7b layers=4 clients=1 rows=8 tokens=512 lora_rank=16 steps=10"
_MANY = "model=llama2-7b layers=4 clients=16 rows=1 tokens=256 lora_rank=16 steps=10"
_SHAPES = "model=llama2-7b layers=2 clients=1 rows=4 tokens=512 lora_rank=16 steps=24"
_SMALL_ONE = "model=tiny layers=2 clients=1 rows=2 tokens=32 lora_rank=4 steps=2"
_SMALL_MANY = "model=tiny layers=2 clients=4 rows=1 tokens=32 lora_rank=4 steps=2"


@dataclass(frozen=True)
class Step:
    """One process, its deadline, and the packages without which it is skipped."""

    name: str
    command: tuple[str, ...]
    deadline_seconds: float = 90.0
    needs: tuple[str, ...] = ()


def hardware() -> Step:
    """The first step; what it finds decides on the sizes of the others."""
    return _measurement("hardware", "")


def all_steps(*, full: bool) -> list[Step]:
    """The steps after the first one.

    Args:
        full: the sizes for a GPU; else sizes for a CPU, to see that everything runs.
    """
    one, many, shapes = (_ONE, _MANY, _SHAPES) if full else (_SMALL_ONE, _SMALL_MANY, _SMALL_ONE)
    return [
        _measurement("throughput", one, "-one-client"),
        *(_case(name) for name in CASES),
        _measurement("launches", one, "-one-client"),
        _measurement("memory", one, "-one-client"),
        _measurement("host_waits", one),
        _measurement("new_shapes", f"{shapes} cudnn=1"),
        _measurement("new_shapes", f"{shapes} cudnn=0", "-without-cudnn"),
        _measurement("throughput", many, "-many-clients"),
        _measurement("launches", many, "-many-clients"),
        _measurement("memory", many, "-many-clients"),
        _measurement("lora_products", one),
        _measurement("host_copies", one),
        _collectives(full=full),
        _bench(full=full),
    ]


def _measurement(name: str, size: str, suffix: str = "") -> Step:
    command = (sys.executable, "-m", "tests.gpu.measure", name, *size.split())
    needs = () if name == "hardware" else _OF_A_MEASUREMENT
    return Step(f"{name}{suffix}", command, needs=needs)


def _case(name: str) -> Step:
    needs = (*_OF_A_CASE, "deepspeed") if name in _SHARDED else _OF_A_CASE
    return Step(name, (sys.executable, "-m", "tests.gpu.cases", name), needs=needs)


def _collectives(*, full: bool) -> Step:
    """Two processes; where there is one GPU they share it, and gloo carries."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    model = ("--model", "llama2-7b" if full else "tiny", "--repeat", "3")
    words = ("-m", "sfed.bench", "--collectives", *model, "--json", ANSWER)
    needs = (*_OF_THE_TRAINER, "deepspeed")
    return Step("collectives", (sys.executable, *launcher, *words), needs=needs)


def _bench(*, full: bool) -> Step:
    """The trainer's own benchmark, with the other parts of a round and the hooks of ZeRO-3."""
    shape = "--model llama2-7b --layers 4 --clients 1 --rows 8 --tokens 512 --rank 16 --seconds 30"
    if not full:
        shape = "--model tiny --clients 2 --tokens 16 --rank 4"
    words = ("-m", "sfed.bench", *shape.split(), "--repeat", "3", "--json", ANSWER)
    return Step("bench", (sys.executable, *words), 150.0, (*_OF_THE_TRAINER, "deepspeed"))
