"""The measurements of ``--benchmarks``: what the page Benchmarks shows of a device.

Every process measures on its own device, all at the same time; figures are those of process 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sfed.bench import compare
from sfed.doctor.job import Job
from sfed.doctor.measurements import MEASUREMENTS, Size
from sfed.doctor.report import Result, failed, ok
from sfed.models.synthetic import model_config
from sfed.utils.text import one_line

# Weights of the full width, few layers; a step of one client, and one of sixteen.
ONE_CLIENT = {
    "cuda": Size("llama2-7b", layers=4, clients=1, rows=8, tokens=512, lora_rank=16, steps=10),
    "cpu": Size("tiny", layers=2, clients=1, rows=2, tokens=32, lora_rank=4, steps=2),
}
MANY_CLIENTS = {
    "cuda": Size("llama2-7b", layers=4, clients=16, rows=1, tokens=256, lora_rank=16, steps=10),
    "cpu": Size("tiny", layers=2, clients=4, rows=1, tokens=32, lora_rank=4, steps=2),
}
MANY_WIDTHS = {
    "cuda": Size("llama2-7b", layers=2, clients=1, rows=4, tokens=512, lora_rank=16, steps=24),
    "cpu": ONE_CLIENT["cpu"],
}
_TURNS = 3
_SECONDS = 60.0


@dataclass(frozen=True)
class Measurement:
    """A measurement of ``measurements`` as a check."""

    measures: str
    sizes: Mapping[str, Size]
    told: tuple[str, ...]
    """Figures of the printed line; a dot leads into a dictionary."""

    def __call__(self, job: Job) -> Result:
        """Measure; what the figures mean depends on the device.

        Raises:
            OutOfMemoryError: where the device has too little memory.
        """
        device = job.world.device
        try:
            found = MEASUREMENTS[self.measures](device, self.sizes[device.type])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError) as error:
            # Nobody waits for this process here, so what comes after can be examined.
            return failed(
                f"{type(error).__name__}: {one_line(error)}",
                "report it with the JSON of this examination; training does not need it",
            )
        told = [
            f"{name} {value:.4g}" for name in self.told if (value := _at(found, name)) is not None
        ]
        return ok(", ".join(told), size=vars(self.sizes[device.type]), **found)


def _at(found: Mapping[str, Any], name: str) -> float | None:
    value: Any = found
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


@dataclass(frozen=True)
class Bench:
    """``sfed bench`` as a check."""

    sizes: Mapping[str, Size]

    def __call__(self, job: Job) -> Result:
        """Measure beside stock PEFT. Collective."""
        size = self.sizes[job.world.device.type]
        options = compare.Options(
            model=size.model,
            model_folder=None,
            num_layers=size.layers,
            dtype=None,
            num_clients=size.clients,
            rows=size.rows,
            tokens=size.tokens,
            lora_rank=size.lora_rank,
            target_modules="all-linear",
            repeat=_TURNS,
            budget_seconds=_SECONDS if job.world.size == 1 else None,
            collectives=False,
            scaling=False,
            compared=None,
            compared_values=(),
        )
        config = model_config(size.model, None, size.layers)
        found = compare.measure(options, config, job.world)
        ours, ratio = found["variants"]["d"], found["ratios"]["a/d"]["median"]
        seen = f"{ours['tokens_per_second']:,.0f} tokens/s, {ratio:.2f} times HF + PEFT"
        return ok(seen, **found)


BENCHMARKS: dict[str, Measurement | Bench] = {
    "bench-one-client": Bench(ONE_CLIENT),
    "bench-many-clients": Bench(MANY_CLIENTS),
    "launches-one-client": Measurement(
        "launches", ONE_CLIENT, ("operations_per_layer", "ms_per_step", "kernels", "busy_share")
    ),
    "launches-many-clients": Measurement(
        "launches", MANY_CLIENTS, ("operations_per_layer", "ms_per_step", "kernels", "busy_share")
    ),
    "memory-one-client": Measurement("memory", ONE_CLIENT, ("pass_measured_over_planned",)),
    "memory-many-clients": Measurement("memory", MANY_CLIENTS, ("pass_measured_over_planned",)),
    "host-waits": Measurement("host_waits", ONE_CLIENT, ("waits_per_step",)),
    "new-widths": Measurement(
        "new_shapes", MANY_WIDTHS, ("padded.new_ms", "padded.seen_ms", "packed.new_ms")
    ),
    "lora-products": Measurement(
        "lora_products", ONE_CLIENT, ("base.us", "x A.us", "y += xa B.us")
    ),
    "host-copies": Measurement(
        "host_copies",
        ONE_CLIENT,
        ("pageable.to_device_gb_per_second", "pinned.to_device_gb_per_second"),
    ),
}
