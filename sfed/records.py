"""What a run says about itself: header, ``config.json``, the events of ``metrics.jsonl``."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch

from sfed import __version__, metrics
from sfed.evaluate import Evaluation
from sfed.local import FIRST_NORM, IS_BAD, LOSS_SUM, NORM_SUM, STEPS, SUPERVISED, TOKENS, Ledger
from sfed.run import Run
from sfed.shape import dtype_name

_VERSIONS = ("torch", "transformers", "peft", "deepspeed", "datasets", "safetensors", "numpy")


def header(run: Run) -> list[str]:
    """What this run is, in plain words, a line each."""
    method, layout, world = run.method, run.clients.layout, run.world
    of_clients, of_rank = method.exponents
    sent = sum(
        (columns := layout.columns(factor)).stop - columns.start for factor in method.averaged_in(0)
    )
    start = "independent, averaged before the first step" if method.independent_init else "shared"
    return [
        f"{method.name}: {run.num_clients} clients on {world.size} "
        f"process{'es' if world.size > 1 else ''} ({world.device.type}), "
        f"{sum(run.data.train_counts):,} training and {sum(run.data.eval_counts):,} held-out "
        "examples",
        f"gamma = {method.alpha:g} * N^{of_clients:g} * r^{of_rank:g} = {run.gamma:.4g} with "
        f"N = {run.num_clients}, r = {run.config.lora.rank}; A starts {start}",
        f"adapter: {layout.size:,} numbers per client; a round sends "
        f"{' and '.join(method.averaged_in(0)) or 'nothing'} ({4 * sent:,} bytes)",
        f"backbone: {run.backbone.sharding.kind} ({run.backbone.sharding.reason})",
        "losses: nats per token; personal = each client's adapter on its own held-out data, "
        "global = A with the mean of B on everybody's",
    ]


def describe_run(run: Run) -> dict[str, Any]:
    """What ``config.json`` keeps: the resolved configuration and all it was run with."""
    return {
        **json.loads(run.config.model_dump_json()),
        "resolved": {
            "num_clients": run.num_clients,
            "gamma": run.gamma,
            "alpha": run.method.alpha,
            "scaling_exponents": list(run.method.exponents),
            "independent_init": run.method.independent_init,
            "dtype": dtype_name(run.config, run.world),
            "sharding": run.backbone.sharding.kind,
            "sharding_reason": run.backbone.sharding.reason,
            "adapter_parameters": run.clients.layout.size,
            "world_size": run.world.size,
            "device": str(run.world.device.type),
        },
        "versions": {
            "sfed": __version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: importlib.metadata.version(name) for name in _VERSIONS},
        },
    }


@dataclass
class Timing:
    """Seconds of the parts of a round, on this process."""

    local_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    round_seconds: float = 0.0


def round_event(
    run: Run,
    finished_rounds: int,
    ledger: Ledger | None,
    evaluation: Evaluation | None,
    uploaded_bytes: int,
    timing: Timing,
) -> dict[str, Any]:
    """Build the event of a round; ``finished_rounds`` 0 is the state before any training.

    Values that were not measured in this round are None. Losses are nats per supervised token.
    """
    event: dict[str, Any] = {"event": "round", "round": finished_rounds}
    event.update(_training(run, ledger))
    event.update(_held_out(run, evaluation))
    event[metrics.UPLOADED_BYTES] = uploaded_bytes
    event[metrics.EVALUATION_BYTES] = evaluation.communicated_bytes if evaluation else 0
    event[metrics.ROUND_SECONDS] = timing.round_seconds
    event[metrics.LOCAL_SECONDS] = timing.local_seconds
    event[metrics.AGGREGATE_SECONDS] = timing.aggregate_seconds
    event[metrics.EVALUATE_SECONDS] = timing.evaluate_seconds
    tokens = 0.0 if ledger is None else float(ledger[:, TOKENS].sum())
    speed = tokens / timing.local_seconds if timing.local_seconds else None
    event[metrics.TOKENS_PER_SECOND] = speed
    event[metrics.PEAK_BYTES] = peak_bytes(run.world.device)
    event["clients"] = [
        _client(run, client, ledger, evaluation) for client in range(run.num_clients)
    ]
    return event


def _training(run: Run, ledger: Ledger | None) -> dict[str, Any]:
    if ledger is None:
        return {metrics.TRAIN_LOSS: None, metrics.GRAD_NORM: None, "adapter/first_grad_norm": None}
    good = ledger[ledger[:, IS_BAD] == 0]
    good = good[good[:, STEPS] > 0]
    sums = good.sum(axis=0)
    num = max(1, len(good))
    return {
        metrics.TRAIN_LOSS: float(sums[LOSS_SUM] / sums[SUPERVISED]) if sums[SUPERVISED] else None,
        metrics.GRAD_NORM: float(sums[NORM_SUM] / sums[STEPS]) if sums[STEPS] else None,
        "adapter/first_grad_norm": float(sums[FIRST_NORM] / num) if len(good) else None,
    }


def _held_out(run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
    """Means over clients by tokens, unweighted and by training examples, for each adapter kind."""
    event: dict[str, Any] = {metrics.EVAL_LOSS: None, metrics.EVAL_PERPLEXITY: None}
    if evaluation is None:
        return event
    for kind in evaluation.sums:
        pairs = [
            (loss, float(run.data.train_counts[client]))
            for client in range(run.num_clients)
            if (loss := evaluation.client_loss(kind, client)) is not None
        ]
        losses, examples = [loss for loss, _ in pairs], [count for _, count in pairs]
        event[f"eval/{kind}_loss"] = evaluation.loss(kind)
        event[f"eval/{kind}_loss_unweighted"] = metrics.mean(losses)
        event[f"eval/{kind}_loss_by_examples"] = metrics.mean(losses, examples)
    main = next(iter(evaluation.sums), None)
    if main is not None:
        event[metrics.EVAL_LOSS] = evaluation.loss(main)
        event[metrics.EVAL_PERPLEXITY] = metrics.perplexity(event[metrics.EVAL_LOSS])
    return event


def _client(
    run: Run, client: int, ledger: Ledger | None, evaluation: Evaluation | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "client": client,
        "train_loss": None,
        "eval_loss": None,
        "examples": run.data.train_counts[client],
    }
    if ledger is not None and ledger[client, STEPS] > 0:
        sums = ledger[client]
        entry["steps"] = int(sums[STEPS])
        entry["excluded"] = bool(sums[IS_BAD])
        if sums[SUPERVISED] and not sums[IS_BAD]:
            entry["train_loss"] = float(sums[LOSS_SUM] / sums[SUPERVISED])
            entry["grad_norm"] = float(sums[NORM_SUM] / sums[STEPS])
    if evaluation is not None:
        for kind in evaluation.sums:
            entry[f"{kind}_loss"] = evaluation.client_loss(kind, client)
        entry["eval_loss"] = entry.get("personal_loss", entry.get("global_loss"))
    return entry


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the device on CUDA, of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
