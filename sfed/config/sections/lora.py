"""The section ``lora``: shape, start and scaling of the adapters. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sfed.config.fields import Exponent, Location, Rank, Section, ranks_by_client


class LoraSection(Section):
    """The LoRA adapters."""

    rank: Annotated[Rank | tuple[Rank, ...], BeforeValidator(ranks_by_client)] = 8
    """LoRA rank r, at most 65536; a list gives each client its own, in the order of the clients.
    Ranks of single clients by name are set in the section clients."""
    alpha: float | None = Field(default=None, gt=0, le=1e9)
    """LoRA alpha, above 0 and at most 1e9, in the formula that lora.scaling selects. null = the
    method's default."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the input of the adapters, at least 0 and below 1. Masks follow
    from the seed, round, step, client, example and token, whatever the device and the rows."""
    target_modules: tuple[str, ...] | str = "all-linear"
    """Names of the layers that get an adapter, such as [q_proj, v_proj]; all-linear = all linear
    layers except the output head. Any other single string is a regular expression that matches the
    full names of layers."""
    start_from: Location | None = None
    """Folder of LoRA adapters that the clients start from: one PEFT adapter for all of them, or a
    subfolder for each client by its name, such as runs/demo/adapters. gamma is that of the
    adapters, there is no mean of A before the first step, and rank and target_modules follow the
    adapters where they are not set. null = A is drawn and B is 0."""
    init: Literal["auto", "independent", "shared"] = "auto"
    """Initialization of A: independent = one draw per client, averaged over the clients before the
    first step if the method averages A or never trains it (ffa); shared = one draw for all clients;
    auto = the method's own."""
    scaling: Literal["auto", "lora", "rslora", "sfed"] | tuple[Exponent, Exponent] = "auto"
    """Formula of gamma, the factor of B A x: lora = alpha/r, rslora = alpha/sqrt(r), sfed =
    alpha*sqrt(N/r), or [p, q] = alpha * N^p * r^q; auto = the method's own."""
    allow_unstable: bool = False
    """Permit a gamma that grows with N although A is not the mean of independent draws. The output
    of the adapters then grows with N."""
