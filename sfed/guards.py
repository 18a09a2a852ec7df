"""Against silent divergence: what has to be the same on all processes is compared.

Before training: configuration, versions, tokenizer, backbone, data, N, layout of the adapters. In
each round: what was averaged. Only digests are sent, and where they differ the values.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sfed import __version__
from sfed.bits import bit_sum
from sfed.cli import UserError
from sfed.clients import ClientRows
from sfed.config import Config
from sfed.distributed import World
from sfed.meetings import gather_json
from sfed.run import Run
from sfed.sameness import flatten

_LIBRARIES = ("torch", "transformers", "peft", "deepspeed")


class DivergedError(RuntimeError):
    """Processes hold different values of what has to be the same."""


def require_same(world: World, name: str, facts: Mapping[str, Any]) -> None:
    """Compare facts with all other processes. Collective.

    Args:
        world: the processes.
        name: what the facts are about.
        facts: anything that JSON knows, by name.

    Raises:
        UserError: on every process, with each fact that differs and both values.
    """
    own = digest(json.dumps(facts, sort_keys=True))
    if len(set(gather_json(world, f"comparing {name}", own))) == 1:
        return
    found = gather_json(world, f"differences of {name}", dict(facts))
    keys = sorted({key for one in found for key in one})
    lines = [
        f"  {key}: {values}"
        for key in keys
        if (values := _by_value([json.dumps(one.get(key)) for one in found]))
    ]
    raise UserError(
        "\n".join([f"the processes do not agree, so nothing was trained ({name}):", *lines])
        + "\n  give all nodes the same configuration, installation, model and data"
    )


def require_same_mean(
    world: World, clients: ClientRows, factors: Sequence[str], finished_rounds: int
) -> None:
    """Compare what was averaged with all other processes: 8 bytes each. Collective.

    Args:
        world: the processes.
        clients: of this process.
        factors: what was averaged.
        finished_rounds: including the round of this mean.

    Raises:
        DivergedError: on every process, with the values of each.
    """
    if not factors or world.size == 1:
        return
    row = clients.row(clients.own.start)
    sums = {factor: bit_sum(row[clients.layout.columns(factor)]) for factor in factors}
    found = gather_json(world, "comparing the mean", list(sums.values()))
    lines = [
        f"  {factor}: {values}"
        for i, factor in enumerate(sums)
        if (values := _by_value([f"{one[i]:016x}" for one in found]))
    ]
    if lines:
        raise DivergedError(
            "\n".join(
                [
                    f"round {finished_rounds}: after the mean the processes hold different values:",
                    *lines,
                    "  one of these machines has altered a number (memory, network or device). "
                    "Nothing of this round was written; look at the machine that stands alone, "
                    "then start the same command again: it goes on from the last checkpoint",
                ]
            )
        )


def at_start(config: Config) -> dict[str, Any]:
    """What has to agree before anything is loaded."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    python = ".".join(map(str, sys.version_info[:3]))
    return {**flatten(config), "sfed": __version__, "python": python, **versions}


def of_backbone(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """A digest of a frozen model: shapes and, of a replica, the bits; before adapters are attached.

    Shares of ZeRO-3 differ by nature, and all come from what process 0 has read.

    Args:
        model: the model.
        settings: its configuration.
    """
    weights = [
        (name, list(parameter.ds_shape))
        if hasattr(parameter, "ds_shape")
        else (name, list(parameter.shape), str(parameter.dtype), bit_sum(parameter))
        for name, parameter in sorted(model.named_parameters())
    ]
    kept = {key: value for key, value in settings.items() if key != "_name_or_path"}
    return digest(json.dumps([weights, kept], sort_keys=True, default=str))


def when_built(run: Run, tokenizer: str) -> dict[str, Any]:
    """What has to agree once everything is loaded and nothing is trained.

    Args:
        run: the run.
        tokenizer: digest of the tokenizer as it was loaded, before it was used: which process
            has to tokenise depends on its cache.
    """
    counts = [run.data.train_counts, run.data.eval_counts, run.data.summary]
    return {
        "federated.num_clients (N)": run.num_clients,
        "tokenizer": tokenizer,
        "backbone": run.backbone.weights_digest,
        "examples of each client": digest(json.dumps(counts)),
        "layout of the adapters": digest(repr(run.clients.layout.pieces)),
        "gamma": run.gamma,
    }


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _by_value(values: Sequence[str]) -> str:
    """Say who has which value; nothing where all have the same."""
    holders: dict[str, list[str]] = {}
    for process, value in enumerate(values):
        holders.setdefault(value, []).append(str(process))
    if len(holders) == 1:
        return ""
    return "; ".join(f"{value} on process {', '.join(who)}" for value, who in holders.items())
