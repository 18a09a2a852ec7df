"""What a plan is asked for: the GPUs, and what is known of a run's speed. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes per second of one GPU in a ring of all: NVLink as measured on 8 x H200, PCIe 5 x16 and
# 100 Gbit/s Ethernet by what the link carries.
LINKS = {"nvlink": 361e9, "pcie": 55e9, "100gbe": 12.5e9}
H100_FLOPS = 989e12
"""FLOP/s of the datasheet: dense, bf16."""


@dataclass(frozen=True)
class Machine:
    """GPUs, all alike, one process on each."""

    gpus: int
    memory_bytes: int
    """Memory of each GPU."""
    link: str = "nvlink"
    """Between them, one of ``LINKS``."""
    datasheet_flops: float = H100_FLOPS
    """Per second and GPU, dense, in the backbone's dtype."""


@dataclass(frozen=True)
class Pace:
    """What is known of the rows and of the speed of a GPU."""

    mean_tokens: int | None = None
    """Mean tokens of a row, for times; None = those of the longest."""
    tokens_per_second: float | None = None
    """Throughput of a GPU; None = an assumed share of the datasheet's rate."""
