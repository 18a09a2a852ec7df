"""The section ``train``: local steps, batches, optimizer and rates. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, NonNegativeFloat, PositiveFloat

from sfed.config.fields import BatchSize, Count, Section, weights_by_label

DEFAULT_LOCAL_STEPS = 10
"""Of a round, where neither local_steps nor local_epochs is set."""


class TrainSection(Section):
    """Local training of each client."""

    local_steps: Count | None = None
    """Number of optimizer steps of a client per round. null = local_epochs; if that is null too,
    10."""
    local_epochs: Count | None = None
    """Number of epochs over a client's own examples per round, instead of local_steps. null =
    local_steps."""
    batch_size: BatchSize = 8
    """Number of sequences per client and optimizer step, at most 1,000,000."""
    micro_batch_size: BatchSize | None = None
    """Number of sequences per client and pass, at most train.batch_size; gradients of a step are
    accumulated and weighted by tokens. null = train.batch_size."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the adapters. Each client has its own state."""
    lr: PositiveFloat = 3e-4
    """Learning rate, above 0; that of B is lr times loraplus_ratio."""
    loraplus_ratio: PositiveFloat = 1.0
    """LoRA+: the learning rate of B divided by that of A, above 0. 1 = plain LoRA."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, at least 0."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Maximum L2 norm of a client's gradient, above 0; larger gradients are clipped. null = no
    clipping."""
    class_weights: Annotated[
        Literal["none", "balanced"] | dict[str, PositiveFloat], BeforeValidator(weights_by_label)
    ] = "none"
    """Weights of the classes in the training loss: balanced = inversely proportional to their
    numbers of training examples of all clients; {label: weight} = relative weights, above 0. They
    are scaled so that their mean over all training examples is 1."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or reduced along a cosine or a line to 0 at the
    end of the run (not of a round)."""
    warmup_rounds: NonNegativeFloat = 0.0
    """Length of the linear warm-up of the learning rate in rounds, at least 0; fractions are
    allowed."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes AdamW, SwiGLU, the rotary embedding, dropout and FP8 codes: triton = kernels of
    Triton, on a GPU; torch = operations of torch; auto = triton on a GPU where it is installed and
    gives what torch gives, else torch. May change on resume."""
