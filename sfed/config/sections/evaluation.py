"""The section ``evaluation``: when, on what and with which adapters. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from sfed.config.fields import BatchSize, Count, CountOrZero, Section, as_list


class EvaluationSection(Section):
    """Evaluation on held-out data."""

    every_rounds: CountOrZero = 1
    """Interval of evaluations in rounds. One more is made before training and one at the end. 0 =
    no evaluation."""
    adapters: Annotated[tuple[Literal["personal", "global"], ...], BeforeValidator(as_list)] = (
        "personal",
        "global",
    )
    """Adapters that are evaluated: personal = each client's adapter on its own held-out data;
    global = averaged A and mean B on the held-out data of all clients."""
    clients: Count | None = None
    """Number of clients that are evaluated, at most N: a random sample, drawn from the seed and the
    same in all rounds; means are then means over the sample. null = all. May change on resume."""
    generate: bool = False
    """Generate answers by greedy decoding: exact match for gsm8k, samples in the report for all
    text tasks."""
    max_new_tokens: Count = 256
    """Maximum length of a generated answer in tokens."""
    max_examples: Count | None = None
    """Maximum number of held-out examples per client: a random subset, drawn from the seed. null =
    all."""
    batch_size: BatchSize = 16
    """Number of sequences per client and evaluation pass, at most 1,000,000."""
