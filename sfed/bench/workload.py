"""The size of a benchmark's step, and random tokens of that size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Workload:
    """What one step of every client is made of."""

    num_clients: int
    rows: int
    """Rows of one client."""
    tokens: int
    """Tokens of one row."""
    lora_rank: int
    target_modules: tuple[str, ...] | str
    dtype: torch.dtype
    seed: int = 0

    @property
    def tokens_per_client(self) -> int:
        """That one client reads in a step."""
        return self.rows * self.tokens

    @property
    def tokens_per_step(self) -> int:
        """That all clients read in a step."""
        return self.num_clients * self.tokens_per_client


def random_tokens(config: PreTrainedConfig, workload: Workload) -> torch.Tensor:
    """(clients * rows, tokens) int64 on the host: what each client reads, over and over."""
    generator = torch.Generator().manual_seed(workload.seed)
    shape = (workload.num_clients * workload.rows, workload.tokens)
    return torch.randint(config.vocab_size, shape, generator=generator)


def smaller(workload: Workload, num_clients: int, rows: int, tokens: int) -> Workload:
    """Return the same kind of step with other sizes."""
    return dataclasses.replace(workload, num_clients=num_clients, rows=rows, tokens=tokens)
