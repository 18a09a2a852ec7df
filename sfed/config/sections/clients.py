"""The section ``clients``: what single clients train with. Needs no torch."""

from __future__ import annotations

from pydantic import PositiveFloat

from sfed.config.fields import BatchSize, Count, Rank, Section


class ClientSection(Section):
    """What one client has in the place of lora.rank and of keys of train."""

    rank: Rank | None = None
    """LoRA rank of this client, at most 65536. null = lora.rank."""
    lr: PositiveFloat | None = None
    """Learning rate of this client, above 0. null = train.lr."""
    batch_size: BatchSize | None = None
    """Number of sequences per optimizer step of this client, at most 1,000,000. null =
    train.batch_size."""
    local_steps: Count | None = None
    """Number of optimizer steps of this client per round. null = train.local_steps, or
    train.local_epochs where that is set."""
