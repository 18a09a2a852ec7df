"""One run of the bench: stock PEFT, the trainer and the floor in turns, and what is counted."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sfed.bench import round_parts, scaling
from sfed.bench.measure import (
    Clock,
    Matmul,
    SavedBytes,
    Spread,
    datasheet_flops,
    describe_machine,
    interleaved,
    ratios,
    shape_of,
)
from sfed.bench.steps import TRAIN, Contestant, attach
from sfed.bench.variants import VARIANTS, count, line_up, seconds_of_step
from sfed.bench.workload import Workload, random_tokens
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.kernels.choice import choose
from sfed.lora.layout import Layout
from sfed.methods import aggregation
from sfed.models.hf_config import DTYPES
from sfed.models.synthetic import build, matmul_weights, model_config
from sfed.observability.third_party import quieten
from sfed.utils.errors import UserError

_DEADLINE_SECONDS = 600.0
_MATMUL = "matmul"
# (slower, faster): how many times the second is as fast as the first.
_RATIOS = (("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d"), ("d", "e"))
_CONSECUTIVE_STEPS = {"cuda": 4, "cpu": 1}
_COMPARED = "acd"


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    model: str
    model_folder: Path | None
    num_layers: int | None
    dtype: str | None
    """None = bf16 on a GPU, fp32 on a CPU."""
    num_clients: int
    rows: int
    tokens: int
    lora_rank: int
    target_modules: tuple[str, ...] | str
    repeat: int
    budget_seconds: float | None
    collectives: bool
    scaling: bool
    compared: str | None
    """What a comparison varies: the clients, or the LoRA rank."""
    compared_values: tuple[int, ...]


def run(options: Options) -> tuple[dict[str, Any], bool]:
    """Run the benchmark as asked for. Collective under a launcher.

    Returns:
        All results, as they go into JSON, and whether this is the process that speaks.
    """
    world = distributed.start(_DEADLINE_SECONDS)
    quieten(world.rank, world.device.type)
    try:
        config = model_config(options.model, options.model_folder, options.num_layers)
        longest = int(getattr(config, "max_position_embeddings", 2**31))
        if options.tokens > longest:
            raise UserError(
                f"--tokens {options.tokens}: this model reads at most {longest} in a row; "
                "raise --rows instead"
            )
        results = measure(options, config, world)
        sync.leave_store_last(world)
    except torch.OutOfMemoryError:
        raise UserError(
            "the device has too little memory for this: lower --clients, --rows, --tokens, --rank "
            "or --layers"
        ) from None
    finally:
        distributed.stop(world)
    return results, world.is_main


def measure(options: Options, config: PreTrainedConfig, world: World) -> dict[str, Any]:
    """Measure a shape among processes that have met; returns all results. Collective."""
    default = "bf16" if world.device.type == "cuda" else "fp32"
    dtype_name = options.dtype or default
    workload = Workload(
        options.num_clients,
        options.rows,
        options.tokens,
        options.lora_rank,
        options.target_modules,
        DTYPES[dtype_name],
    )
    results: dict[str, Any] = {
        "machine": {**describe_machine(world.device), "processes": world.size},
        "configuration": {
            **dataclasses.asdict(options),
            "model_folder": str(options.model_folder) if options.model_folder else None,
            "dtype": dtype_name,
            "shape": shape_of(config),
        },
        "notes": [],
    }
    layout = _layout(config, workload)
    a_bytes = aggregation.message_bytes(layout, ("A",))
    results["configuration"]["a_bytes"] = a_bytes
    if options.collectives:
        found = round_parts.measure_collectives(world, a_bytes, options.repeat)
        return results | {"collectives": found}
    model = build(config, workload.dtype, workload.seed, world.device)
    results["configuration"] |= {
        "weights": sum(weight.numel() for weight in model.parameters()),
        "matmul_weights": matmul_weights(model),
    }
    if options.scaling:
        job = scaling.measure_scaling(
            world, model, workload, options.repeat, options.budget_seconds
        )
        return results | {"scaling": [job], "notes": _notes_on_scaling(world, workload)}
    if options.compared is not None:
        return results | {"compare": _compare(options, model, workload, world)}
    return results | _compare_variants(options, config, model, workload, world)


def _compare_variants(
    options: Options,
    config: PreTrainedConfig,
    model: PreTrainedModel,
    workload: Workload,
    world: World,
) -> dict[str, Any]:
    """All variants in turns, what is counted of them, and the other parts of a round."""
    counts = count(VARIANTS, config, workload, world.device)
    contest = Contest(model, workload, world, "".join(v.key for v in VARIANTS))
    found = contest.measure(options.repeat, options.budget_seconds)
    for variant in VARIANTS:
        found["variants"][variant.key] |= {
            "name": variant.name,
            "saved_bytes_per_token_and_layer": counts[variant.key].saved_bytes,
            "saved_bytes_per_client_and_layer": counts[variant.key].saved_bytes_fixed,
            "operations_per_layer": counts[variant.key].operations,
        }
    found["parts"] = round_parts.measure_parts(
        world, contest.contestants, workload, model, options.repeat
    )
    return found | {"notes": _notes(world, workload)}


class Contest:
    """All contestants on one model."""

    def __init__(self, model: PreTrainedModel, workload: Workload, world: World, keys: str) -> None:
        self._workload, self._device = workload, world.device
        self._matmul_weights = matmul_weights(model)
        ids = random_tokens(model.config, workload).to(world.device)
        self.contestants = line_up(model, workload, ids, keys)

    def measure(self, repeat: int, budget_seconds: float | None) -> dict[str, Any]:
        """Time all in turns, and the large matrix product with them."""
        for contestant in self.contestants.values():  # the first step makes the moments
            seconds_of_step(contestant, Clock(self._device), 1)
        memory = {key: self._memory(one) for key, one in self.contestants.items()}
        samples, matmul_flops = self._time(repeat, budget_seconds)
        rate = Spread.of([matmul_flops / seconds for seconds in samples.pop(_MATMUL)])
        promised = datasheet_flops(self._device, self._workload.dtype)
        variants: dict[str, Any] = {}
        for key, seconds in samples.items():
            spread = Spread.of(seconds)
            tokens = self._workload.tokens_per_step / spread.median
            flops = 4 * self._matmul_weights * tokens
            variants[key] = {
                "seconds_per_step": spread.as_json(),
                "samples_seconds": seconds,
                "passes_per_step": self.contestants[key].num_turns,
                "tokens_per_second": tokens,
                "mfu_of_measured_matmul": flops / rate.median,
                "mfu_of_datasheet": None if promised is None else flops / promised,
                **memory[key],
            }
        return {
            "matmul": {"flops_per_second": rate.as_json(), "datasheet_flops_per_second": promised},
            "variants": variants,
            "ratios": {
                f"{slow}/{fast}": ratios(samples[slow], samples[fast]).as_json()
                for slow, fast in _RATIOS
                if slow in samples and fast in samples
            },
        }

    def _time(
        self, repeat: int, budget_seconds: float | None
    ) -> tuple[dict[str, list[float]], float]:
        clock, matmul = Clock(self._device), Matmul(self._device, self._workload.dtype)
        consecutive = _CONSECUTIVE_STEPS[self._device.type]

        def task_of(contestant: Contestant) -> Callable[[], float]:
            return lambda: seconds_of_step(contestant, clock, consecutive)

        tasks = {key: task_of(one) for key, one in self.contestants.items()}
        tasks[_MATMUL] = lambda: clock.seconds_of(matmul.run)
        return interleaved(tasks, repeat, budget_seconds), matmul.flops

    def _memory(self, contestant: Contestant) -> dict[str, Any]:
        """What a pass leaves for its backward, and the device's peak as if it were alone."""
        contestant.enter(0)
        with SavedBytes((*contestant.frozen(), *contestant.state())) as saved:
            contestant.losses()
        contestant.leave()
        return {"saved_bytes_of_pass": saved.total, "peak_bytes": self._peak_bytes(contestant)}

    def _peak_bytes(self, contestant: Contestant) -> int | None:
        """Peak of a step without what the others store; None on a CPU, where nobody counts."""
        if self._device.type != "cuda":
            return None
        clock = Clock(self._device)
        others = [one for one in self.contestants.values() if one is not contestant]
        elsewhere = _bytes_of(t for one in others for t in one.state() if t.is_cuda)
        clock.read()
        torch.cuda.reset_peak_memory_stats(self._device)
        seconds_of_step(contestant, clock, 1)
        return torch.cuda.max_memory_allocated(self._device) - elsewhere


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _compare(
    options: Options, model: PreTrainedModel, workload: Workload, world: World
) -> dict[str, Any]:
    """The cost of a step against the number of clients or the LoRA rank."""
    points = []
    for value in options.compared_values:
        if options.compared == "clients":
            load = dataclasses.replace(workload, num_clients=value)
        else:
            load = dataclasses.replace(workload, lora_rank=value)
        measured = Contest(model, load, world, _COMPARED).measure(
            options.repeat, options.budget_seconds
        )
        points.append({"value": value, **measured})
        gc.collect()  # models refer to themselves in circles
    return {
        "varied": options.compared,
        "points": points,
        "slopes": _slopes(points) if len(points) > 1 else {},
    }


def _slopes(points: list[dict[str, Any]]) -> dict[str, float]:
    """Log-log slopes of the seconds of a step: 1 = in proportion, 0 = free."""
    xs = [math.log(point["value"]) for point in points]
    slopes = {}
    for key in _COMPARED:
        timings = [point["variants"][key]["seconds_per_step"] for point in points]
        ys = [math.log(timing["median"]) for timing in timings]
        slopes[key] = statistics.linear_regression(xs, ys).slope
    return slopes


def _layout(config: PreTrainedConfig, workload: Workload) -> Layout:
    """A client's row for this shape, without any weight.

    Raises:
        UserError: where a target is no layer of this shape.
    """
    model = build(config, workload.dtype, workload.seed, torch.device("meta"), blank=True)
    try:
        return attach(model, workload).layout
    except UserError as mistake:
        raise UserError(str(mistake).replace("lora.target_modules", "--targets")) from None


def _notes_on_scaling(world: World, workload: Workload) -> list[str]:
    if workload.num_clients >= world.size:
        return []
    return [
        f"strong scaling: {workload.num_clients} clients are fewer than {world.size} processes, so "
        "it was not measured; raise --clients"
    ]


def _notes(world: World, workload: Workload) -> list[str]:
    """What a reader must know to use the figures."""
    notes = []
    if workload.dtype == torch.float32:
        notes.append("a and b are the same here, since the backbone is fp32 too")
    if world.size == 1:
        notes.append("aggregation: within one process, so nothing is sent")
        notes.append("hooks of ZeRO-3: measured among two or more processes")
    if world.size > 1:
        notes.append(
            f"figures are those of process 0, while {world.size} processes ran the same side by "
            "side; the aggregation is among all of them"
        )
    if world.device.type != "cpu":
        kernels = choose(TRAIN.kernels, world.device, workload.dtype)
        notes.append(f"kernels of c and d: {kernels.line}")
    if world.device.type == "cpu":
        notes.append("peak memory: measured on GPUs only; see what a pass keeps instead")
    return notes
