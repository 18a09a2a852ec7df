"""This process's place among those that a launcher started, from its environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Place of this process; without a launcher it is the only one."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """Number of processes."""
    local_rank: int
    """Number of this process on its node, from 0."""
    local_size: int
    """Number of processes on this node."""


def launch() -> Launch:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as they are now."""
    environment = os.environ
    size = int(environment.get("WORLD_SIZE", "1"))
    # torchrun says LOCAL_WORLD_SIZE, deepspeed says LOCAL_SIZE.
    local_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    return Launch(
        int(environment.get("RANK", "0")),
        size,
        int(environment.get("LOCAL_RANK", "0")),
        int(local_size or size),
    )
