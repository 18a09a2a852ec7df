"""Against silent divergence: what has to be the same on all processes is compared.

Before training: configuration, versions, tokenizer, backbone, data, N, layout of the adapters. In
each round: what was averaged. Only digests are sent, and where they differ the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sfed.clients.store import ClientStore
from sfed.config import own_method
from sfed.config.diff import flatten
from sfed.config.schema import Config
from sfed.distributed.consistency import bit_sum, by_value, digest
from sfed.distributed.sync import gather_json
from sfed.distributed.world import World
from sfed.federated.context import Run
from sfed.files.listing import SPLITS, list_files
from sfed.lora.frozen.quantized import quantised_layers
from sfed.methods.by_layer import BaseChanges
from sfed.models.deepspeed import own_share
from sfed.utils import versions
from sfed.utils.errors import DivergedError


def require_same_mean(
    world: World,
    clients: ClientStore,
    factors: Sequence[str],
    changes: BaseChanges,
    finished_rounds: int,
) -> None:
    """Compare what was averaged, and what the server keeps, with all other processes. Collective.

    8 bytes each are sent.

    Args:
        world: the processes.
        clients: of this process.
        factors: what was averaged.
        changes: of the frozen weights.
        finished_rounds: including the round of this mean.

    Raises:
        DivergedError: on every process, with the values of each.
    """
    if not factors or world.size == 1:
        return
    sums = {factor: bit_sum(clients.shared(factor)) for factor in factors}
    sums |= {name: bit_sum(part) for name, part in sorted(clients.common_state.items())}
    if changes:
        terms = [one.flatten() for pair in changes.values() for one in pair]
        sums["change of the frozen weights"] = bit_sum(torch.cat(terms))
    found = gather_json(world, "comparing the mean", list(sums.values()))
    lines = [
        f"  {factor}: {values}"
        for i, factor in enumerate(sums)
        if (values := by_value([f"{one[i]:016x}" for one in found]))
    ]
    if lines:
        raise DivergedError(
            "\n".join(
                [
                    f"round {finished_rounds}: after the mean the processes hold different values:",
                    *lines,
                    "  one of these machines has altered a number (memory, network or device). "
                    "Nothing of this round was written; look at the machine that stands alone, "
                    "then start the same command again: it resumes from the last checkpoint",
                ]
            )
        )


def at_start(config: Config) -> dict[str, Any]:
    """What has to agree before anything is loaded."""
    listed = {
        f"the files of data.{split}_files": list_files(config, split).files for split in SPLITS
    }
    own = {"federated.method": own_method.identity(config.federated.method)}
    return {**flatten(config), **own, **listed, **versions.of_libraries(*versions.LIBRARIES)}


def of_backbone(world: World, model: nn.Module, settings: Mapping[str, Any]) -> str:
    """A digest of a frozen model: its shapes and bits, before adapters are attached.

    The same of a replica and of shards, whose sums are added up; scales of quantised weights, which
    each process has made itself, count as they are. Collective where it is sharded.

    Args:
        world: the processes.
        model: the model.
        settings: its configuration.
    """
    named = sorted(model.named_parameters())
    shares = [own_share(parameter, world.rank) for _, parameter in named]
    held = [one if share is None else share for (_, one), share in zip(named, shares, strict=True)]
    sums = [bit_sum(values) for values in held]
    if any(share is not None for share in shares):
        told = gather_json(world, "digest of the backbone", sums)
        added = [sum(some) % 2**64 for some in zip(*told, strict=True)]
        sums = [
            own if share is None else whole
            for own, share, whole in zip(sums, shares, added, strict=True)
        ]
    weights: list[tuple[Any, ...]] = [
        (name, list(getattr(one, "ds_shape", one.shape)), str(one.dtype), total)
        for (name, one), total in zip(named, sums, strict=True)
    ]
    weights += [
        (f"{name}.scales", list(scales.shape), bit_sum(scales))
        for name, layer in sorted(quantised_layers(model))
        for scales in layer.scales
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
        "classes": run.task.classes,
        "backbone": run.backbone.weights_digest,
        "train.kernels": run.backbone.kernels.by_name,
        "examples of each client": digest(json.dumps(counts)),
        "layout of the adapters": digest(repr(run.clients.layout.pieces)),
        "LoRA ranks": list(run.clients.layout.ranks),
        "gamma": run.gamma,
        "adapters that the run starts from": run.origin and run.origin.digest,
    }
